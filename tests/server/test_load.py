"""More than a server can do: everybody gets an answer or a coded error, and others go on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from swarm.errors import ErrorCode, NoRoute, PeerUnavailable
from swarm.messages import Close, Opened, Output, Refused
from swarm.models.pages import PAGE
from swarm.server.scheduler import PATIENCE
from swarm.tensors import from_frame
from tests.client.twins import THIRDS, House
from tests.inprocess import STEADY
from tests.server.stranger import Stranger, Talk, assert_same, expected_of, hidden_of
from tests.server.town import LIMITS, PAGES, Town

LOAD = replace(LIMITS, kv_overcommit=2.0, max_sessions=32, max_step_tokens=256, pass_tokens=64)
CLIENTS = (94, 95, 96, 97)
HOG = 97


class Loaded(Town):
    """Counts what must not be exceeded whenever somebody asks."""

    @property
    def used(self) -> int:
        store = self.server.handler._span.store
        assert store.used <= store.taken <= store.budget
        return store.used

    @property
    def waiting(self) -> int:
        """Bytes of steps."""
        left = self.server.handler._house.holdings.left
        assert 0 <= left <= self.swarm.limits.waiting_bytes
        return self.swarm.limits.waiting_bytes - left

    async def stream(self, talk: Talk, tokens: int) -> list[int]:
        """A text, token by token, as one machine would have it; the passes that each took."""
        text, passes = hidden_of(self.local, tokens, seed=tokens), list[int]()
        expected = expected_of(self.local, text)
        for at in range(tokens):
            before = self.server.executor.backend.passes
            assert_same(await talk.ask(text[:, at : at + 1]), expected[:, at : at + 1])
            passes.append(self.server.executor.backend.passes - before)
            assert self.used
            assert self.waiting >= 0
        return passes

    async def others_go_on(self, disturb: Callable[[], Awaitable[Any]]) -> None:
        """A session that is open already, and one that comes later."""
        honest = Stranger(self.swarm, client=CLIENTS[0])
        talk = await honest.open(self.server)
        disturbing = asyncio.ensure_future(disturb())
        try:
            passes = await self.stream(talk, 30)
            talk.stream.cancel()
            talk = await honest.open(self.server)
            passes += await self.stream(talk, 30)
            talk.stream.cancel()
            # The pass that runs and their own, but for what the event loop, which all share here,
            # keeps them waiting.
            assert median(passes) <= 2, passes
            assert max(passes) <= PATIENCE, passes
        finally:
            disturbing.cancel()
            with suppress(asyncio.CancelledError):
                await disturbing
            self.swarm.network.hang_up(f"stranger {HOG}")


@pytest.fixture
def loaded(request: pytest.FixtureRequest) -> Any:
    town = Loaded(replace(LOAD, **getattr(request, "param", {})))
    with town:
        yield town
        town.swarm.assert_quiet()
        assert town.waiting == 0


async def opening_answer(town: Town, stranger: Stranger, **fields: Any) -> tuple[Talk, Any]:
    talk = Talk(await stranger.dial(town.server), stranger.opening(town.server, **fields))
    await talk.send(talk.opening)
    return talk, await talk.receive()


def test_more_sessions_than_fit_are_all_served_in_the_end(loaded: Loaded) -> None:
    """Those who cannot begin are told so at once, and when to come again."""
    answers: Counter[str] = Counter()
    width = PAGES // 2 * PAGE  # two fit, four are promised

    async def client(index: int) -> None:
        stranger = Stranger(loaded.swarm, client=CLIENTS[index % len(CLIENTS)])
        for _ in range(200):
            talk, answer = await opening_answer(loaded, stranger, max_length=width)
            answers[answer.kind] += 1
            if isinstance(answer, Opened):
                await loaded.stream(talk, 4)
                await talk.send(Close())
                assert await talk.stream.receive() is None
                return
            assert answer.code is ErrorCode.BUSY
            assert 0 < answer.retry_after <= 1
            await asyncio.sleep(answer.retry_after / 10)
        raise AssertionError("never served")

    async def go() -> None:
        await asyncio.gather(*(client(index) for index in range(12)))

    loaded.run(go())
    assert answers["opened"] == 12
    assert answers["refused"]


def test_texts_that_outgrow_the_pages_wait_or_are_refused(loaded: Loaded) -> None:
    """More was promised than there is, and all want it: some finish, the others may come again."""
    loaded.server.executor._page_timeout = 0.2
    length = PAGES // 2 * PAGE
    text = hidden_of(loaded.local, length)
    expected = expected_of(loaded.local, text)

    async def client(index: int) -> int:
        """How often it had to begin anew."""
        stranger = Stranger(loaded.swarm, client=CLIENTS[index])
        for attempt in range(100):
            talk, answer = await opening_answer(loaded, stranger, max_length=length)
            while isinstance(answer, Opened | Output) and talk.position < length:
                at = talk.position
                await talk.send(talk.step(text[:, at : at + PAGE]))
                answer = await talk.receive()
                if isinstance(answer, Output):
                    assert_same(from_frame(answer.hidden), expected[:, at : at + PAGE])
                assert loaded.used
            if not isinstance(answer, Refused):
                talk.stream.cancel()
                return attempt
            assert answer.code is ErrorCode.BUSY
            assert answer.retry_after
        raise AssertionError("never served")

    async def go() -> list[int]:
        return await asyncio.gather(*(client(index) for index in range(4)))

    assert any(loaded.run(go()))


@pytest.mark.parametrize("tokens", [PAGES * PAGE + 1, 1 << 20])
def test_a_prompt_longer_than_the_budget_is_refused_when_it_opens(
    loaded: Loaded, tokens: int
) -> None:
    async def go() -> None:
        _, answer = await opening_answer(loaded, loaded.stranger, max_length=tokens)
        assert answer.code is ErrorCode.TOO_LONG
        await loaded.honest()

    loaded.run(go())


def test_a_client_learns_that_its_prompt_fits_nowhere() -> None:
    with House(spans=THIRDS, limits=LOAD) as house:
        timeouts = replace(STEADY, recovery=0.5)
        with (
            house.twin(timeouts=timeouts, max_length=1 << 14) as twin,
            pytest.raises(NoRoute, match="bytes of cache asked for; this server has"),
        ):
            twin.step(8)


def test_who_opens_sessions_and_never_steps_holds_no_pages_and_half_of_the_promises(
    loaded: Loaded,
) -> None:
    hog = Stranger(loaded.swarm, client=HOG)

    async def go() -> None:
        talks: list[Talk] = []
        talk, answer = await opening_answer(loaded, hog, max_length=4 * PAGE)
        while isinstance(answer, Opened):
            talks.append(talk)
            talk, answer = await opening_answer(loaded, hog, max_length=4 * PAGE)
        assert answer.code is ErrorCode.BUSY
        assert answer.retry_after
        assert len(talks) == PAGES // 4
        assert loaded.used == 0
        await loaded.others_go_on(asyncio.Event().wait)
        for talk in talks:
            talk.stream.cancel()

    loaded.run(go())


@pytest.mark.parametrize("loaded", [{"send_timeout": 1.0}], indirect=True)
def test_who_never_reads_disturbs_nobody(loaded: Loaded) -> None:
    hog = Stranger(loaded.swarm, client=HOG)

    async def never_read() -> None:
        while True:
            talk = await hog.open(loaded.server)
            try:
                while True:
                    await talk.send(talk.step(hidden_of(loaded.local, 0)))
            except PeerUnavailable:
                continue

    loaded.run(loaded.others_go_on(never_read))


@pytest.mark.parametrize("loaded", [{"waiting_bytes": 1 << 18, "window": 4}], indirect=True)
def test_who_floods_is_slowed_or_refused(loaded: Loaded) -> None:
    """Prompts as wide as a step may be, from several sessions, regardless of the window."""
    hog, refusals = Stranger(loaded.swarm, client=HOG), Counter[ErrorCode]()

    async def flood() -> None:
        talk = await hog.open(loaded.server, max_length=128, batch_size=2)
        try:
            with suppress(PeerUnavailable):
                for number in range(64):
                    step = talk.step(hidden_of(loaded.local, 128, rows=2, seed=number))
                    changes = {"start": 0, "epoch": number, "crop_to": 0 if number else None}
                    await talk.send(step.model_copy(update=changes))
            while not isinstance(answer := await talk.receive(), Refused):
                pass
            refusals[answer.code] += 1
        except PeerUnavailable:
            pass

    async def floods() -> None:
        while True:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(flood())

    loaded.run(loaded.others_go_on(floods))
    assert set(refusals) <= {ErrorCode.BUSY}
