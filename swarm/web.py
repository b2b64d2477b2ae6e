"""What our web apps share: strict headers, bounded requests, one shape of errors, event streams.

`swarm/listening.py` serves them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

_PING_SECONDS = 15.0  # proxies give up on connections that are silent for a minute or half of one

SECURITY_HEADERS: Mapping[str, str] = {
    # No inline script or style, nothing from other hosts, no frames around us.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class WebLimits:
    """What one app grants strangers; times in seconds.

    `idle` is longer than the minute for which proxies keep connections: who closes first loses
    nothing if it is the proxy, and a request if it is us.
    """

    body_bytes: int = 1 << 16
    header_bytes: int = 1 << 14  # request line and headers
    request_seconds: float = 10.0  # from a request's first byte (or the connection) to its headers
    body_seconds: float = 30.0  # from the headers to the end of the body
    unread_seconds: float = 30.0  # an answer may lie in our memory because nobody reads it
    idle_seconds: int = 75  # between two requests of one connection
    connections: int = 512  # half of the descriptors that systems usually grant
    stop_seconds: float = 2.0  # in which answers may be finished after Ctrl-C; then streams end


class HttpProblem(Exception):
    """An answer that is an error, in the shape that OpenAI's clients know."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"message": message, "type": kind, "param": param, "code": code}
        self.retry_after = retry_after

    def response(self) -> Response:
        headers: dict[str, str] = {}
        if self.retry_after is not None:  # whole seconds, and never "at once"
            headers["retry-after"] = str(max(1, -int(-self.retry_after // 1)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse({"error": self.body}, self.status, headers)

    def event(self) -> bytes:
        """The same in the middle of a stream."""
        return event(json.dumps({"error": self.body}))


async def _problem(_request: Request, problem: Exception) -> Response:
    return cast(HttpProblem, problem).response()


async def _http_exception(_request: Request, error: Exception) -> Response:
    """Starlette's own: no such page, no such method."""
    error = cast(HTTPException, error)
    response = HttpProblem(error.status_code, str(error.detail).lower()).response()
    response.headers.update(error.headers or {})
    return response


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _defect(_request: Request, _error: Exception) -> Response:
    message = "something broke here; it is in the log of this server"
    return HttpProblem(500, message, kind="server_error").response()


class WebApp:
    """A Starlette app behind our limits and headers, as an ASGI app.

    routes: of the app. `static` (a folder) serves its files behind them, with index.html at /.
    cors: origins whose pages may read our answers; none by default.
    hosts: the names by which we may be called (None: any). Who listens on loopback without keys
    names these, or any web page could reach us by a name of its own that points here.
    """

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        *,
        static: Path | None = None,
        limits: WebLimits | None = None,
        cors: Sequence[str] = (),
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.limits = limits or WebLimits()
        self.stopping = asyncio.Event()
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        files = [Mount("/", _Files(directory=static, html=True))] if static is not None else []
        self._app = Starlette(
            routes=[*routes, *files],
            middleware=[
                Middleware(
                    CORSMiddleware,
                    allow_origins=cors,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    expose_headers=["retry-after"],
                )
            ]
            if cors
            else [],
            exception_handlers={
                HttpProblem: _problem,
                HTTPException: _http_exception,
                ClientDisconnect: _gone,
                Exception: _defect,
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "neither web sockets nor lifespans are switched on"
        request = _Bounded(receive, self.limits, self.stopping)

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        problem = self._refusal(Headers(scope=scope))
        app = self._app if problem is None else problem.response()
        await app(scope, request.receive, respond)

    def _refusal(self, headers: Headers) -> HttpProblem | None:
        """What can be said before anything is read."""
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._hosts is not None and name.strip("[]") not in self._hosts:
            return HttpProblem(421, "this server does not answer to that host name", code="host")
        length = headers.get("content-length", "0")
        if len(length) > 18 or int(length) > self.limits.body_bytes:  # h11 lets only digits pass
            return _too_large(self.limits)
        return None


def _too_large(limits: WebLimits) -> HttpProblem:
    message = f"the request is larger than the {limits.body_bytes:,} bytes that are allowed here"
    return HttpProblem(413, message, code="request_too_large")


class _Files(StaticFiles):
    """Files of the package: browsers may keep them, but ask whether they have changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


@dataclass(slots=True)
class _Bounded:
    """The messages of one request: a body of limited size in limited time, then its end.

    When we stop, an app that waits for its client to leave hears that it has.
    """

    _receive: Receive
    limits: WebLimits
    stopping: asyncio.Event
    _taken: int = 0
    _complete: bool = False
    _deadline: float = field(default=0.0)

    async def receive(self) -> Message:
        if self._complete:
            return await self._disconnected()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self.limits.body_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            late = f"the request did not arrive within {self.limits.body_seconds:g} s"
            raise HttpProblem(408, late, code="timeout") from None
        self._taken += len(message.get("body", b""))
        if self._taken > self.limits.body_bytes:
            raise _too_large(self.limits)
        self._complete = not message.get("more_body", False)
        return message

    async def _disconnected(self) -> Message:
        tasks = [
            asyncio.ensure_future(self._receive()),
            asyncio.create_task(self.stopping.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        return {"type": "http.disconnect"}


def event(data: str, name: str | None = None) -> bytes:
    """One server-sent event; `data` may have several lines."""
    lines = [f"event: {name}"] if name else []
    return "\n".join([*lines, *(f"data: {line}" for line in data.split("\n")), "\n"]).encode()


class EventStream(Response):
    """Server-sent events: what `content` yields (see `event`) until it ends or its reader leaves.

    A comment is sent when nothing else is for a while. `farewell` is sent last when we stop.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[bytes], *, farewell: bytes = b"") -> None:
        self._content = content
        self._farewell = farewell
        self._last = 0.0  # when something was sent
        self.status_code, self.background = 200, None
        # The last is for nginx, which would collect the events otherwise.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_left(receive))
        try:
            while not (pump.done() or gone.done()):
                pause = self._last + _PING_SECONDS - loop.time()
                if pause <= 0:
                    await self._send(send, b":\n\n")
                else:
                    await asyncio.wait(
                        (pump, gone), timeout=pause, return_when=asyncio.FIRST_COMPLETED
                    )
            last = b"" if pump.done() else self._farewell
        finally:
            for task in (pump, gone):
                task.cancel()
            await asyncio.wait((pump, gone))
        if pump.done() and not pump.cancelled():
            pump.result()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._content):
            async for piece in self._content:
                await self._send(send, piece)

    async def _send(self, send: Send, body: bytes) -> None:
        self._last = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
