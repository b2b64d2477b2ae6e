"""Outputs go to the next server or somebody hears of it: once, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from swarm.errors import ErrorCode, InvalidRecord
from swarm.fakes import FakeNetwork, Fate
from swarm.messages import Attach, Message, PushTarget, Refused, Step, TensorFrame
from swarm.server.pusher import Pusher
from swarm.transport import Endpoint, Service, Stream
from swarm.wire import decode, encode

WINDOW, TIMEOUT = 4, 30.0
FOREVER = 1e6


def target(name: str, ticket: bytes = b"t" * 16) -> PushTarget:
    return PushTarget(record=name.encode(), session_id=b"s" * 16, ticket=ticket)


def step(number: int, epoch: int = 0) -> Step:
    hidden = TensorFrame(dtype="float32", shape=(1, 1, 1), data=bytes(4))
    return Step(epoch=epoch, step=number, start=number, hidden=hidden)


class Net:
    """Servers `one` and `two`, what was pushed to them, and what the client heard."""

    def __init__(self, first: PushTarget | None, timeout: float = FOREVER) -> None:
        self.network = FakeNetwork()
        self.endpoints = {
            name: Endpoint(f"{name}.invalid", 1, name, name.encode()) for name in ("one", "two")
        }
        self.got: dict[str, list[Message]] = {name: [] for name in self.endpoints}
        self.heard: list[tuple[int, int, str]] = []
        self.news = asyncio.Event()
        self.refuses: set[str] = set()
        for name, endpoint in self.endpoints.items():
            self.network.serve(endpoint, Service(self.nobody, self.server(name), self.nobody))
        self.pusher = Pusher(
            self.network.transport("me"), self.resolve, first, window=WINDOW, timeout=timeout
        )

    async def nobody(self, *_: Any) -> Any:
        raise AssertionError

    def server(self, name: str) -> Callable[[Stream], Awaitable[None]]:
        async def push(stream: Stream) -> None:
            while (frame := await stream.receive()) is not None:
                if name in self.refuses:
                    refusal = Refused(code=ErrorCode.UNKNOWN_SESSION, message="no such session")
                    await stream.send(encode(refusal))
                    return
                self.got[name].append(decode(frame))
                self.news.set()

        return push

    def resolve(self, wanted: PushTarget) -> Endpoint:
        try:
            return self.endpoints[wanted.record.decode()]
        except KeyError:
            raise InvalidRecord("forged") from None

    async def report(self, epoch: int, number: int, why: str) -> None:
        self.heard.append((epoch, number, why))
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.news.clear()
            await self.news.wait()

    def steps(self, name: str) -> list[int]:
        return [message.step for message in self.got[name] if isinstance(message, Step)]


def run(body: Callable[[Net], Awaitable[None]], first: PushTarget | None, **options: float) -> None:
    async def go() -> None:
        net = Net(first, **options)
        running = asyncio.create_task(net.pusher.run(net.report))
        try:
            async with asyncio.timeout(TIMEOUT):
                await body(net)
        finally:
            running.cancel()
            await asyncio.wait([running], timeout=TIMEOUT)
            assert running.cancelled(), running
            await net.network.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


def test_steps_arrive_in_order_behind_one_attach() -> None:
    async def body(net: Net) -> None:
        for number in range(20):
            assert await net.pusher.push(step(number))
        await net.until(lambda: len(net.steps("one")) == 20)
        assert net.steps("one") == list(range(20))
        assert net.got["one"][0] == Attach(session_id=b"s" * 16, ticket=b"t" * 16)
        assert not net.heard

    run(body, target("one"))


def test_what_steps_became_is_sent_in_place_of_what_they_were() -> None:
    async def body(net: Net) -> None:
        became = TensorFrame(dtype="float32", shape=(1, 1, 2), data=bytes(range(8)))
        for number in range(3):  # the first one waits until somebody has dialled
            assert await net.pusher.push(step(number), became)
            await net.until(lambda number=number: len(net.steps("one")) == number + 1)
        sent = [message for message in net.got["one"] if isinstance(message, Step)]
        assert sent == [step(n).model_copy(update={"hidden": became}) for n in range(3)]

    run(body, target("one"))


def test_nobody_to_push_to() -> None:
    async def body(net: Net) -> None:
        assert not await net.pusher.push(step(0))
        net.pusher.redirect(target("one"))
        assert await net.pusher.push(step(1))
        await net.until(lambda: net.steps("one") == [1])

    run(body, None)


def test_a_redirect_holds_for_all_that_follows() -> None:
    async def body(net: Net) -> None:
        await net.pusher.push(step(0))
        await net.until(lambda: net.steps("one") == [0])
        net.pusher.redirect(target("two"))
        await net.pusher.push(step(1))
        await net.until(lambda: net.steps("two") == [1])
        net.pusher.redirect(target("one", b"u" * 16))
        await net.pusher.push(step(2))
        await net.until(lambda: net.steps("one") == [0, 2])
        assert net.got["one"][-2] == Attach(session_id=b"s" * 16, ticket=b"u" * 16)
        assert not net.heard

    run(body, target("one"))


def test_what_was_queued_for_somebody_else_is_dropped() -> None:
    async def body(net: Net) -> None:
        gate = asyncio.Event()

        async def hold(*_: Any) -> Fate:
            await gate.wait()
            return Fate.DELIVER

        net.network.before_frame = hold
        for number in range(3):
            await net.pusher.push(step(number))
        net.pusher.redirect(target("two"))
        await net.pusher.push(step(3, epoch=1))
        gate.set()
        await net.until(lambda: net.steps("two") == [3])
        assert set(net.steps("one")) <= {0}

    run(body, target("one"))


def cut(net: Net) -> None:
    net.network.cut(net.endpoints["one"])


def block(net: Net) -> None:
    net.network.block("me", "one")


def refuse(net: Net) -> None:
    net.refuses.add("one")


@pytest.mark.parametrize("harm", [cut, block, refuse])
@pytest.mark.parametrize("attached", [True, False])
def test_a_failure_is_told_once_and_ends_when_redirected(
    harm: Callable[[Net], None], attached: bool
) -> None:
    async def body(net: Net) -> None:
        if attached:
            await net.pusher.push(step(6, epoch=2))
            await net.until(lambda: net.steps("one") == [6])
        harm(net)
        await net.pusher.push(step(7, epoch=2))
        await net.until(lambda: bool(net.heard))
        assert net.heard[0][:2] in {(2, 6), (2, 7)}
        assert net.heard[0][2]
        assert not await net.pusher.push(step(8, epoch=2))
        net.pusher.redirect(target("two"))
        assert await net.pusher.push(step(9, epoch=3))
        await net.until(lambda: net.steps("two") == [9])
        assert len(net.heard) == 1

    run(body, target("one"))


def test_a_break_is_noticed_though_nothing_is_pushed() -> None:
    async def body(net: Net) -> None:
        await net.pusher.push(step(4, epoch=1))
        await net.until(lambda: net.steps("one") == [4])
        cut(net)
        await net.until(lambda: bool(net.heard))
        assert net.heard[0][:2] == (1, 4)

    run(body, target("one"))


def test_a_forged_record_is_not_dialled() -> None:
    async def body(net: Net) -> None:
        await net.pusher.push(step(0))
        await net.until(lambda: bool(net.heard))
        assert "forged" in net.heard[0][2]

    run(body, target("somebody"))


@pytest.mark.parametrize("attached", [True, False])
def test_a_next_hop_that_does_not_read_is_given_up(attached: bool) -> None:
    async def body(net: Net) -> None:
        if attached:
            await net.pusher.push(step(0))
            await net.until(lambda: net.steps("one") == [0])
        net.network.freeze(net.endpoints["one"])
        number = 1
        while not net.heard:
            await net.pusher.push(step(number))
            number += 1
            await asyncio.sleep(0)
        assert "no" in net.heard[0][2]
        assert number < 100  # the queue and the buffers of the stream have their bounds

    run(body, target("one"), timeout=0.1)


def test_it_can_be_stopped_in_the_very_moment_of_a_break() -> None:
    """Python 3.11's task groups forget that they were cancelled when a child fails as well."""

    async def body(net: Net) -> None:
        await net.pusher.push(step(0))
        await net.until(lambda: net.steps("one") == [0])
        cut(net)  # `run` above cancels before the break was noticed, and asserts that all has ended

    for _ in range(5):
        run(body, target("one"))
