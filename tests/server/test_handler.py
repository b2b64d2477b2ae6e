"""Strangers, idlers and floods get a coded answer, harm nobody else, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import ErrorCode, PeerUnavailable
from swarm.identity import SwarmKey
from swarm.messages import (
    HAND_OVER,
    Attach,
    Close,
    Info,
    InfoRequest,
    Output,
    Refused,
    Step,
)
from swarm.models.pages import PAGE
from swarm.models.spans import SpanCache
from swarm.server.session import Session
from swarm.wire import decode, encode
from tests.inprocess import identity
from tests.server.stranger import Stranger, Talk, assert_same, expected_of, hidden_of
from tests.server.town import FRAMES, LIMITS, PAGES, STEPS, Town, frame_of


async def refused_code(talk: Talk, opening: Any) -> ErrorCode:
    await talk.send(opening)
    return await talk.refusal()


def test_proofs_are_good_for_one_opening_by_one_key_at_one_server(town: Town) -> None:
    async def go() -> None:
        ours, other = town.stranger, Stranger(town.swarm, client=95)
        fresh = ours.opening(town.server)
        forged = fresh.credentials.model_copy(
            update={"public_key": other.access.identity.public_key}
        )
        for opening in [
            fresh.model_copy(update={"credentials": forged}),
            fresh.model_copy(update={"session_id": b"another session!"}),
            ours.opening(town.next, start=0, end=2),  # replayed to another server
            fresh.model_copy(
                update={"credentials": fresh.credentials.model_copy(update={"signature": b""})}
            ),
            fresh.model_copy(
                update={"credentials": fresh.credentials.model_copy(update={"public_key": b"k"})}
            ),
        ]:
            talk = Talk(await ours.dial(town.server), opening)
            assert await refused_code(talk, opening) is ErrorCode.UNAUTHORIZED

    town.run(go())


def test_without_the_swarm_key_nobody_comes_in(caplog: pytest.LogCaptureFixture) -> None:
    key = SwarmKey.generate()
    with Town(key=key) as town:

        async def go() -> None:
            for wrong in (None, SwarmKey.generate()):
                outsider = Stranger(town.swarm, client=95, key=wrong)
                opening = outsider.opening(town.server)
                talk = Talk(await outsider.dial(town.server), opening)
                assert await refused_code(talk, opening) is ErrorCode.UNAUTHORIZED
                request = InfoRequest(
                    nonce=b"n" * 16, credentials=outsider.credentials(town.server, b"n" * 16)
                )
                answer = await outsider.transport.call(
                    town.server.endpoint, "info", encode(request), 5.0
                )
                message = decode(answer)
                assert isinstance(message, Refused)
                assert message.code is ErrorCode.UNAUTHORIZED
            await town.honest()

        town.run(go())
        town.swarm.assert_quiet()
    said = f"{identity(95).peer_id} does not hold the swarm key"
    assert [said in line for line in caplog.messages] == [True]  # who, and why: once, of four


@pytest.mark.parametrize("frame", [b"", b"noise", encode(Close())])
def test_bad_questions_are_answered(town: Town, frame: bytes) -> None:
    transport = town.stranger.transport
    answer = town.run(transport.call(town.server.endpoint, "info", frame, 5.0))
    assert isinstance(decode(answer), Refused)


def test_anybody_may_ask_what_a_server_has_done(town: Town) -> None:
    nonce = b"n" * 16
    request = InfoRequest(nonce=nonce, credentials=town.stranger.credentials(town.server, nonce))
    transport = town.stranger.transport
    answer = decode(town.run(transport.call(town.server.endpoint, "info", encode(request), 5.0)))
    assert isinstance(answer, Info)
    assert answer.record == town.server.record.data
    assert answer.counters["open_sessions"] == 1
    assert answer.counters["sessions"] >= 1
    assert answer.load.free_tokens == (PAGES - 1) * PAGE


# Patience ----------------------------------------------------------------------------------------


def alone(**limits: Any) -> Town:
    return Town(replace(LIMITS, **limits))


async def flood(town: Town, talk: Talk, steps: int) -> None:
    for _ in range(steps):
        await talk.send(talk.step(hidden_of(town.local, 0)))


def test_a_stream_that_never_says_what_it_wants_is_closed() -> None:
    with alone(open_timeout=0.05) as town:

        async def go() -> None:
            for method in ("session", "push"):
                stream = await town.stranger.dial(town.server, method)
                talk = Talk(stream, town.stranger.opening(town.server))
                assert await talk.refusal() is ErrorCode.DEADLINE
            await town.honest()

        town.run(go())
        town.swarm.assert_quiet()


def test_a_session_that_is_never_used_is_closed() -> None:
    with alone(idle_timeout=0.2) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            assert await talk.refusal() is ErrorCode.DEADLINE

        town.run(go())
        town.swarm.assert_quiet()


def test_a_session_that_is_only_pushed_to_is_used() -> None:
    with alone(idle_timeout=1.5) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            stream = await town.stranger.attach(town.server, *talk.target)
            end = asyncio.get_running_loop().time() + 2.0
            while asyncio.get_running_loop().time() < end:
                await stream.send(encode(talk.step(hidden_of(town.local, 0))))
                assert isinstance(await talk.receive(), Output)
                await asyncio.sleep(0.05)
            assert await talk.refusal() is ErrorCode.DEADLINE

        town.run(go())
        town.swarm.assert_quiet()


def test_a_client_that_does_not_read_loses_its_session_only() -> None:
    with alone(send_timeout=0.3) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            with pytest.raises(PeerUnavailable):
                await flood(town, talk, 1 << 30)
            await town.honest()

        town.run(go())
        town.swarm.assert_quiet()


def test_a_client_that_does_not_read_delays_nobody_s_farewell() -> None:
    with alone(send_timeout=30.0) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server, capabilities=(HAND_OVER,))
            flooding = asyncio.create_task(flood(town, talk, 1 << 30))
            session = town.server.handler._sessions[talk.opening.session_id][1]
            while not session._outbox.full():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0)
            async with asyncio.timeout(5.0):
                await town.server.handler.leave()
            talk.stream.cancel()
            with suppress(PeerUnavailable):
                await flooding

        town.run(go())
        town.swarm.assert_quiet()


def test_a_flood_of_steps_is_not_taken_in() -> None:
    """While the device is busy, a server holds no more steps than its queues have room for."""
    with alone(window=4, send_timeout=30.0) as town:
        gate = asyncio.Event()
        executor, submit = town.server.executor, town.server.executor.submit

        async def held(work: Any) -> Any:
            await gate.wait()
            return await submit(work)

        executor.submit = held  # type: ignore[method-assign]

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            link = (town.stranger.name, town.server.peer_id, "session")
            before, flooding = (
                town.swarm.network.frames[link],
                asyncio.create_task(flood(town, talk, 60)),
            )
            taken = -1
            while taken != town.swarm.network.frames[link]:
                taken = town.swarm.network.frames[link]
                for _ in range(200):
                    await asyncio.sleep(0)
            session = town.server.handler._sessions[talk.opening.session_id][1]
            assert session._inbox.qsize() == session._inbox.maxsize == 8
            assert taken - before <= 8 + 2 + town.swarm.network.buffer_frames
            gate.set()
            for _ in range(60):
                assert isinstance(await talk.receive(), Output)
            await flooding
            talk.stream.cancel()

        town.run(go())
        town.swarm.assert_quiet()


def test_a_step_that_is_not_ready_in_time_is_given_up(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, backend = threading.Event(), town.server.executor.backend
    run = backend.run

    def late(slices: Any, works: Any) -> Any:
        assert gate.wait(30.0)
        return run(slices, works)

    async def go() -> None:
        talk = await town.stranger.open(town.server)
        with monkeypatch.context() as patched:
            patched.setattr(backend, "run", late)
            await talk.send(talk.step(hidden_of(town.local, 1), deadline_ms=20))
            assert await talk.refusal() is ErrorCode.DEADLINE
            gate.set()

    town.run(go())


def test_bytes_that_wait_are_bounded_for_each_client_and_for_all() -> None:
    """Many sessions of one client fill their half; another client is served all the while."""
    with alone(waiting_bytes=1 << 16, max_sessions=12) as town:
        gate, executor = asyncio.Event(), town.server.executor
        submit = executor.submit

        async def held(work: Any) -> Any:
            if work.client == town.stranger.access.identity.peer_id:
                await gate.wait()
            return await submit(work)

        executor.submit = held  # type: ignore[method-assign]
        modest = Stranger(town.swarm, client=96)
        holdings = town.server.handler._house.holdings

        async def go() -> None:
            text = hidden_of(town.local, 30)
            talks = [await town.stranger.open(town.server) for _ in range(5)]
            for talk in talks:
                await talk.send(talk.step(text))
            await talks[0].send(talks[0].step(text))  # six are more than half
            assert await talks[0].refusal() is ErrorCode.BUSY
            other = await modest.open(town.server)
            assert_same(await other.ask(text), expected_of(town.local, text))
            other.stream.cancel()
            gate.set()
            for talk in talks[1:]:
                assert isinstance(await talk.receive(), Output)
                talk.stream.cancel()

        town.run(go())
        town.swarm.assert_quiet()
        assert holdings.left == 1 << 16


def test_bytes_of_inputs_count_before_anybody_looks_at_them() -> None:
    """The names and shapes of what travels beside a step are checked when its turn comes."""
    with alone(waiting_bytes=1 << 16) as town:
        executor, submit, gate = town.server.executor, town.server.executor.submit, asyncio.Event()

        async def held(work: Any) -> Any:
            await gate.wait()
            return await submit(work)

        executor.submit = held  # type: ignore[method-assign]

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            await talk.send(talk.step(hidden_of(town.local, 1)))
            large = {f"input {i}": frame_of((1, 1 << 13), "bool") for i in range(5)}
            await talk.send(talk.step(hidden_of(town.local, 1), inputs=large))
            assert await talk.refusal() is ErrorCode.BUSY

        town.run(go())
        town.swarm.assert_quiet()
        assert town.server.handler._house.holdings.left == 1 << 16


def test_a_server_that_leaves_admits_nobody_and_says_so(town: Town) -> None:
    async def go() -> None:
        opening = town.stranger.opening(town.server)
        talk = Talk(await town.stranger.dial(town.server), opening)
        town.server.handler.draining = True
        assert await refused_code(talk, opening) is ErrorCode.DRAINING
        town.server.handler.draining = False

    town.run(go())


def test_memory_does_not_grow(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    """Every kind of bad frame, again and again."""
    caplog.set_level(logging.CRITICAL, logger="swarm")  # what pytest captures, it keeps

    async def bad(send: Callable[[Talk], Awaitable[None]]) -> None:
        talk = await town.stranger.open(town.server, batch_size=2, max_length=10)
        await send(talk)
        await talk.refusal()

    async def before_it_opened(method: str, frame: bytes) -> None:
        stream = await town.stranger.dial(town.server, method)
        await stream.send(frame)
        await Talk(stream, town.stranger.opening(town.server)).refusal()

    async def once() -> None:
        for changes, _ in STEPS.values():
            step = Step(epoch=0, step=0, start=1, hidden=frame_of((2, 1, 48)))
            step = step.model_copy(update=changes)
            await bad(lambda talk, step=step: talk.send(step))
        for make in FRAMES.values():
            frame = make(Close())
            await bad(lambda talk, frame=frame: talk.stream.send(frame))
            for method in ("session", "push"):
                await before_it_opened(method, frame)
        await before_it_opened("push", encode(Attach(session_id=bytes(16), ticket=bytes(16))))

    def held() -> int:
        gc.collect()
        return sum(type(thing) in (Session, SpanCache) for thing in gc.get_objects())

    town.run(once())
    before = held()
    tracemalloc.start()
    try:
        town.run(once())
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            town.run(once())
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - first
    finally:
        tracemalloc.stop()
    assert held() <= before
    assert grown < 100_000
