"""The fake network keeps the real one's laws, so that what passes on it passes outside."""

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import AuthenticationError, ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.fakes import FakeNetwork, Fate
from swarm.transport import Endpoint, Service, Stream, StreamHandler

ONE = Endpoint("one.invalid", 1, "one", b"1" * 32)
TWO = Endpoint("two.invalid", 2, "two", b"2" * 32)
TIMEOUT = 5.0
MOMENT = 0.02


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


async def shout(request: bytes) -> bytes:
    return request.upper()


def network_with(session: StreamHandler = echo, **options: int) -> FakeNetwork:
    network = FakeNetwork(**options)
    network.serve(ONE, Service(session, echo, shout))
    network.serve(TWO, Service(echo, echo, shout))
    return network


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


async def refused(awaitable: Awaitable[Any]) -> None:
    with pytest.raises(PeerUnavailable):
        await awaitable


async def pending(awaitable: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Started, and shown not to come to an end by itself."""
    task = asyncio.create_task(awaitable)
    done, _ = await asyncio.wait([task], timeout=MOMENT)
    assert not done
    return task


def test_frames_calls_and_polite_ends_arrive_and_are_counted() -> None:
    async def go() -> None:
        network = network_with()
        transport = network.transport("me")
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        await stream.send(b"a")
        await stream.send(b"b")
        await stream.finish()
        assert [await stream.receive() for _ in range(3)] == [b"a", b"b", None]
        assert await transport.call(TWO, "info", b"x", TIMEOUT) == b"X"
        assert network.frames["me", "one", "session"] == 2
        assert network.frames["one", "me", "session"] == 2
        assert network.frames["me", "two", "info"] == 1
        await refused(stream.send(b"too late"))
        await network.close()

    run(go())


def test_a_cut_breaks_streams_in_both_directions_and_refuses_dials_until_restored() -> None:
    async def go() -> None:
        network = network_with()
        transport = network.transport("me")
        to_one = await transport.open_stream(ONE, "session", TIMEOUT)
        from_one = await network.transport("one").open_stream(TWO, "push", TIMEOUT)
        reading = await pending(to_one.receive())
        network.cut(ONE)
        await refused(reading)
        await refused(to_one.send(b"x"))
        await refused(from_one.send(b"x"))
        await refused(transport.open_stream(ONE, "session", TIMEOUT))
        assert await transport.call(TWO, "info", b"x", TIMEOUT) == b"X"
        network.restore(ONE)
        assert await transport.call(ONE, "info", b"x", TIMEOUT) == b"X"
        await network.close()

    run(go())


def test_a_frozen_server_breaks_nothing_and_goes_on_when_thawed() -> None:
    async def go() -> None:
        network = network_with()
        transport = network.transport("me")
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        network.freeze(ONE)
        await stream.send(b"x")
        answer = await pending(stream.receive())
        await refused(transport.open_stream(ONE, "session", MOMENT))
        dialing = await pending(transport.call(ONE, "info", b"y", TIMEOUT))
        network.thaw(ONE)
        assert await answer == b"x"
        assert await dialing == b"Y"
        await network.close()

    run(go())


def test_a_blocked_link_stops_two_peers_and_nobody_else() -> None:
    async def go() -> None:
        network = network_with()
        mine, of_two = network.transport("me"), network.transport("two")
        stream = await of_two.open_stream(ONE, "push", TIMEOUT)
        network.block("one", "two")
        await refused(stream.receive())
        await refused(of_two.open_stream(ONE, "push", TIMEOUT))
        assert await mine.call(ONE, "info", b"x", TIMEOUT) == b"X"
        assert await mine.call(TWO, "info", b"x", TIMEOUT) == b"X"
        network.unblock("one", "two")
        await of_two.open_stream(ONE, "push", TIMEOUT)
        await network.close()

    run(go())


def test_the_hook_sees_each_frame_first_and_decides_its_fate() -> None:
    async def go() -> None:
        network = network_with()
        seen: list[tuple[str, str, str, bytes]] = []

        async def hook(source: str, destination: str, method: str, frame: bytes) -> Fate:
            seen.append((source, destination, method, frame))
            if (source, frame) == ("one", b"last words"):
                network.cut(ONE)
            return Fate.BREAK if frame == b"lost" else Fate.DELIVER

        network.before_frame = hook
        transport = network.transport("me")
        lossy = await transport.open_stream(ONE, "session", TIMEOUT)
        await refused(lossy.send(b"lost"))
        await refused(lossy.receive())
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        await stream.send(b"last words")
        await refused(stream.receive())
        assert seen == [
            ("me", "one", "session", b"lost"),
            ("me", "one", "session", b"last words"),
            ("one", "me", "session", b"last words"),
        ]
        assert network.frames["me", "one", "session"] == 1
        assert network.frames["one", "me", "session"] == 0
        await network.close()

    run(go())


def test_a_sender_waits_while_the_buffer_is_full_and_breaks_the_stream_if_cancelled() -> None:
    async def go() -> None:
        opened = asyncio.Event()

        async def slow(stream: Stream) -> None:
            await opened.wait()
            await echo(stream)

        network = network_with(slow, buffer_frames=2)
        transport = network.transport("me")
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        for frame in (b"1", b"2"):
            await stream.send(frame)
        third = await pending(stream.send(b"3"))
        opened.set()
        await third
        assert [await stream.receive() for _ in range(3)] == [b"1", b"2", b"3"]

        opened.clear()
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        for frame in (b"1", b"2"):
            await stream.send(frame)
        third = await pending(stream.send(b"3"))
        third.cancel()
        await asyncio.wait([third])
        await refused(stream.receive())
        await network.close()

    run(go())


def test_a_cancelled_receive_loses_nothing() -> None:
    async def go() -> None:
        network = network_with()
        stream = await network.transport("me").open_stream(ONE, "session", TIMEOUT)
        reading = await pending(stream.receive())
        reading.cancel()
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        await network.close()

    run(go())


def test_a_handler_is_cancelled_when_its_client_goes_and_its_defects_are_kept() -> None:
    async def go() -> None:
        left = asyncio.Event()

        async def wait(stream: Stream) -> None:
            try:
                if await stream.receive() == b"defect":
                    raise ZeroDivisionError
                raise RemoteProtocolError(ErrorCode.GAP, "told the peer already")
            finally:
                left.set()

        network = network_with(wait)
        transport = network.transport("me")
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        await pending(stream.receive())
        stream.cancel()
        await left.wait()

        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        await stream.send(b"refuse me")
        assert await stream.receive() is None
        assert network.defects == []
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        await stream.send(b"defect")
        await refused(stream.receive())
        assert [type(error) for error in network.defects] == [ZeroDivisionError]
        await network.close()

    run(go())


def test_another_certificate_than_the_announced_one_is_refused() -> None:
    async def go() -> None:
        network = network_with()
        transport = network.transport("me")
        with pytest.raises(AuthenticationError):
            await transport.open_stream(
                replace(ONE, certificate_digest=b"3" * 32), "session", TIMEOUT
            )
        stream = await transport.open_stream(ONE, "session", TIMEOUT)
        await transport.close()
        await refused(stream.receive())
        await network.close()

    run(go())
