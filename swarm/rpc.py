"""The only door to gRPC: streams of frames over TLS with pinned certificates, and their server.

Handlers and callers see `transport.Stream`s and this package's errors, never gRPC's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from swarm.certificates import Certificate, check_certificate, fetch_certificate, target_name
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError, SwarmError, UsageError
from swarm.messages import Refused
from swarm.transport import CallHandler, Endpoint, Service, Stream, StreamHandler, Transport
from swarm.wire import MAX_FRAME_BYTES, encode

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core writes to stderr what we raise

import grpc
import grpc.aio

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Lane = tuple[Endpoint, str]  # pushes do not wait behind other streams to the same peer

_MAX_CHANNELS = 256  # kept for reuse; one that still carries streams lives on without us
_GRPC_ERRORS = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
_EOF: Any = cast(Any, grpc.aio).EOF
_BUSY = encode(
    Refused(code=ErrorCode.BUSY, message="this server has too many streams", retry_after=1.0)
)
_BREAK_TIMEOUT = 1.0  # seconds in which a broken stream's peer is told, if it reads at all

_COMMON_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
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
]
_CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.client_idle_timeout_ms", 60_000),
    # Else all channels to one server share one connection, and steps wait behind bulk.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is not meant for peers
]


class _Pipe:
    """One gRPC stream, either end. Several tasks may send, one may receive.

    A cancelled `receive` loses nothing: the read goes on in a task of its own (+20 us), since gRPC
    would break the stream (client) or lose the frame (server). A cancelled `send` breaks it.
    """

    def __init__(
        self,
        read: Callable[[], Coroutine[Any, Any, Any]],
        write: Callable[[bytes], Coroutine[Any, Any, None]],
        where: str,
    ) -> None:
        self._read = read
        self._write = write
        self._where = where
        self._reading: asyncio.Task[Any] | None = None
        self._turn = asyncio.Lock()  # gRPC takes one write at a time
        self._closed = False  # nothing more will be sent
        self._broken = False

    async def send(self, frame: bytes) -> None:
        async with self._turn:
            if self._closed:
                raise self._gone()
            try:
                await self._write(frame)
            except asyncio.CancelledError:
                self._abandon()
                raise
            except _GRPC_ERRORS as error:
                raise await self._why(error) from error

    async def receive(self) -> bytes | None:
        if self._broken:
            raise self._gone()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        reading = self._reading
        try:
            frame = await asyncio.shield(reading)
        except asyncio.CancelledError:
            if not reading.cancelled():
                raise  # we are cancelled, the read is not
            raise self._gone() from None  # gRPC's way to say so
        except _GRPC_ERRORS as error:
            raise await self._why(error) from error
        if frame is _EOF:
            return None  # for ever: the task is kept
        self._reading = None
        return cast(bytes, frame)

    async def _why(self, error: Exception) -> SwarmError:
        if isinstance(error, grpc.aio.AioRpcError):
            return _translate(error.code(), error.details(), self._where)
        return self._gone()

    def _gone(self) -> PeerUnavailable:
        return PeerUnavailable(f"{self._where}: the stream is closed")

    def _abandon(self) -> None:
        """Whatever still runs is of no interest any more."""
        self._closed = self._broken = True
        if self._reading is not None:
            self._reading.add_done_callback(_forget)
            self._reading.cancel()


class _ClientStream(_Pipe):
    """A stream that we opened."""

    def __init__(self, call: Any, where: str, channel: grpc.aio.Channel) -> None:
        # `call.write` would do more than fail if the peer has ended the stream: it would make all
        # reads fail, too, and a refusal that has arrived could not be read any more.
        super().__init__(call.read, call._cython_call.send_serialized_message, where)
        self._call = call
        self._channel = channel  # gRPC closes a channel that nobody refers to

    async def _why(self, error: Exception) -> SwarmError:
        if self._call.done():  # a write to a stream that has ended does not say why it did
            return _translate(await self._call.code(), await self._call.details(), self._where)
        return await super()._why(error)

    async def finish(self) -> None:
        async with self._turn:
            self._closed = True
            try:
                await self._call.done_writing()
            except _GRPC_ERRORS as error:
                raise await self._why(error) from error

    def cancel(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        super()._abandon()
        self._call.cancel()


class _ServerStream(_Pipe):
    """A stream that a peer opened; a break on its side may also look like its polite end.

    It ends when its handler does, which is also when `finish` and `cancel` have their effect.
    """

    def __init__(self, context: Any) -> None:
        super().__init__(context.read, context.write, f"peer at {context.peer()}")
        self._context = context
        self._handler = asyncio.current_task()

    async def finish(self) -> None:
        self._closed = True

    def cancel(self) -> None:
        self._abandon()
        if self._handler is not None and asyncio.current_task() is not self._handler:
            self._handler.cancel()

    async def end(self, defect: bool) -> None:
        """The handler is over: leave nothing running, and tell the peer if the stream broke."""
        broken = self._broken or defect
        self._abandon()
        if not broken:
            return
        try:
            async with asyncio.timeout(_BREAK_TIMEOUT):
                await self._context.abort(
                    grpc.StatusCode.CANCELLED,
                    "internal error" if defect else "broken by the server",
                )
        except (TimeoutError, grpc.aio.InternalError):
            # The peer has left, or does not read: gRPC tells it as soon as it does.
            raise asyncio.CancelledError from None


class RpcServer:
    """Answers peers with a `Service`, over TLS. An error in a handler ends its stream alone."""

    def __init__(self, service: Service, *, max_streams: int) -> None:
        self._service = service
        self._max_streams = max_streams
        self._running: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None
        self._credentials: grpc.ServerCertificateConfiguration | None = None

    async def start(self, host: str, port: int, certificate: Certificate) -> int:
        """The port it listens on, which is `port` unless that is 0. Raises UsageError."""
        _hush()
        self.rotate(certificate)
        credentials = grpc.dynamic_ssl_server_credentials(
            cast(Any, self._credentials), lambda: cast(Any, self._credentials)
        )
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        stream, call = grpc.stream_stream_rpc_method_handler, grpc.unary_unary_rpc_method_handler
        methods: dict[str, Any] = {
            "session": stream(cast(Any, self._streams(self._service.session))),
            "push": stream(cast(Any, self._streams(self._service.push))),
            "info": call(cast(Any, self._calls(self._service.info))),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("swarm", methods),))
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
        self._credentials = grpc.ssl_server_certificate_configuration(
            [(certificate.key_pem, certificate.pem)]
        )

    async def stop(self, grace: float) -> None:
        """No new streams; those that have not ended after `grace` seconds are cancelled."""
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None
        if self._running:
            await asyncio.wait(self._running)

    def _streams(self, handler: StreamHandler) -> Callable[[Any, Any], Awaitable[None]]:
        async def serve(_: Any, context: Any) -> None:
            stream = _ServerStream(context)
            if not self._enter():
                await stream.send(_BUSY)
                return
            defect = False
            try:
                await handler(stream)
            except SwarmError as error:  # the handler has told the peer what the peer may know
                logger.debug("a stream ended: %s", error)
            except Exception:  # one stranger's stream must not disturb the others
                logger.exception("a defect ended a stream")
                defect = True
            finally:
                await stream.end(defect)

        return serve

    def _calls(self, handler: CallHandler) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def serve(request: bytes, context: Any) -> bytes:
            if not self._enter():
                return _BUSY
            try:
                return await handler(request)
            except Exception:  # as above
                logger.exception("a defect ended a call")
                return encode(Refused(code=ErrorCode.INTERNAL, message="internal error"))

        return serve

    def _enter(self) -> bool:
        """Count the current handler in; False if there are too many already."""
        if len(self._running) >= self._max_streams:
            return False
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True


class RpcTransport(Transport):
    """Dials peers. Belongs to the event loop that it is first used in."""

    def __init__(self) -> None:
        self._channels: dict[_Lane, grpc.aio.Channel] = {}
        self._alive: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        async def dial(channel: grpc.aio.Channel) -> Stream:
            call = channel.stream_stream(f"/swarm/{method}")()
            try:
                await call.wait_for_connection()
            except BaseException:
                call.cancel()
                raise
            return _ClientStream(call, str(endpoint), channel)

        return await self._with_channel(endpoint, method, timeout, dial)

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        async def ask(channel: grpc.aio.Channel) -> bytes:
            return await channel.unary_unary(f"/swarm/{method}")(request)

        return await self._with_channel(endpoint, method, timeout, ask)

    async def close(self) -> None:
        """Breaks every stream."""
        self._channels.clear()
        for channel in list(self._alive):
            await channel.close()

    async def _with_channel(
        self,
        endpoint: Endpoint,
        method: str,
        timeout: float,
        use: Callable[[grpc.aio.Channel], Awaitable[_T]],
    ) -> _T:
        lane = (endpoint, "push" if method == "push" else "session")
        try:
            async with asyncio.timeout(timeout):
                return await use(await self._channel(lane, timeout))
        except TimeoutError:
            self._channels.pop(lane, None)
            raise PeerUnavailable(f"{endpoint}: no answer within {timeout:g} s") from None
        except grpc.aio.AioRpcError as error:
            self._channels.pop(lane, None)  # the next dial starts afresh, without back-off
            raise _translate(error.code(), error.details(), str(endpoint)) from error

    async def _channel(self, lane: _Lane, timeout: float) -> grpc.aio.Channel:
        if lane not in self._channels:
            endpoint = lane[0]
            pem = await fetch_certificate(endpoint.host, endpoint.port, timeout)
            check_certificate(pem, peer_id=endpoint.peer_id, digest=endpoint.certificate_digest)
            if lane not in self._channels:  # somebody may have been quicker
                self._connect(lane, pem)
        channel = self._channels.pop(lane)
        self._channels[lane] = channel  # the least recently used one comes first
        return channel

    def _connect(self, lane: _Lane, pem: bytes) -> None:
        endpoint = lane[0]
        _hush()
        if len(self._channels) >= _MAX_CHANNELS:
            self._channels.pop(next(iter(self._channels)))
        channel = grpc.aio.secure_channel(
            f"dns:///{_address(endpoint.host, endpoint.port)}",
            grpc.ssl_channel_credentials(root_certificates=pem),
            [
                *_CLIENT_OPTIONS,
                ("grpc.ssl_target_name_override", target_name(endpoint.peer_id)),
            ],
        )
        self._channels[lane] = channel
        self._alive.add(channel)


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
    """Silence a false alarm: with several event loops in one process gRPC wakes all of them, and
    those who find nothing to read complain (https://github.com/grpc/grpc/issues/25364)."""
    loop = asyncio.get_running_loop()
    if loop.get_exception_handler() is None:
        loop.set_exception_handler(_without_false_alarms)


def _without_false_alarms(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    poller = "PollerCompletionQueue" in str(context.get("message"))
    if not (poller and isinstance(context.get("exception"), BlockingIOError)):
        loop.default_exception_handler(context)
