"""The only door to gRPC: streams of frames over TLS with pinned certificates, and their server.

Handlers and callers see `transport.Stream`s and this package's errors, never gRPC's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from swarm.certificates import Certificate, check_certificate, fetch_certificate, target_name
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError, SwarmError, UsageError
from swarm.messages import Refused
from swarm.mux import MAX_MESSAGE_BYTES, Channel, Gauge, Kind, Link
from swarm.sparing import Sparing
from swarm.transport import Endpoint, Service, Stream, StreamHandler, Transport
from swarm.wire import encode, pack, unpack

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core writes to stderr what we raise

import grpc.aio

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Read = Callable[[], Coroutine[Any, Any, Any]]
_Write = Callable[[bytes], Coroutine[Any, Any, None]]

_MAX_LINKS = 256  # kept for reuse; one that still carries streams lives on without us
_IDLE_SECONDS = 60.0  # after one to two of these a link without streams is closed
_HELLO_SECONDS = 10.0  # in which a connection must say what it is for
_HELLO_BYTES = 64
_UNREAD_BYTES = 512 << 20  # that came and that no handler has taken yet, over all links
_GRPC_ERRORS = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
_EOF: Any = cast(Any, grpc.aio).EOF
_BUSY = encode(
    Refused(code=ErrorCode.BUSY, message="this server has too many streams", retry_after=1.0)
)

_COMMON_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A compressed frame may unpack to any size after its length was checked: take none.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.per_message_decompression", 0),
    # Notice a peer whose cable was pulled; one that was killed is noticed at once.
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.http2.ping_timeout_ms", 15_000),  # the larger of the two counts; its default is 60 s
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # else a second server on the same port takes half of the calls
    ("grpc.keepalive_time_ms", 30_000),
    # Must be below the client's keepalive time, or it is sent away for "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),  # a link has a stream; others cost 100 kB each
]
_CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.client_idle_timeout_ms", 60_000),
    # Else all channels to one server share one connection, and a link's second one is none.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is not meant for peers
]


class _Pipe:
    """One gRPC stream, either end, for a link: one task reads, one writes, both end with it."""

    def __init__(self, read: _Read, write: _Write, where: str) -> None:
        self._read, self._write, self.where = read, write, where

    async def send(self, message: bytes) -> None:
        try:
            await self._write(message)
        except _GRPC_ERRORS as error:
            raise await self._why(error) from error

    async def receive(self) -> bytes | None:
        try:
            message = await self._read()
        except _GRPC_ERRORS as error:
            raise await self._why(error) from error
        return None if message is _EOF else cast(bytes, message)

    async def _why(self, error: Exception) -> SwarmError:
        if isinstance(error, grpc.aio.AioRpcError):
            return _translate(error.code(), error.details(), self.where)
        return PeerUnavailable(f"{self.where}: the stream is closed")


class _DialledPipe(_Pipe):
    """A stream that we opened."""

    def __init__(self, channel: grpc.aio.Channel, where: str) -> None:
        self._channel = channel
        self.call: Any = channel.stream_stream("/swarm/link")()
        # `call.write` would do more than fail if the peer has ended the stream: it would make all
        # reads fail, too, and a refusal that has arrived could not be read any more.
        super().__init__(self.call.read, self.call._cython_call.send_serialized_message, where)

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()

    async def _why(self, error: Exception) -> SwarmError:
        if self.call.done():  # a write to a stream that has ended does not say why it did
            return _translate(await self.call.code(), await self.call.details(), self.where)
        return await super()._why(error)


class RpcServer:
    """Answers peers with a `Service`, over TLS. An error in a handler ends its stream alone."""

    def __init__(self, service: Service, *, max_streams: int) -> None:
        self._service, self._max_streams = service, max_streams
        self._complaints = Sparing(logger)
        self._running: set[asyncio.Task[Any]] = set()
        self._links: dict[bytes, Link] = {}
        self.gauge = Gauge(_UNREAD_BYTES)
        self._server: grpc.aio.Server | None = None
        self._credentials: grpc.ServerCertificateConfiguration | None = None

    async def start(self, host: str, port: int, certificate: Certificate) -> int:
        """The port it listens on, which is `port` unless that is 0. Raises UsageError."""
        _hush()
        self.rotate(certificate)
        credentials = grpc.dynamic_ssl_server_credentials(self._fresh(), self._fresh)
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        link: Any = grpc.stream_stream_rpc_method_handler(cast(Any, self._link))
        ours = grpc.method_handlers_generic_handler("swarm", {"link": link})
        server.add_generic_rpc_handlers((ours,))
        try:
            bound = server.add_secure_port(_address(host, port), credentials)
        except RuntimeError as error:
            raise UsageError(
                f"cannot listen on {_address(host, port)}: the port is in use or the address is "
                "not this machine's; choose another --port or --host"
            ) from error
        await server.start()
        self._server = server
        return bound

    def rotate(self, certificate: Certificate) -> None:
        """From now on new connections see this certificate; the present ones go on."""
        pair = (certificate.key_pem, certificate.pem)
        self._credentials = grpc.ssl_server_certificate_configuration([pair])

    def _fresh(self) -> Any:
        """Once. gRPC asks before every handshake, and frees what it had before when it gets some,
        though other handshakes may be about to use that: it crashed when many connected at once."""
        fresh, self._credentials = self._credentials, None
        return fresh

    async def stop(self, grace: float) -> None:
        """No new streams; those that have not ended after `grace` seconds are cancelled."""
        server, self._server = self._server, None
        if server is None:
            return
        self._max_streams = 0
        if self._running and grace:
            await asyncio.wait(self._running, timeout=grace)
        await server.stop(0)
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _link(self, _: Any, context: Any) -> None:
        """One connection of a link, as long as it stands."""
        pipe = _Pipe(context.read, context.write, f"peer at {context.peer()}")
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                link_id, bulk = _read_hello(await pipe.receive())
            if bulk:
                if link_id not in self._links:
                    raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "no such link")
                await self._links[link_id].carry(pipe, bulk=True)
                return
            if link_id in self._links:
                raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "this link is up already")
            if len(self._links) >= self._max_streams:
                raise RemoteProtocolError(ErrorCode.BUSY, "too many links")
            self._links[link_id] = link = Link(pipe.where, self.gauge, accept=self._accept)
            try:
                await link.carry(pipe)
            finally:
                del self._links[link_id]
        except TimeoutError:
            logger.debug("%s said nothing", pipe.where)
        except RemoteProtocolError as error:
            self._complaints.warning("%s: %s", pipe.where, str(error), code=str(error.code))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except SwarmError as error:
            logger.debug("a link ended: %s", error)

    def _accept(self, method: str, stream: Channel) -> None:
        service = self._service
        methods = {"session": service.session, "push": service.push, "info": self._info}
        handler = methods.get(method)
        if handler is None:
            stream.cancel()
        elif len(self._running) >= self._max_streams:
            stream.post(Kind.DATA, _BUSY)
            stream.close()
        else:
            task = stream.handler = asyncio.create_task(_serve(handler, stream))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _info(self, stream: Stream) -> None:
        if (question := await stream.receive()) is not None:
            await stream.send(await self._service.info(question))


async def _serve(handler: StreamHandler, stream: Channel) -> None:
    try:
        await handler(stream)
    except SwarmError as error:  # the handler has told the peer what the peer may know
        logger.debug("a stream ended: %s", error)
    except Exception:  # one stranger's stream must not disturb the others
        logger.exception("a defect ended a stream")
        stream.cancel("internal error")
    finally:
        stream.close()


class RpcTransport(Transport):
    """Dials peers. Belongs to the event loop that it is first used in.

    All streams to a peer share one link, which is closed when it has had none for a while.
    """

    def __init__(self) -> None:
        self._links: dict[Endpoint, asyncio.Task[Link]] = {}
        self.gauge = Gauge(_UNREAD_BYTES)
        self.connections: set[asyncio.Task[None]] = set()  # those that stand
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        dialling = self._links.pop(endpoint, None)
        if dialling is None or not _is_usable(dialling):
            dialling = self._spawn(self._dial(endpoint, timeout))
        self._links[endpoint] = dialling  # the least recently used one comes first
        if len(self._links) > _MAX_LINKS:  # it lives on until it is idle
            self._links.pop(next(iter(self._links)))
        try:
            async with asyncio.timeout(timeout):
                return (await asyncio.shield(dialling)).open(method)
        except TimeoutError:
            raise PeerUnavailable(f"{endpoint}: no answer within {timeout:g} s") from None

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        stream = await self.open_stream(endpoint, method, timeout)
        try:
            async with asyncio.timeout(timeout):
                await stream.send(request)
                answer = await stream.receive()
        except TimeoutError:
            raise PeerUnavailable(f"{endpoint}: no answer within {timeout:g} s") from None
        finally:
            stream.cancel()
        if answer is None:
            raise PeerUnavailable(f"{endpoint}: no answer")
        return answer

    async def close(self) -> None:
        """Breaks every stream."""
        self._links.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _dial(self, endpoint: Endpoint, timeout: float) -> Link:
        link_id = secrets.token_bytes(16)
        pipe = await _connect(endpoint, timeout, pack([link_id, False]))

        async def add_bulk() -> None:
            try:
                second = await _connect(endpoint, timeout, pack([link_id, True]))
            except SwarmError as error:
                logger.info("no second connection: %s", error)  # one will do
            else:
                await self._carry(link, second, bulk=True)

        link = Link(str(endpoint), self.gauge, want_bulk=lambda: self._spawn(add_bulk()))
        self._spawn(self._carry(link, pipe))
        return link

    async def _carry(self, link: Link, pipe: _DialledPipe, *, bulk: bool = False) -> None:
        """As long as the link lives and has streams."""
        carrying = asyncio.create_task(link.carry(pipe, bulk=bulk))
        carrying.add_done_callback(_forget)
        self.connections.add(carrying)
        idle = False
        try:
            while not carrying.done():
                await asyncio.wait({carrying}, timeout=_IDLE_SECONDS)
                if idle and link.idle:
                    link.lose(PeerUnavailable(f"{link.where}: the connection was idle"))
                idle = link.idle
        finally:
            carrying.cancel()
            await asyncio.wait({carrying})
            self.connections.discard(carrying)
            await pipe.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_forget)
        return task


def _is_usable(dialling: asyncio.Task[Link]) -> bool:
    if not dialling.done():
        return True
    return not dialling.cancelled() and not dialling.exception() and not dialling.result().error


async def _connect(endpoint: Endpoint, timeout: float, hello: bytes) -> _DialledPipe:
    """A connection of its own, to a peer that shows the right certificate. Raises SwarmError."""
    _hush()
    where = str(endpoint)
    try:
        async with asyncio.timeout(timeout):
            pem = await fetch_certificate(endpoint.host, endpoint.port, timeout)
            check_certificate(pem, peer_id=endpoint.peer_id, digest=endpoint.certificate_digest)
            name = ("grpc.ssl_target_name_override", target_name(endpoint.peer_id))
            channel = grpc.aio.secure_channel(
                f"dns:///{_address(endpoint.host, endpoint.port)}",
                grpc.ssl_channel_credentials(root_certificates=pem),
                [*_CLIENT_OPTIONS, name],
            )
            pipe = _DialledPipe(channel, where)
            try:
                await pipe.call.wait_for_connection()
                await pipe.send(hello)
            except BaseException:
                await pipe.close()
                raise
            return pipe
    except TimeoutError:
        raise PeerUnavailable(f"{where}: no answer within {timeout:g} s") from None
    except grpc.aio.AioRpcError as error:
        raise _translate(error.code(), error.details(), where) from error


def _read_hello(message: bytes | None) -> tuple[bytes, bool]:
    """The first message of a connection: the link's id, and whether it is the second of it."""
    match unpack(message or b"", _HELLO_BYTES):
        case [bytes() as link_id, bool() as bulk] if len(link_id) == 16:
            return link_id, bulk
        case _:
            raise RemoteProtocolError(ErrorCode.BAD_FRAME, "a link begins with [id, second]")


def _translate(code: grpc.StatusCode, details: str | None, where: str) -> SwarmError:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return RemoteProtocolError(ErrorCode.OVERSIZE, f"{where}: {details}")
    reason = (details or "").rpartition(": ")[2]  # "failed to …; last error: …: Connection refused"
    return PeerUnavailable(f"{where}: {reason or 'the stream is closed'}")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _forget(task: asyncio.Task[Any]) -> None:
    """Look at a task's error, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()


def _hush() -> None:
    """Silence false alarms: with several event loops in one process gRPC wakes all of them, and
    some find nothing (https://github.com/grpc/grpc/issues/25364) or a loop's that has ended."""
    loop = asyncio.get_running_loop()
    if loop.get_exception_handler() is None:
        loop.set_exception_handler(_without_false_alarms)


def _without_false_alarms(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    poller = "PollerCompletionQueue" in str(context.get("message"))
    error = context.get("exception")
    false = isinstance(error, BlockingIOError) or str(error) == "Event loop is closed"
    if not (poller and false):
        loop.default_exception_handler(context)
