"""Streams of hivemind's connection to the daemon, from whose senders nobody takes more than was
bargained for."""

from __future__ import annotations

import asyncio
from typing import Any

_MAX_MESSAGE = 1 << 18  # bytes


class Bounded:
    """As much of an `asyncio.StreamReader` as hivemind uses."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readexactly(self, count: int) -> bytes:
        """Raises ValueError, before a byte of too long a message is read."""
        if count > _MAX_MESSAGE:
            raise ValueError(f"a message of {count} bytes; at most {_MAX_MESSAGE} are allowed")
        return await self._reader.readexactly(count)


def bounded_calls(call: Any, seconds: float) -> Any:
    """hivemind's way to open streams, given so many seconds to connect."""

    async def bounded(peer_id: Any, name: str) -> Any:
        async with asyncio.timeout(seconds):
            info, reader, writer = await call(peer_id, name)
        return info, Bounded(reader), writer

    return bounded
