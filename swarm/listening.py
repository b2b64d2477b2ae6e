"""Serves a web app on a port: what uvicorn leaves open is bounded here, and it ends cleanly.

Strangers connect: how long a request may take to arrive, how long an answer may lie unread, and how
many connections there are is limited by `WebLimits`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import ClassVar, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from swarm.errors import UsageError
from swarm.web import WebApp, WebLimits

_NOTICE_SECONDS = 2.0  # for apps that were told that we stop
_INTERRUPTED = 130  # what shells call a command that Ctrl-C ended


class _Protocol(H11Protocol):
    """uvicorn's connection, which itself would wait for ever for a request that never comes whole,
    and for a reader who does not read; and would take any number of both."""

    limits: ClassVar[WebLimits]
    waiting: ClassVar[dict[_Protocol, None]]  # those without a request, the longest waiting first

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing says: something is unread
        self.waiting[self] = None
        if len(self.connections) > self.limits.connections:
            next(iter(self.waiting)).transport.abort()
        self._hurry()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle = cast(RequestResponseCycle | None, self.cycle)  # None before the first request
        if cycle is None or cycle.response_complete:
            self._hurry()  # and more bytes do not give more time
        else:
            self._calm()
            self.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.waiting[self] = None
            if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
                self._hurry()  # the rest of a body that nobody wants, or the next request

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.waiting.pop(self, None)
        self._calm()
        self._read()

    def _hurry(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.limits.request_seconds, self._too_late)

    def _calm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _too_late(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.send_400_response("The request took too long to arrive.")
        else:
            self.transport.abort()


class _Server(uvicorn.Server):
    """Tells when it listens, and leaves signals to us."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@asynccontextmanager
async def running(app: WebApp, host: str, port: int) -> AsyncGenerator[str]:
    """Serves `app` inside; gives its address, http://HOST:PORT. Port 0 is any free one.

    At the end answers have a moment to be finished. Raises UsageError if it cannot listen there.
    """
    bound = _listen(host, port)
    limits = app.limits
    protocol = type("_Protocol", (_Protocol,), {"limits": limits, "waiting": {}})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # what strangers send is not worth a warning each
        access_log=False,  # it would keep who asked for what
        proxy_headers=False,  # anybody could claim to be anybody
        server_header=False,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=cast(int, limits.stop_seconds + _NOTICE_SECONDS),
        # uvicorn would count requests when their headers are there, too late against those that
        # never are: _Protocol counts connections.
        limit_concurrency=None,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]))
    listening = asyncio.create_task(server.listening.wait())
    try:
        await asyncio.wait((task, listening), return_when=asyncio.FIRST_COMPLETED)
        name, number = bound.getsockname()[:2]
        yield f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
    finally:
        listening.cancel()
        server.should_exit = True
        asyncio.get_running_loop().call_later(limits.stop_seconds, app.stopping.set)
        await task
        bound.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
        with contextlib.ExitStack() as stack:
            stack.callback(bound.close)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    return bound


async def serve(app: WebApp, host: str, port: int, tell: Callable[[str], object]) -> None:
    """Until Ctrl-C or SIGTERM; a second one ends the process at once. `tell` is given one line:
    listening on http://HOST:PORT."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        if stop.is_set():
            os._exit(_INTERRUPTED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    async with running(app, host, port) as url:
        tell(f"listening on {url}")
        await stop.wait()
