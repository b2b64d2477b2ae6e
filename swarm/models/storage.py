"""The memory behind the pages of a span: slabs of keys and values, within a hard budget of bytes.

Slabs are made when pages run out and given up when others need the room, so that kinds of layers
(full, sliding, or those of a sub-span) which nobody uses now cost nothing.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarm.errors import LocalProtocolError, OutOfPages
from swarm.models.pages import PAGE, SLACK, Growth, PagePool, PageTable
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = 1 << 30  # bytes, until somebody sets `KvStore.budget`
_SMALLEST, _LARGEST = 64, 8  # a slab takes between a 64th and an 8th of the budget
_AHEAD = 2  # times what the sessions on a part of the blocks may need at most is taken for them


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of a token; `window` is how far its last token sees."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None = None

    @property
    def numbers(self) -> int:
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class StateShape:
    """Bytes that another kind of layer keeps per row: fixed, and for every token."""

    fixed: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that share page tables: those of one reach in one sub-span."""

    blocks: BlockRange
    window: int | None


class Slab:
    """Some pages of a kind: per layer keys and values, `[pages, heads, PAGE, dim]`."""

    def __init__(self, pages: range, layers: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.pages = pages
        self.layers = layers
        self.nbytes = sum(part.nbytes for pair in layers.values() for part in pair)


class _Shelf:
    """All slabs of one kind, and who has pages in them."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.pool = PagePool()
        self.slabs: list[Slab] = []  # by page number
        self.tables: dict[PageTable, int] = {}  # and how many pages each may need
        self.next_page = 0


class KvStore:
    """Belongs to the thread that owns the device; others may read `budget`, `taken` and `used`."""

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        states: Mapping[int, StateShape],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.budget = DEFAULT_BUDGET
        self.taken = 0  # bytes of slabs and states
        self._layers = layers
        self._states = states
        self.dtype, self.device = dtype, device
        numbers = sum(shape.numbers for shape in layers.values()) * dtype.itemsize
        # What one more token of one row in all blocks needs.
        self.token_bytes = max(1, numbers + sum(shape.per_token for shape in states.values()))
        self.readings: dict[tuple[Kind, int], Any] = {}  # of the last pass, by tokens per row
        self.recordings: dict[Any, Any] = {}  # forwards for passes in these slabs (replay.py)
        self._shelves: dict[Kind, _Shelf] = {}
        self._charged = 0

    # Sizes, in bytes -------------------------------------------------------------------------

    def page_bytes(self, kind: Kind) -> int:
        numbers = sum(self._layers[layer].numbers for layer in self.layers_of(kind))
        return numbers * PAGE * self.dtype.itemsize

    def session_bytes(self, blocks: BlockRange, rows: int, tokens: int) -> int:
        """What a session of so many tokens needs at most, but for a long step through a window."""
        total = self.state_bytes(blocks, rows, tokens)
        for kind in self.kinds(blocks):
            total += rows * _pages(kind, tokens) * self.page_bytes(kind)
        return total

    def state_bytes(self, blocks: BlockRange, rows: int, tokens: int) -> int:
        """What layers that are not kept in pages need."""
        shapes = [shape for layer, shape in self._states.items() if _within(layer, blocks)]
        return rows * sum(shape.fixed + shape.per_token * tokens for shape in shapes)

    @property
    def used(self) -> int:
        """Bytes that sessions hold: pages and states."""
        shelves = list(self._shelves.values())
        return self._charged + sum(shelf.pool.used * shelf.page_bytes for shelf in shelves)

    def count_pages(self) -> tuple[int, int]:
        """Pages in use, and free ones in the memory that was taken."""
        pools = [shelf.pool for shelf in list(self._shelves.values())]
        return sum(pool.used for pool in pools), sum(pool.free for pool in pools)

    # Kinds -----------------------------------------------------------------------------------

    def kinds(self, blocks: BlockRange) -> list[Kind]:
        windows = {s.window: None for layer, s in self._layers.items() if _within(layer, blocks)}
        return [Kind(blocks, window) for window in windows]

    def layers_of(self, kind: Kind) -> list[int]:
        return [
            layer
            for layer, shape in self._layers.items()
            if _within(layer, kind.blocks) and shape.window == kind.window
        ]

    def shapes(self, layer: int, rows: int, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the keys and the values of so many tokens in a layer that is kept in pages."""
        shape = self._layers[layer]
        return (
            (rows, shape.key_heads, tokens, shape.key_dim),
            (rows, shape.value_heads, tokens, shape.value_dim),
        )

    @property
    def is_plain(self) -> bool:
        """Whether all layers are alike: kept in pages, and without windows."""
        windows = {shape.window for shape in self._layers.values()}
        return windows == {None} and not self._states

    def slabs(self, kind: Kind) -> list[Slab]:
        return self._shelves[kind].slabs

    def open(self, kind: Kind, rows: int, tokens: int) -> PageTable:
        """For a session of at most so many tokens."""
        if kind not in self._shelves:
            self._shelves[kind] = _Shelf(self.page_bytes(kind))
        shelf = self._shelves[kind]
        table = PageTable(shelf.pool, rows, kind.window)
        shelf.tables[table] = rows * _pages(kind, tokens)
        return table

    def close(self, kind: Kind, table: PageTable) -> None:
        table.release()
        self._shelves[kind].tables.pop(table, None)

    # Room ------------------------------------------------------------------------------------

    def grow(self, kind: Kind, table: PageTable, start: int, end: int) -> None:
        """Give every row of `table` pages of its own for slots `[start, end)`.

        Raises OutOfPages, having changed nothing that counts.
        """
        self._provide(kind, table.needs(start, end))
        growth = table.grow(start, end)
        if growth.copies or growth.wipes:
            self._arrange(kind, growth)

    def charge(self, nbytes: int) -> None:
        """Count what a session keeps outside pages. Raises OutOfPages."""
        while self.taken + nbytes > self.budget:
            if not self._give_up_a_slab():
                raise self._full()
        self.taken += nbytes
        self._charged += nbytes

    def refund(self, nbytes: int) -> None:
        self.taken -= nbytes
        self._charged -= nbytes

    def _provide(self, kind: Kind, pages: int) -> None:
        """Have as many free pages. Raises OutOfPages."""
        shelf = self._shelves[kind]
        while shelf.pool.free < pages:
            each = shelf.page_bytes
            held = sum(len(slab.pages) for slab in shelf.slabs)
            least, most = (max(1, self.budget // part // each) for part in (_SMALLEST, _LARGEST))
            left = (self.budget - self.taken) // each
            if self.device.type == "cuda" and not held:
                least = max(least, left // 2)  # passes within one slab can be replayed
            count = min(max(least, min(held, most)), left)
            if not self._is_whole(kind):
                # A few tokens in each of many sub-spans must not take all memory from others.
                wanted = _AHEAD * sum(shelf.tables.values()) - held
                count = min(count, max(wanted, pages - shelf.pool.free))
            if count > 0 and self._add_slab(kind, shelf, count):
                continue
            if not self._give_up_a_slab(but=shelf):
                raise self._full()

    def _is_whole(self, kind: Kind) -> bool:
        """Whether it has all layers of its reach that are here."""
        alike = [shape for shape in self._layers.values() if shape.window == kind.window]
        return len(self.layers_of(kind)) == len(alike)

    def _add_slab(self, kind: Kind, shelf: _Shelf, count: int) -> bool:
        """False if the device has not as much memory as it was thought to have."""
        try:
            with torch.inference_mode(False):
                layers = {layer: self._empty(layer, count) for layer in self.layers_of(kind)}
        except torch.OutOfMemoryError:
            logger.warning("the cache budget is %d bytes, but memory ended before", self.budget)
            return False
        slab = Slab(range(shelf.next_page, shelf.next_page + count), layers)
        shelf.next_page += count
        shelf.slabs.append(slab)
        shelf.pool.add(slab.pages)
        self.taken += slab.nbytes
        return True

    def _empty(self, layer: int, pages: int) -> tuple[Tensor, Tensor]:
        """On a CPU the system gives memory to such tensors only when it is written to."""
        shape = self._layers[layer]
        keys = (pages, shape.key_heads, PAGE, shape.key_dim)
        values = (pages, shape.value_heads, PAGE, shape.value_dim)
        return (
            torch.empty(keys, dtype=self.dtype, device=self.device),
            torch.empty(values, dtype=self.dtype, device=self.device),
        )

    def _give_up_a_slab(self, but: _Shelf | None = None) -> bool:
        for shelf in self._shelves.values():
            for slab in shelf.slabs if shelf is not but else ():
                if not any(shelf.pool.uses(page) for page in slab.pages):
                    shelf.slabs.remove(slab)
                    shelf.pool.remove(slab.pages)
                    self.taken -= slab.nbytes
                    self.readings.clear()  # or its tensors would live on in there
                    self.recordings.clear()
                    return True
        return False

    def _full(self) -> OutOfPages:
        return OutOfPages(f"{self.used} of {self.budget} bytes of key-value cache are in use")

    def _arrange(self, kind: Kind, growth: Growth) -> None:
        slabs = self._shelves[kind].slabs
        for (source, target), pairs in _by_slab(slabs, growth.copies).items():
            parts = torch.tensor(pairs, device=self.device).unbind(1)
            for layer, old in source.layers.items():
                for there, here in zip(target.layers[layer], old, strict=True):
                    there.index_copy_(0, parts[1], here.index_select(0, parts[0]))
        for (slab, _), pairs in _by_slab(slabs, [(page, page) for page in growth.wipes]).items():
            pages = torch.tensor([page for page, _ in pairs], device=self.device)
            for pair in slab.layers.values():
                for part in pair:
                    part.index_fill_(0, pages, 0)

    def check_integrity(self) -> None:
        """Raises LocalProtocolError unless all pages and bytes are accounted for."""
        taken = self._charged
        for kind, shelf in self._shelves.items():
            shelf.pool.check_integrity(shelf.tables)
            if shelf.pool.free + shelf.pool.used != sum(len(slab.pages) for slab in shelf.slabs):
                raise LocalProtocolError(f"pages of {kind} are missing")
            taken += sum(slab.nbytes for slab in shelf.slabs)
        if not taken == self.taken <= self.budget:
            raise LocalProtocolError(
                f"{taken} bytes in slabs, {self.taken} of {self.budget} counted"
            )


def place(slabs: Sequence[Slab], page: int) -> tuple[Slab, int]:
    """The slab that holds `page`, and its number in there."""
    slab = slabs[bisect_right(slabs, page, key=lambda slab: slab.pages.start) - 1]
    return slab, page - slab.pages.start


def _by_slab(
    slabs: Sequence[Slab], pairs: Iterable[tuple[int, int]]
) -> dict[tuple[Slab, Slab], list[tuple[int, int]]]:
    found: dict[tuple[Slab, Slab], list[tuple[int, int]]] = {}
    for one, two in pairs:
        (slab, page), (other, its_page) = place(slabs, one), place(slabs, two)
        found.setdefault((slab, other), []).append((page, its_page))
    return found


def _pages(kind: Kind, tokens: int) -> int:
    """Of a row of so many tokens, at most."""
    if kind.window is not None:
        tokens = min(tokens, kind.window + SLACK + PAGE)
    return -(-tokens // PAGE)


def _within(layer: int, blocks: BlockRange) -> bool:
    return blocks.start <= layer < blocks.end
