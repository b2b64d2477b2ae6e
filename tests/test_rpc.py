"""The real network's streams: frames arrive, breaks are noticed, nobody holds up others."""

import asyncio
import gc
import os
import weakref
from typing import Any

import pytest

from swarm import rpc
from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.messages import Refused
from swarm.mux import MAX_MESSAGE_BYTES, Kind
from swarm.rpc import grpc
from swarm.transport import Stream
from swarm.wire import MAX_FRAME_BYTES, decode, pack
from tests.rpcs import (
    TIMEOUT,
    busy,
    cancel,
    echo,
    fails,
    flood,
    raw_channel,
    result,
    run,
    serving,
)

HELLO = pack([bytes(16), False])


@pytest.mark.parametrize("method", ["session", "push"])
def test_frames_arrive_in_order_until_both_ends_have_finished(method: str) -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, method, TIMEOUT)
            frames = [b"", b"x", os.urandom(8192), os.urandom(MAX_FRAME_BYTES)]
            for frame in frames:
                await stream.send(frame)
            await stream.finish()
            assert [await stream.receive() for _ in frames] == frames
            assert await stream.receive() is None
            assert await stream.receive() is None
            assert str(endpoint) in str(await fails(stream.send(b"too late")))

    run(go())


def test_a_call_is_answered() -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            assert await transport.call(endpoint, "info", b"who?", TIMEOUT) == b"WHO?"

    run(go())


def test_several_tasks_may_send_at_once() -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            frames = {bytes([i]) * 100_000 for i in range(20)}
            async with asyncio.TaskGroup() as tasks:
                for frame in frames:
                    tasks.create_task(stream.send(frame))
            assert {await stream.receive() for _ in frames} == frames

    run(go())


def test_a_cancelled_receive_loses_nothing_at_either_end() -> None:
    async def patient_echo(stream: Stream) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await stream.receive()
        await stream.send(b"ready")
        await echo(stream)

    async def go() -> None:
        async with serving(patient_echo) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            assert await stream.receive() == b"ready"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await stream.receive()
            for frame in (b"one", b"two"):
                await stream.send(frame)
                assert await stream.receive() == frame

    run(go())


def test_a_defect_ends_its_own_stream_and_nothing_else() -> None:
    async def fragile(stream: Stream) -> None:
        if await stream.receive() == b"break":
            raise ZeroDivisionError
        await echo(stream)

    async def go() -> None:
        async with serving(fragile) as (_, endpoint, transport):
            good = await transport.open_stream(endpoint, "session", TIMEOUT)
            await good.send(b"fine")
            bad = await transport.open_stream(endpoint, "session", TIMEOUT)
            await bad.send(b"break")
            assert "internal error" in str(await fails(bad.receive()))
            await good.send(b"still here")
            assert await good.receive() == b"still here"

    run(go())


def test_a_refusal_can_be_read_after_a_send_has_failed() -> None:
    async def refuse(stream: Stream) -> None:
        for i in range(3):
            await stream.send(bytes([i]))

    async def go() -> None:
        async with serving(refuse) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await fails(flood(stream))
            assert [await stream.receive() for _ in range(4)] == [b"\0", b"\1", b"\2", None]

    run(go())


def test_what_a_handler_refused_still_arrives_before_the_stream_ends() -> None:
    async def refuse(stream: Stream) -> None:
        await stream.send(b"refused")
        raise RemoteProtocolError(ErrorCode.GAP, "expected 17")

    async def go() -> None:
        async with serving(refuse) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            assert await stream.receive() == b"refused"
            assert await stream.receive() is None

    run(go())


def test_a_handler_is_cancelled_when_its_client_breaks_the_stream() -> None:
    async def go() -> None:
        entered, left = asyncio.Event(), asyncio.Event()

        async def wait(stream: Stream) -> None:
            try:
                entered.set()
                await asyncio.Event().wait()
            finally:
                left.set()

        async with serving(wait) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            pending = asyncio.create_task(stream.receive())
            await entered.wait()
            stream.cancel()
            await left.wait()
            await fails(result(pending))
            await fails(stream.send(b"x"))
            await fails(stream.receive())

    run(go())


@pytest.mark.parametrize("inside", [True, False])
def test_a_server_can_break_a_stream(inside: bool) -> None:
    async def go() -> None:
        async def hang_up(stream: Stream) -> None:
            await stream.receive()
            if inside:
                stream.cancel()
                await fails(stream.send(b"x"))
            else:
                await result(asyncio.create_task(cancel(stream)))

        async with serving(hang_up) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await stream.send(b"x")
            await fails(stream.receive())

    run(go())


def test_a_stream_that_is_not_read_breaks_and_holds_up_no_other() -> None:
    async def go() -> None:
        async with serving(flood) as (_, endpoint, transport):
            unread = await transport.open_stream(endpoint, "session", TIMEOUT)
            other = await transport.open_stream(endpoint, "push", TIMEOUT)

            async def insist() -> None:
                while True:
                    await other.send(b"x")
                    assert await other.receive() == b"x"
                    await unread.send(b"are you still there?")

            assert "nobody reads" in str(await fails(insist()))

    run(go())


def test_one_stream_too_many_is_told_to_come_later() -> None:
    async def go() -> None:
        async with serving(max_streams=1) as (_, endpoint, transport):
            first = await transport.open_stream(endpoint, "session", TIMEOUT)
            await first.send(b"x")
            assert await first.receive() == b"x"
            second = await transport.open_stream(endpoint, "session", TIMEOUT)
            answer = await busy(second, b"y")
            assert answer is not None
            assert answer.code is ErrorCode.BUSY
            refused = decode(await transport.call(endpoint, "info", b"z", TIMEOUT))
            assert isinstance(refused, Refused)

    run(go())


def test_a_frame_beyond_the_limit_is_not_sent() -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            with pytest.raises(LocalProtocolError, match=str(MAX_FRAME_BYTES + 1)):
                await stream.send(bytes(MAX_FRAME_BYTES + 1))
            assert await transport.call(endpoint, "info", b"ok", TIMEOUT) == b"OK"

    run(go())


STRANGE: dict[str, list[bytes]] = {
    "an oversize message": [HELLO, bytes(MAX_MESSAGE_BYTES + 1)],
    "no greeting": [b""],
    "a wrong greeting": [pack([b"short", False])],
    "the second connection of nothing": [pack([bytes(16), True])],
    "garbage behind the greeting": [HELLO, b"garbage"],
    "a stream opened twice": [HELLO, pack([1, 0, Kind.OPEN, b"info", 1, 1, Kind.OPEN, b"info"])],
}


@pytest.mark.parametrize("messages", STRANGE.values(), ids=STRANGE.keys())
def test_a_stranger_who_breaks_the_rules_of_framing_loses_his_link(messages: list[bytes]) -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport), raw_channel(endpoint.port) as channel:
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            call: Any = channel.stream_stream("/swarm/link")()
            for message in messages:
                await call.write(message)
            assert await call.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            await stream.send(b"others go on")
            assert await stream.receive() == b"others go on"

    run(go())


def test_a_large_frame_takes_a_connection_of_its_own() -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            large = os.urandom(1 << 20)
            for _ in range(4):
                await stream.send(large)
                assert await stream.receive() == large
            assert len(transport.connections) == 2

    run(go())


def test_an_idle_link_is_closed_and_the_next_stream_dials_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "_IDLE_SECONDS", 0.01)

    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await asyncio.wait(transport.connections, timeout=0.1)
            await stream.send(b"kept while it has streams")
            assert await stream.receive() == b"kept while it has streams"
            stream.cancel()
            await asyncio.wait(transport.connections)
            assert await transport.call(endpoint, "info", b"again", TIMEOUT) == b"AGAIN"

    run(go())


def test_a_compressed_frame_is_not_unpacked() -> None:
    """A megabyte can unpack to a gigabyte, long after its size was checked."""

    async def go() -> None:
        async with serving() as (_, endpoint, _), raw_channel(endpoint.port) as channel:
            call: Any = channel.stream_stream("/swarm/link")(
                compression=grpc.Compression.Gzip,
            )

            async def ask() -> None:
                await call.write(bytes(1 << 24))
                await call.read()

            with pytest.raises(grpc.aio.AioRpcError):
                await ask()

    run(go())


def test_a_closed_connection_is_gone_at_once() -> None:
    """Those that waited for the garbage collector stayed up at both ends, for minutes."""

    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            carriers = [weakref.ref(task) for task in transport.connections]
            assert [carrier() is None for carrier in carriers] == [False]
            await transport.close()
            await asyncio.sleep(0)  # the loop's own last word to them
            assert [carrier() is None for carrier in carriers] == [True]

    gc.disable()
    try:
        run(go())
    finally:
        gc.enable()


def test_a_connection_that_is_for_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "grpc.max_connection_idle_ms"
    others = [option for option in rpc._SERVER_OPTIONS if option[0] != name]
    assert len(others) < len(rpc._SERVER_OPTIONS)
    monkeypatch.setattr(rpc, "_SERVER_OPTIONS", [*others, (name, 200)])

    async def go() -> None:
        async with serving() as (_, endpoint, transport), raw_channel(endpoint.port) as channel:
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            async with asyncio.timeout(TIMEOUT):
                await channel.channel_ready()
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            await stream.send(b"this one is for something")
            assert await stream.receive() == b"this one is for something"

    run(go())
