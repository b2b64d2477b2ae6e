"""The real network: frames arrive, breaks are noticed, and strangers disturb nobody."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from swarm import rpc
from swarm.certificates import Certificate, issue_certificate
from swarm.errors import (
    AuthenticationError,
    ErrorCode,
    PeerUnavailable,
    RemoteProtocolError,
    UsageError,
)
from swarm.identity import Identity
from swarm.messages import Refused
from swarm.rpc import RpcServer, RpcTransport, grpc
from swarm.transport import Endpoint, Service, Stream, StreamHandler
from swarm.wire import MAX_FRAME_BYTES, decode

IDENTITY = Identity.ephemeral()
CERTIFICATE = issue_certificate(IDENTITY, time.time())
TIMEOUT = 10.0


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test in a loop of its own; nothing of it may survive."""

    async def whole() -> None:
        async with asyncio.timeout(60):
            await coroutine
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if rest:  # gRPC's own last callbacks
                await asyncio.wait(rest)

    asyncio.run(whole())


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


async def shout(request: bytes) -> bytes:
    return request.upper()


def endpoint_at(port: int, certificate: Certificate = CERTIFICATE) -> Endpoint:
    return Endpoint("127.0.0.1", port, IDENTITY.peer_id, certificate.digest)


@contextlib.asynccontextmanager
async def serving(
    session: StreamHandler = echo, *, max_streams: int = 16
) -> AsyncGenerator[tuple[RpcServer, Endpoint, RpcTransport]]:
    server = RpcServer(Service(session, echo, shout), max_streams=max_streams)
    port = await server.start("127.0.0.1", 0, CERTIFICATE)
    transport = RpcTransport()
    try:
        yield server, endpoint_at(port), transport
    finally:
        await transport.close()
        await server.stop(0)


async def fails(awaitable: Coroutine[Any, Any, Any]) -> PeerUnavailable:
    with pytest.raises(PeerUnavailable) as caught:
        await awaitable
    return caught.value


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
            await fails(_flood(stream))
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
            await fails(_result(pending))
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
                await _result(asyncio.create_task(_cancel(stream)))

        async with serving(hang_up) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await stream.send(b"x")
            await fails(stream.receive())

    run(go())


def test_a_client_that_does_not_read_holds_up_only_its_own_stream() -> None:
    async def go() -> None:
        gave_up = asyncio.Event()

        async def flood(stream: Stream) -> None:
            try:
                async with asyncio.timeout(1):
                    while True:
                        await stream.send(bytes(1 << 20))
            except TimeoutError:
                gave_up.set()

        async with serving(flood, max_streams=1) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await gave_up.wait()
            other = await transport.open_stream(endpoint, "push", TIMEOUT)
            while (await _busy(other, b"x")) is not None:  # until the first is given up for good
                other = await transport.open_stream(endpoint, "push", TIMEOUT)
            await fails(_drain(stream))

    run(go())


def test_one_stream_too_many_is_told_to_come_later() -> None:
    async def go() -> None:
        async with serving(max_streams=1) as (_, endpoint, transport):
            first = await transport.open_stream(endpoint, "session", TIMEOUT)
            await first.send(b"x")
            assert await first.receive() == b"x"
            second = await transport.open_stream(endpoint, "session", TIMEOUT)
            answer = await _busy(second, b"y")
            assert answer is not None
            assert answer.code is ErrorCode.BUSY
            refused = decode(await transport.call(endpoint, "info", b"z", TIMEOUT))
            assert isinstance(refused, Refused)

    run(go())


def test_a_frame_beyond_the_limit_is_refused_on_both_sides() -> None:
    async def huge(stream: Stream) -> None:
        if await stream.receive() == b"send me too much":
            await stream.send(bytes(MAX_FRAME_BYTES + 1))

    async def go() -> None:
        async with serving(huge) as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            for too_much in (bytes(MAX_FRAME_BYTES + 1), b"send me too much"):
                stream = await transport.open_stream(endpoint, "session", TIMEOUT)
                await stream.send(too_much)
                with pytest.raises(RemoteProtocolError) as caught:
                    await stream.receive()
                assert caught.value.code is ErrorCode.OVERSIZE
            assert await transport.call(endpoint, "info", b"ok", TIMEOUT) == b"OK"

    run(go())


def test_a_compressed_frame_is_not_unpacked() -> None:
    """A megabyte can unpack to a gigabyte, long after its size was checked."""

    async def go() -> None:
        async with serving() as (_, endpoint, _), _raw_channel(endpoint.port) as channel:
            call: Any = channel.stream_stream("/swarm/session")(
                compression=grpc.Compression.Gzip,
            )

            async def ask() -> None:
                await call.write(bytes(1 << 24))
                await call.read()

            with pytest.raises(grpc.aio.AioRpcError):
                await ask()

    run(go())


def test_only_the_pinned_certificate_of_the_right_peer_will_do() -> None:
    async def go() -> None:
        other = issue_certificate(IDENTITY, time.time())
        async with serving() as (_, endpoint, transport):
            for wrong in (
                replace(endpoint, certificate_digest=other.digest),
                replace(endpoint, peer_id=Identity.ephemeral().peer_id),
            ):
                with pytest.raises(AuthenticationError):
                    await transport.open_stream(wrong, "session", TIMEOUT)
                with pytest.raises(AuthenticationError):
                    await transport.call(wrong, "info", b"", TIMEOUT)

    run(go())


def test_a_certificate_that_changes_after_it_was_looked_at_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fetch(host: str, port: int, timeout: float) -> bytes:
        return CERTIFICATE.pem

    async def go() -> None:
        async with serving() as (server, endpoint, transport):
            server.rotate(issue_certificate(IDENTITY, time.time()))
            monkeypatch.setattr(rpc, "fetch_certificate", fetch)
            await fails(transport.open_stream(endpoint, "session", TIMEOUT))

    run(go())


def test_a_new_certificate_leaves_open_streams_alone_and_new_ones_need_it() -> None:
    async def go() -> None:
        fresh = issue_certificate(IDENTITY, time.time())
        async with serving() as (server, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            server.rotate(fresh)
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            renewed = endpoint_at(endpoint.port, fresh)
            assert await transport.call(renewed, "info", b"x", TIMEOUT) == b"X"
            stranger = RpcTransport()
            with pytest.raises(AuthenticationError):
                await stranger.call(endpoint, "info", b"x", TIMEOUT)

    run(go())


def test_a_taken_port_is_one_sentence() -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, _):
            second = RpcServer(Service(echo, echo, shout), max_streams=1)
            with pytest.raises(UsageError, match=f"127.0.0.1:{endpoint.port}.*--port"):
                await second.start("127.0.0.1", endpoint.port, CERTIFICATE)
            await second.stop(0)

    run(go())


def test_after_a_stop_handlers_are_over_and_the_port_is_free() -> None:
    async def go() -> None:
        left: list[str] = []

        async def stay(stream: Stream) -> None:
            await stream.send(b"in")
            try:
                await asyncio.Event().wait()
            finally:
                left.append("out")

        async with serving(stay) as (server, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            assert await stream.receive() == b"in"
            await server.stop(0.05)
            assert left == ["out"]
            await fails(stream.receive())
            second = RpcServer(Service(echo, echo, shout), max_streams=1)
            port = await second.start("127.0.0.1", endpoint.port, CERTIFICATE)
            assert await transport.call(endpoint_at(port), "info", b"x", TIMEOUT) == b"X"
            await second.stop(0)

    run(go())


def test_nobody_there_is_known_at_once_and_a_silent_one_in_time() -> None:
    async def go() -> None:
        transport = RpcTransport()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = endpoint_at(silent.getsockname()[1])
            started = time.monotonic()
            await fails(transport.open_stream(endpoint, "session", 0.2))
            assert time.monotonic() - started < 2
        await fails(transport.open_stream(endpoint, "session", TIMEOUT))
        await transport.close()

    run(go())


def test_garbage_on_the_port_disturbs_nobody() -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
                _, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
                writer.write(garbage)
                await writer.drain()
                writer.close()
            async with _raw_channel(endpoint.port) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary("/swarm/nothing")(b"")
            assert await transport.call(endpoint, "info", b"ok", TIMEOUT) == b"OK"

    run(go())


def test_a_proxy_in_the_environment_is_not_for_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            assert await transport.call(endpoint, "info", b"x", TIMEOUT) == b"X"

    run(go())


def test_several_loops_in_one_process_do_not_disturb_each_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        async with serving() as (_, endpoint, transport):
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            for i in range(300):
                await stream.send(bytes([i % 256]))
                assert await stream.receive() == bytes([i % 256])

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(run, go()) for _ in range(3)]:
            done.result()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_killed_server_is_noticed_at_once_and_a_stopped_one_is_not_waited_for() -> None:
    async def go() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _SERVER, stdout=subprocess.PIPE
        )
        transport = RpcTransport()
        try:
            assert process.stdout is not None
            port, peer_id, digest = (await process.stdout.readline()).decode().split()
            endpoint = Endpoint("127.0.0.1", int(port), peer_id, bytes.fromhex(digest))
            stream = await transport.open_stream(endpoint, "session", TIMEOUT)
            await stream.send(b"x")
            assert await stream.receive() == b"x"

            process.send_signal(signal.SIGSTOP)
            pending = asyncio.create_task(stream.receive())
            await fails(RpcTransport().open_stream(endpoint, "push", 0.2))
            await fails(transport.call(endpoint, "info", b"", 0.2))
            assert not pending.done()
            process.send_signal(signal.SIGCONT)
            await stream.send(b"y")
            assert await pending == b"y"

            pending = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            process.kill()
            started = time.monotonic()
            await fails(_result(pending))
            assert time.monotonic() - started < 1
            await fails(stream.send(b"z"))
            await fails(transport.open_stream(endpoint, "session", TIMEOUT))
        finally:
            await transport.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    run(go())


_SERVER = """
import asyncio, time
from swarm.certificates import issue_certificate
from swarm.identity import Identity
from swarm.rpc import RpcServer
from swarm.transport import Service

async def echo(stream):
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)

async def main():
    identity = Identity.ephemeral()
    certificate = issue_certificate(identity, time.time())
    server = RpcServer(Service(echo, echo, None), max_streams=9)
    port = await server.start("127.0.0.1", 0, certificate)
    print(port, identity.peer_id, certificate.digest.hex(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def _result(task: asyncio.Task[Any]) -> Any:
    return await task


async def _flood(stream: Stream) -> None:
    while True:
        await stream.send(bytes(1000))


async def _drain(stream: Stream) -> None:
    while await stream.receive() is not None:
        pass


async def _cancel(stream: Stream) -> None:
    stream.cancel()


async def _busy(stream: Stream, frame: bytes) -> Refused | None:
    """The refusal that comes back, or None if the frame itself does."""
    with contextlib.suppress(PeerUnavailable):  # it may have ended already
        await stream.send(frame)
    answer = await stream.receive()
    assert answer is not None
    if answer == frame:
        return None
    message = decode(answer)
    assert isinstance(message, Refused)
    return message


@contextlib.asynccontextmanager
async def _raw_channel(port: int) -> AsyncGenerator[grpc.aio.Channel]:
    """A stranger who keeps none of our limits."""
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{port}",
        grpc.ssl_channel_credentials(root_certificates=CERTIFICATE.pem),
        [("grpc.ssl_target_name_override", CERTIFICATE.target_name)],
    )
    try:
        yield channel
    finally:
        await channel.close()
