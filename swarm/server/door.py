"""What answers on the port: the handler, or as long as there is none, a request to come later."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from swarm.errors import ErrorCode, PeerUnavailable
from swarm.messages import Refused
from swarm.server.handler import Handler
from swarm.transport import Stream
from swarm.wire import encode

_LOADING = Refused(code=ErrorCode.BUSY, message="this server is still loading", retry_after=5.0)
_MOVING = Refused(code=ErrorCode.DRAINING, message="this server moves to other blocks; try another")


class Door:
    """Lets strangers in to `handler`, and shows them out when it goes."""

    def __init__(self) -> None:
        self.handler: Handler | None = None
        self._inside: dict[asyncio.Task[object], Stream] = {}

    async def session(self, stream: Stream) -> None:
        handler = self.handler
        await (self._let_in(stream, handler.session(stream)) if handler else _wait(stream))

    async def push(self, stream: Stream) -> None:
        handler = self.handler
        await (self._let_in(stream, handler.push(stream)) if handler else _wait(stream))

    async def info(self, request: bytes) -> bytes:
        return await self.handler.info(request) if self.handler else encode(_LOADING)

    async def close(self) -> None:
        """Tell whoever is inside to go elsewhere; nobody is when this returns."""
        self.handler = None
        for stream in self._inside.values():
            stream.send_nowait(encode(_MOVING))
        for task in self._inside:
            task.cancel()
        if self._inside:
            await asyncio.wait(list(self._inside))

    async def _let_in(self, stream: Stream, visit: Awaitable[None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._inside[task] = stream
        try:
            await visit
        finally:
            del self._inside[task]


async def _wait(stream: Stream) -> None:
    with suppress(PeerUnavailable):
        await stream.send(encode(_LOADING))
        await stream.finish()
