"""A session's keys and values as plain tensors, to be carried to another server's pages.

Only what lies in pages can be carried: recurrent states and the like have no form of their own.
All of it belongs to the thread that owns the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.models.cache import PagedLayer, SpanCache
from swarm.models.pages import PAGE
from swarm.models.passes import KindPass, Segment
from swarm.models.storage import Kind, KvStore


class Part(NamedTuple):
    """Keys and values of one layer from position `start` on: `[rows, heads, tokens, head_dim]`."""

    layer: int
    start: int
    keys: Tensor
    values: Tensor


def can_move(cache: SpanCache) -> bool:
    """Whether pages hold all that the session left."""
    held = range(cache.blocks.start, cache.blocks.end)
    return all(isinstance(cache.layers[layer], PagedLayer) for layer in held)


def kinds_of(cache: SpanCache, store: KvStore) -> list[tuple[int, Kind]]:
    """Every layer that is kept in pages, and its kind."""
    return [(layer, kind) for kind in store.kinds(cache.blocks) for layer in store.layers_of(kind)]


def slides(cache: SpanCache, store: KvStore) -> bool:
    """Whether some layers forget what lies far back."""
    return any(kind.window is not None for kind in store.kinds(cache.blocks))


@torch.inference_mode()
def read_layer(
    cache: SpanCache, store: KvStore, layer: int, kind: Kind, positions: range, most: int
) -> list[Part]:
    """What a layer still holds of these positions, on the CPU, in parts of at most `most` bytes (or
    one token). Raises LocalProtocolError if they are not all there any more."""
    if cache.length < positions.stop:
        raise LocalProtocolError("the text went back while it was copied")
    # A segment that has come already: nothing is written, all of it is gathered.
    segment = Segment(cache.tables, positions.stop - 1, 0, cache.batch_size, 1)
    run = KindPass(store, kind, [segment])
    first = run.first_slot(segment)
    skip = max(0, positions.start - first) // PAGE
    before = max(0, positions.start - first - skip * PAGE)
    first += skip * PAGE + before
    keys, values = (part[:, :, before:].to("cpu") for part in run.gather(layer, segment, skip))
    width = max(1, most // max(1, _token_bytes(keys) + _token_bytes(values)))
    return [
        Part(layer, first + at, keys[:, :, at : at + width], values[:, :, at : at + width])
        for at in range(0, keys.shape[2], width)
    ]


def _token_bytes(part: Tensor) -> int:
    return part.nbytes // max(1, part.shape[2])


class Arrival:
    """Fills a cache with tokens `[start, length)` that another server computed. `padding` is bool
    `[rows, length]`, True for real tokens; None: all are.

    Whatever does not fit raises RemoteProtocolError (BAD_TENSOR, GAP): it comes from strangers.
    """

    def __init__(
        self,
        cache: SpanCache,
        store: KvStore,
        start: int,
        length: int,
        padding: Tensor | None = None,
    ) -> None:
        if padding is not None:  # at once, as it is kept until all is here
            shape = (cache.batch_size, length)
            if (padding.shape, padding.dtype) != (shape, torch.bool):
                raise _bad(f"padding is {padding.dtype}{list(padding.shape)}")
        self._cache, self._store, self._length, self._padding = cache, store, length, padding
        self._start: int | None = start  # until the cache was made ready for it
        self._kinds = dict(kinds_of(cache, store))
        self._ends: dict[int, int] = {}  # what came of each layer

    @property
    def is_complete(self) -> bool:
        ends = [self._ends.get(layer, 0) for layer in self._kinds]
        return all(end == self._length for end in ends)

    @torch.inference_mode()
    def add(self, part: Part) -> None:
        """Parts of a layer come in order. Raises OutOfPages, CannotRewind, too."""
        if self._start is not None:
            self._go_back(self._start)
        kind = self._kinds.get(part.layer)
        if kind is None:
            raise _bad(f"layer {part.layer} is not kept in pages here")
        tokens = self._check_shapes(part)
        begin = self._ends.get(part.layer)
        if begin is None:
            begin = self._settle_in(kind, part.start)
        if part.start != begin or not tokens or begin + tokens > self._length:
            raise RemoteProtocolError(
                ErrorCode.GAP,
                f"layer {part.layer} wants positions {begin} to {self._length}, not {tokens} "
                f"from {part.start} on",
                position=begin,
            )
        cache = self._cache
        segment = Segment(cache.tables, begin, 0, cache.batch_size, tokens)
        keys, values = (
            side.transpose(1, 2).flatten(0, 1).to(self._store.device)
            for side in (part.keys, part.values)
        )
        KindPass(self._store, kind, [segment]).write(part.layer, keys, values)
        self._ends[part.layer] = begin + tokens

    def finish(self) -> None:
        """All has come."""
        cache, padding = self._cache, self._padding
        mask = None if padding is None else padding.to(self._store.device)
        cache.commit(self._length - cache.length, mask)

    def _go_back(self, start: int) -> None:
        """Forget what the cache holds from `start` on, and whatever broke off half way."""
        self._start, cache = None, self._cache
        cache.crop(start)
        cache.settle()
        if start:
            cache.make_room(self._length - start)
            self._ends = dict.fromkeys(self._kinds, start)

    def _settle_in(self, kind: Kind, start: int) -> int:
        """Pages for a kind's layers, of which the first one has come: windows begin later."""
        cache, others = self._cache, [k for layer, k in self._kinds.items() if layer in self._ends]
        if kind in others:
            return cache.tables[kind].first * PAGE
        reach = self._length if kind.window is None else kind.window - 1
        if start % PAGE or not 0 <= start <= max(0, self._length - reach):
            raise _bad(f"a layer that begins at {start} lacks what its next token sees")
        cache.receive(self._length, kind, start // PAGE)
        return start

    def _check_shapes(self, part: Part) -> int:
        tokens = part.keys.shape[2] if part.keys.ndim == 4 else 0
        expected = self._store.shapes(part.layer, self._cache.batch_size, tokens)
        found = (tuple(part.keys.shape), tuple(part.values.shape))
        if found != expected or {part.keys.dtype, part.values.dtype} != {self._store.dtype}:
            raise _bad(f"keys and values of layer {part.layer} are {found}, not {expected}")
        return tokens


def _bad(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.BAD_TENSOR, what)
