"""A gRPC server and its strangers, for the tests of the real network."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest

from swarm.certificates import Certificate, issue_certificate
from swarm.errors import (
    PeerUnavailable,
)
from swarm.identity import Identity
from swarm.messages import Refused
from swarm.rpc import RpcServer, RpcTransport, grpc
from swarm.transport import Endpoint, Service, Stream, StreamHandler
from swarm.wire import decode

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


async def result(task: asyncio.Task[Any]) -> Any:
    return await task


async def flood(stream: Stream) -> None:
    while True:
        await stream.send(bytes(100_000))


async def cancel(stream: Stream) -> None:
    stream.cancel()


async def busy(stream: Stream, frame: bytes) -> Refused | None:
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
async def raw_channel(port: int) -> AsyncGenerator[grpc.aio.Channel]:
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
