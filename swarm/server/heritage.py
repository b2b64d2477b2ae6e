"""Giving a session's keys and values to another server, and taking them, part by part.

A server that leaves gives; so the client need not send anything again. Parts are small, and each
layer is read or written between two passes, so that others' steps do not wait for a long text.
"""

from __future__ import annotations

import asyncio
from functools import partial

from swarm.errors import (
    ErrorCode,
    LocalProtocolError,
    OutOfPages,
    PeerUnavailable,
    RemoteProtocolError,
)
from swarm.messages import Heritage, Inherit, Message, Refused
from swarm.models.moving import Arrival, Part, can_move, kinds_of, read_layer
from swarm.models.spans import SpanCache
from swarm.models.storage import KvStore
from swarm.server.executor import Executor
from swarm.tensors import from_frame, to_frame
from swarm.transport import Stream
from swarm.wire import decode, encode

_PART_BYTES = 1 << 20  # of keys and values in one frame


async def give(
    stream: Stream, cache: SpanCache, store: KvStore, executor: Executor, timeout: float
) -> None:
    """All that a session of at least one token holds, by a push stream that is attached.

    Returns when the other end has it; each frame and layer may take `timeout` seconds. Raises
    PeerUnavailable, LocalProtocolError.
    """
    if not can_move(cache):
        raise LocalProtocolError("this session keeps more than keys and values")

    async def send(message: Message) -> None:
        async with asyncio.timeout(timeout):
            await stream.send(encode(message))

    padding = None if cache.padding is None else to_frame(cache.padding)
    try:
        await send(Inherit(length=cache.length, padding=padding))
        for layer, kind in kinds_of(cache, store):
            read = partial(read_layer, cache, store, layer, kind, _PART_BYTES)
            async with asyncio.timeout(timeout):
                parts = await executor.call(read)
            for part in parts:
                keys, values = to_frame(part.keys), to_frame(part.values)
                await send(Heritage(layer=layer, start=part.start, keys=keys, values=values))
        async with asyncio.timeout(timeout):
            frame = await stream.receive()
    except TimeoutError:
        raise PeerUnavailable(f"the other server did nothing for {timeout:g} s") from None
    answer = None if frame is None else decode(frame)
    if isinstance(answer, Refused):
        raise PeerUnavailable(f"refused: {answer.message}")
    if not isinstance(answer, Inherit) or answer.length != cache.length:
        raise PeerUnavailable("the other server did not say that it has all")


class Estate:
    """What comes to a session that is still empty."""

    def __init__(
        self, inherit: Inherit, cache: SpanCache, store: KvStore, executor: Executor
    ) -> None:
        """Raises RemoteProtocolError."""
        if not can_move(cache):
            raise RemoteProtocolError(
                ErrorCode.BAD_SPAN, "these blocks keep more than keys and values"
            )
        if inherit.length > cache.max_length:
            raise RemoteProtocolError(
                ErrorCode.TOO_LONG, f"the session was opened for {cache.max_length} positions"
            )
        self.length = inherit.length
        self._padding = None if inherit.padding is None else from_frame(inherit.padding)
        self._arrival = Arrival(cache, store, inherit.length)
        self._executor = executor

    async def add(self, part: Heritage) -> bool:
        """Whether that was all. Raises RemoteProtocolError."""
        frames = part.keys, part.values
        if any(frame.codec != "none" for frame in frames):
            raise RemoteProtocolError(ErrorCode.BAD_TENSOR, "keys and values travel as they are")
        keys, values = map(from_frame, frames)

        def job() -> bool:
            self._arrival.add(Part(part.layer, part.start, keys, values))
            if self._arrival.is_complete:
                self._arrival.finish(self._padding)
            return self._arrival.is_complete

        try:
            return await self._executor.call(job)
        except OutOfPages as error:
            raise RemoteProtocolError(ErrorCode.BUSY, str(error), retry_after=1.0) from None
