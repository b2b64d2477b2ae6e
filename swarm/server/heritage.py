"""Giving a session's keys and values to another server, and taking them, part by part.

A server that leaves gives; so the client need not send anything again. Parts are small, and each
layer is read or written between two passes, so that others' steps do not wait for a long text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from swarm.errors import (
    CannotRewind,
    ErrorCode,
    LocalProtocolError,
    OutOfPages,
    PeerUnavailable,
    RemoteProtocolError,
    SwarmError,
)
from swarm.loop import heed_cancelling
from swarm.messages import HandedOver, Heritage, Inherit, Message, PushTarget, Refused
from swarm.models.moving import Arrival, Part, can_move, kinds_of, read_layer, slides
from swarm.models.spans import SpanCache
from swarm.models.storage import Kind, KvStore
from swarm.server.executor import Executor
from swarm.tensors import from_frame, to_frame
from swarm.transport import Stream
from swarm.wire import decode, encode

_PART_BYTES = 1 << 20  # of keys and values in one frame


Give = Callable[[PushTarget, SpanCache, range], Awaitable[None]]
"""Copies these positions to a session elsewhere (`give`, with a stream). Raises SwarmError."""


class Giver:
    """Copies what a session holds to another one: most of it while steps go on, then the rest."""

    def __init__(self, cache: SpanCache, store: KvStore, give: Give) -> None:
        self._cache, self._store, self._give = cache, store, give
        self._target = b""  # the session that gets it
        self._promised = self._sound = 0  # positions that it is to have, and that it has for good
        self._copying: asyncio.Future[None] | None = None

    def changed(self, position: int) -> None:
        """From there on the text is another one."""
        self._promised, self._sound = min(self._promised, position), min(self._sound, position)

    async def ahead(self, target: PushTarget, length: int) -> HandedOver:
        """The first `length` positions, and no step waits for it. Between two of them it begins."""
        if self._copying is not None or slides(self._cache, self._store):
            return HandedOver(position=0)  # windows may have slid on before all is there
        self._target, self._promised, self._sound = target.session_id, length, 0
        self._copying = asyncio.get_running_loop().create_future()
        try:
            answer = await self._hand_over(target, range(length))
            self._sound = self._promised if answer.position is not None else 0
        finally:
            self._copying.set_result(None)
            self._copying = None
        return answer

    async def rest(self, target: PushTarget, length: int) -> HandedOver:
        """All of the `length` positions that is not there yet; no step may be on its way."""
        if self._copying is not None:
            await self._copying
        sound = self._sound if target.session_id == self._target else 0
        return await self._hand_over(target, range(min(sound, max(0, length - 1)), length))

    async def _hand_over(self, target: PushTarget, positions: range) -> HandedOver:
        try:
            if positions:
                await self._give(target, self._cache, positions)
        except SwarmError as error:
            heed_cancelling(error)
            return HandedOver(position=None, message=str(error)[:200])
        return HandedOver(position=positions.stop)


async def give(
    stream: Stream,
    cache: SpanCache,
    positions: range,
    store: KvStore,
    executor: Executor,
    timeout: float,
) -> None:
    """These positions, of at least one token, by a push stream that is attached.

    Returns when the other end has it; each frame and layer may take `timeout` seconds. Raises
    PeerUnavailable, LocalProtocolError.
    """
    if not can_move(cache):
        raise LocalProtocolError("this session keeps more than keys and values")

    async def send(message: Message) -> None:
        async with asyncio.timeout(timeout):
            await stream.send(encode(message))

    padding = None if cache.padding is None else to_frame(cache.padding[:, : positions.stop])
    try:
        await send(Inherit(start=positions.start, length=positions.stop, padding=padding))
        for layers in _groups(cache, store, positions):
            async with asyncio.timeout(timeout):
                parts = await executor.call(partial(_read, cache, store, layers, positions))
            for part in parts:
                keys, values = to_frame(part.keys), to_frame(part.values)
                await send(Heritage(layer=part.layer, start=part.start, keys=keys, values=values))
        async with asyncio.timeout(timeout):
            frame = await stream.receive()
    except TimeoutError:
        raise PeerUnavailable(f"the other server did nothing for {timeout:g} s") from None
    answer = None if frame is None else decode(frame)
    if isinstance(answer, Refused):
        raise PeerUnavailable(f"refused: {answer.message}")
    if not isinstance(answer, Inherit) or answer.length != positions.stop:
        raise PeerUnavailable("the other server did not say that it has all")


def _groups(
    cache: SpanCache, store: KvStore, positions: range
) -> Iterable[Sequence[tuple[int, Kind]]]:
    """Layers that are read between the same two passes: all of them, if the positions are few."""
    layers = kinds_of(cache, store)
    few = cache.batch_size * len(positions) * store.token_bytes <= _PART_BYTES
    return [layers] if few else ([layer] for layer in layers)


def _read(
    cache: SpanCache, store: KvStore, layers: Sequence[tuple[int, Kind]], positions: range
) -> list[Part]:
    return [
        part
        for layer, kind in layers
        for part in read_layer(cache, store, layer, kind, positions, _PART_BYTES)
    ]


class Estate:
    """What comes to a session that has computed nothing itself."""

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
        self.is_complete = False
        self._revoked = False
        padding = None if inherit.padding is None else from_frame(inherit.padding)
        self._arrival = Arrival(cache, store, inherit.start, inherit.length, padding)
        self._ends = dict.fromkeys((layer for layer, _ in kinds_of(cache, store)), 0)
        self._parts: list[Part] = []  # that are put down together, between the same two passes
        self._executor = executor

    def revoke(self) -> None:
        """Take nothing any more: it begins anew."""
        self._revoked = True

    async def add(self, part: Heritage) -> bool:
        """Whether that was all. Raises RemoteProtocolError."""
        frames = part.keys, part.values
        if any(frame.codec != "none" for frame in frames):
            raise RemoteProtocolError(ErrorCode.BAD_TENSOR, "keys and values travel as they are")
        keys, values = map(from_frame, frames)
        self._parts.append(Part(part.layer, part.start, keys, values))
        if part.layer in self._ends and keys.ndim == 4:
            self._ends[part.layer] = part.start + keys.shape[2]
        few = len(self._parts) < len(self._ends) and _bytes(self._parts) < _PART_BYTES
        if few and any(end < self.length for end in self._ends.values()):
            return False
        parts, self._parts = self._parts, []

        def job() -> bool:
            if self._revoked:
                raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "heritage of an older inherit")
            for part in parts:
                self._arrival.add(part)
            if self._arrival.is_complete:
                self._arrival.finish()
            return self._arrival.is_complete

        try:
            self.is_complete = await self._executor.call(job)
            return self.is_complete
        except OutOfPages as error:
            raise RemoteProtocolError(ErrorCode.BUSY, str(error), retry_after=1.0) from None
        except CannotRewind as error:
            raise RemoteProtocolError(ErrorCode.CANNOT_REWIND, str(error)) from None


def _bytes(parts: Sequence[Part]) -> int:
    return sum(part.keys.nbytes + part.values.nbytes for part in parts)
