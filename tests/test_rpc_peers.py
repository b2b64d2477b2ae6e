"""The real network's peers: pinned certificates, ports, strangers, and those that die."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from swarm import rpc
from swarm.certificates import issue_certificate
from swarm.errors import (
    AuthenticationError,
    UsageError,
)
from swarm.identity import Identity
from swarm.rpc import RpcServer, RpcTransport, grpc
from swarm.transport import Endpoint, Service, Stream
from tests.rpcs import (
    CERTIFICATE,
    IDENTITY,
    TIMEOUT,
    echo,
    endpoint_at,
    fails,
    raw_channel,
    result,
    run,
    serving,
    shout,
)


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
            assert time.monotonic() - started < TIMEOUT
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
            async with raw_channel(endpoint.port) as channel:
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
        # Some begin when others have ended: the end of a loop must not be heard in the rest.
        for done in [threads.submit(run, go()) for _ in range(12)]:
            done.result()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize(
    ("message", "error", "heard"),
    [
        ("callback PollerCompletionQueue._handle_events", BlockingIOError(), False),
        (
            "callback PollerCompletionQueue._handle_events",
            RuntimeError("Event loop is closed"),
            False,
        ),
        ("callback PollerCompletionQueue._handle_events", RuntimeError("something else"), True),
        ("callback of ours", RuntimeError("Event loop is closed"), True),
    ],
)
def test_only_false_alarms_are_silenced(
    caplog: pytest.LogCaptureFixture, message: str, error: Exception, heard: bool
) -> None:
    async def go() -> None:
        async with serving():
            context = {"message": message, "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    run(go())
    assert [message in record.message for record in caplog.records] == [True] * heard


def test_many_who_connect_at_once_do_not_bring_a_server_down() -> None:
    """They did, within 200 to 1,500 handshakes."""
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_alpn_protocols(["h2"])

    def connect(_: int) -> None:
        with (
            socket.create_connection(("127.0.0.1", port), TIMEOUT) as plain,
            client.wrap_socket(plain),
        ):
            pass

    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[0])
            with ThreadPoolExecutor(8) as pool:
                for _ in pool.map(connect, range(1500)):
                    pass
            assert process.poll() is None
        finally:
            process.kill()


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
            async with asyncio.timeout(TIMEOUT):  # by its broken stream, not by keepalives
                await fails(result(pending))
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
