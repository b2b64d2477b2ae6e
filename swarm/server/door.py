"""What answers on the port: the handler, or as long as there is none yet, a request to wait."""

from __future__ import annotations

from contextlib import suppress

from swarm.errors import ErrorCode, PeerUnavailable
from swarm.messages import Refused
from swarm.server.handler import Handler
from swarm.transport import Stream
from swarm.wire import encode

_LOADING = Refused(code=ErrorCode.BUSY, message="this server is still loading", retry_after=5.0)


class Door:
    """Answers on the port for the handler, as long as there is none yet."""

    def __init__(self) -> None:
        self.handler: Handler | None = None

    async def session(self, stream: Stream) -> None:
        await (self.handler.session(stream) if self.handler else self._not_yet(stream))

    async def push(self, stream: Stream) -> None:
        await (self.handler.push(stream) if self.handler else self._not_yet(stream))

    async def info(self, request: bytes) -> bytes:
        return await self.handler.info(request) if self.handler else encode(_LOADING)

    async def _not_yet(self, stream: Stream) -> None:
        with suppress(PeerUnavailable):
            await stream.send(encode(_LOADING))
            await stream.finish()
