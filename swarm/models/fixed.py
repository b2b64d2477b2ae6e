"""Decode passes of a fixed shape: all that differs from one to the next is numbers in one tensor.

Hence the forward of one such pass can be captured (CUDA graphs) or compiled, and run for others
(models/replay.py). Rows' pages are gathered side by side, which costs copies where many are read,
and few calls: what takes the time on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarm.models.attention import SharedMask, SharedPass
from swarm.models.pages import PAGE
from swarm.models.passes import Segment
from swarm.models.scoring import Scoring, attend
from swarm.models.storage import Kind, KvStore, Slab


@dataclass(frozen=True, slots=True)
class Shape:
    """Of passes that one forward serves. They have up to `rows` rows of one new token each, which
    see up to `pages` pages per kind of layers, all in that kind's one slab of `slabs`."""

    rows: int
    pages: tuple[int, ...]
    kinds: tuple[Kind, ...]
    slabs: tuple[Slab, ...]

    @property
    def sizes(self) -> list[int]:
        """How many numbers there are of each sort: rows' owners, places, and for each kind pages
        and offsets that are written, where the first page's text begins, and pages to be read."""
        sizes = [self.rows, self.rows]
        for pages in self.pages:
            sizes += [self.rows, self.rows, self.rows, self.rows * pages]
        return sizes


def shape_of(store: KvStore, segments: Sequence[Segment], widths: Sequence[int]) -> Shape | None:
    """The smallest that has room for a pass; None if that is not of this sort."""
    rows = sum(segment.rows for segment in segments)
    width = next((width for width in widths if width >= rows), None)
    kinds = tuple(segments[0].tables)
    if width is None or any(
        segment.tokens != 1 or segment.mask is not None or tuple(segment.tables) != kinds
        for segment in segments
    ):
        return None
    slabs: list[Slab] = []
    pages: list[int] = []
    for kind in kinds:
        held = [segment.tables[kind].rows for segment in segments]
        slab = _slab_of(store.slabs(kind), held)
        if slab is None:
            return None
        slabs.append(slab)
        pages.append(_rounded(max(len(row) for rows in held for row in rows)))
    return Shape(width, tuple(pages), kinds, tuple(slabs))


def _slab_of(slabs: Sequence[Slab], held: Sequence[list[list[int]]]) -> Slab | None:
    """That has all of these pages."""
    low = min(min(row) for rows in held for row in rows)
    high = max(max(row) for rows in held for row in rows)
    return next((slab for slab in slabs if low in slab.pages and high in slab.pages), None)


def _rounded(pages: int) -> int:
    """Up to a power of four (at least 4): few shapes, and one text seldom meets another one."""
    rounded = 4
    while rounded < pages:
        rounded *= 4
    return rounded


def numbers_of(shape: Shape, segments: Sequence[Segment]) -> list[int]:
    """A pass's numbers, as `Shape.sizes` has them. Rows that nobody has do the first one's work
    again, to the same effect."""
    rows = [(segment, row) for segment in segments for row in range(segment.rows)]
    spare = shape.rows - len(rows)
    owners = [*range(len(rows)), *[0] * spare]
    numbers = owners + [rows[owner][0].past for owner in owners]
    for kind, slab, most in zip(shape.kinds, shape.slabs, shape.pages, strict=True):
        first_page, tables = slab.pages.start, [segment.tables[kind] for segment, _ in rows]
        pages = [
            [page - first_page for page in table.rows[row]]
            for table, (_, row) in zip(tables, rows, strict=True)
        ]
        written: list[int] = []
        for table, row, (segment, _) in zip(tables, pages, rows, strict=True):
            written.append(row[segment.past // PAGE - table.first])
        numbers += [written[owner] for owner in owners]
        numbers += [rows[owner][0].past % PAGE for owner in owners]
        numbers += [tables[owner].first * PAGE for owner in owners]
        for owner in owners:
            row = pages[owner]
            numbers += row
            numbers += row[-1:] * (most - len(row))
    return numbers


class _Kind:
    """One kind of layers in a pass: int64 on the device."""

    def __init__(self, slab: Slab, width: int, parts: Sequence[Tensor]) -> None:
        self.slab = slab
        self.written, self.offset, self.first = parts[:3]  # [rows] each
        self.pages = parts[3].view(width, -1)  # [rows, pages]


class FixedPass(SharedPass):
    """A pass whose `numbers` (int64, on the device) tell all that its shape leaves open."""

    def __init__(self, store: KvStore, shape: Shape, numbers: Tensor) -> None:
        super().__init__(layers=[])
        parts = numbers.split(shape.sizes)
        self.owner, self.place = parts[:2]
        self._kinds: dict[int, _Kind] = {}
        for index, (kind, slab) in enumerate(zip(shape.kinds, shape.slabs, strict=True)):
            mine = _Kind(slab, shape.rows, parts[2 + 4 * index : 6 + 4 * index])
            self._kinds |= dict.fromkeys(store.layers_of(kind), mine)

    @property
    def now(self) -> _Kind:
        return self._kinds[self.layer]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[1, heads, rows, head_dim]`."""
        self.layer = layer_idx
        kind = self.now
        for held, new in zip(kind.slab.layers[layer_idx], (key_states, value_states), strict=True):
            # The same numbers for the same place, whoever comes last.
            rows = new[0].transpose(0, 1).index_select(0, self.owner)
            held[kind.written, :, kind.offset] = rows
        return key_states, value_states

    def mask(self, visible: Callable[..., Any], local_size: int | None) -> FixedMask:
        return FixedMask(self, visible)


class FixedMask(SharedMask):
    def __init__(self, work: FixedPass, visible: Callable[..., Any]) -> None:
        self._work, self._visible = work, visible
        self._added: dict[_Kind, Tensor] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        work = self._work
        kind = work.now
        if kind not in self._added:
            self._added[kind] = self._add(kind, query.dtype)
        keys, values = (_side_by_side(held, kind.pages) for held in kind.slab.layers[work.layer])
        rows = query[0].transpose(0, 1)[:, :, None]
        return attend(rows, (keys, values), self._added[kind], scoring).transpose(0, 1)

    def _add(self, kind: _Kind, dtype: torch.dtype) -> Tensor:
        """To scores: `[rows, 1, 1, slots]`."""
        slots = torch.arange(kind.pages.shape[1] * PAGE, device=kind.first.device)
        slots = (slots + kind.first[:, None])[:, None, None]
        places = self._work.place[:, None, None, None]
        seen = self._visible(0, 0, places, slots) & (slots <= places)
        return torch.zeros((), dtype=dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )


def _side_by_side(held: Tensor, pages: Tensor) -> Tensor:
    """Copies of pages of `[…, heads, PAGE, dim]`: `[rows, heads, slots, dim]`."""
    heads, dim = held.shape[1], held.shape[3]
    every = torch.arange(heads, device=pages.device)[:, None]
    index = (pages[:, None] * heads + every).flatten()
    copies = held.view(-1, PAGE * dim).index_select(0, index)
    return copies.view(pages.shape[0], heads, -1, dim)
