"""Where a pass's new tokens go and which pages its rows read: index arrays, made once per pass.

Decode rows read their pages where they lie. Pages of all rows are sorted by number, and stretches
of consecutive ones (runs) become one batched product each, whoever owns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.models.pages import PAGE, PageTable
from swarm.models.storage import Kind, KvStore, Slab, place

_Index = tuple[Tensor | int, slice, Tensor | int]

LAUNCHES = {"cuda"}  # devices where a call costs more than the copy of some pages
_COPIED = 32  # pages that are copied at most to save one call. Not measured: 0.1 to 0.4 us each
_MANY = 4  # runs from which on that is worth it
SHORT = 8  # tokens per row up to which a step reads pages in place, instead of gathering them


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's share of a pass: `rows * tokens` consecutive tokens from `start` on.

    `past` tokens per row came before. `mask` is bool `[rows, past + tokens]`, None = no padding.
    """

    tables: dict[Kind, PageTable]
    past: int
    start: int
    rows: int
    tokens: int
    mask: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.rows * self.tokens

    @property
    def total(self) -> int:
        return self.past + self.tokens


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64. Nobody waits until the device has done what is queued there, as for a plain copy."""
    made = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


@dataclass(frozen=True, slots=True)
class Run:
    """Pages `[first, last)` of a slab serve as items `[begin, end)`."""

    slab: Slab
    first: int
    last: int
    begin: int
    end: int


class Reading:
    """What rows of `tokens` new tokens each read: an item is one page as one row sees it.

    owner `[items]`: the row. slots `[items, PAGE]`: positions in that row's text. by_row `[items]`
    and offsets `[rows]`: the items of each row. widest `[rows * n]`: the same as a rectangle,
    with some twice. `in_order`: items are rows. The tables' versions tell whether all this
    still holds in the next pass.
    """

    def __init__(
        self, slabs: Sequence[Slab], tables: Sequence[PageTable], tokens: int, device: torch.device
    ) -> None:
        self.tables = list(tables)
        self.versions = [table.version for table in tables]
        self.tokens = tokens
        self._factors: dict[tuple[int, int], list[tuple[Tensor, int, int]]] = {}
        rows = [(table.first, row) for table in tables for row in table.rows]
        items = self._sorted(rows)
        self.runs = _runs(slabs, [page for page, _, _ in items])
        self._pages = self._scattered([page for page, _, _ in items], device)
        counts = [len(pages) for _, pages in rows]
        self.rows, self.items = len(rows), len(items)
        starts = [sum(counts[:index]) for index in range(len(counts))]
        place_of = [0] * len(items)
        for index, (_, row, number) in enumerate(items):
            place_of[starts[row] + number] = index
        most = range(max(counts))
        numbers = [rows[row][0] + number for _, row, number in items]
        self.reach = (max(numbers) + 1) * PAGE  # slots, of the longest row
        self.slots = to_device(numbers, device)[:, None] * PAGE + torch.arange(PAGE, device=device)
        self.owner = to_device([row for _, row, _ in items], device)
        self.by_row = to_device(place_of, device)
        self.offsets = to_device(starts, device)
        self.in_order = len(items) == len(rows) and place_of == list(range(len(items)))
        widest = [
            place_of[start + min(number, count - 1)]
            for start, count in zip(starts, counts, strict=True)
            for number in most
        ]
        self.widest = to_device(widest, device)

    def _scattered(self, pages: list[int], device: torch.device) -> Tensor | None:
        """Where many products of few pages each would cost more calls than the pages are worth,
        their numbers in the one slab that has them."""
        slabs, runs = {id(run.slab) for run in self.runs}, len(self.runs)
        if device.type not in LAUNCHES or len(slabs) > 1:
            return None
        if runs <= _MANY or len(pages) > _COPIED * runs:
            return None
        first = self.runs[0].slab.pages.start
        return to_device([page - first for page in pages], device)

    def factors(self, layer: int, which: int) -> list[tuple[Tensor, int, int]]:
        """Keys transposed (0) or values (1) of every run, `[pages * heads, …]`, and the items they
        serve as. Views, kept for as long as the runs hold; or copies of them all as one run."""
        if self._pages is not None:
            held = self.runs[0].slab.layers[layer][which].index_select(0, self._pages).flatten(0, 1)
            return [(held if which else held.transpose(1, 2), 0, self.items)]
        if (layer, which) not in self._factors:
            found: list[tuple[Tensor, int, int]] = []
            for run in self.runs:
                held = run.slab.layers[layer][which][run.first : run.last].flatten(0, 1)
                found.append((held if which else held.transpose(1, 2), run.begin, run.end))
            self._factors[layer, which] = found
        return self._factors[layer, which]

    def add_up(self, parts: Tensor) -> Tensor:
        """`[items, n]` to `[rows, n]`: the sum of each row's items (of nobody else's: NaN stay
        where they are)."""
        if self.in_order:
            return parts
        if self.rows == 1:
            return parts.sum(0, keepdim=True)
        return torch.embedding_bag(parts, self.by_row, self.offsets, False, 0)[0]

    @staticmethod
    def _sorted(rows: Sequence[tuple[int, list[int]]]) -> list[tuple[int, int, int]]:
        """(page, row, number in the row); pages that several rows share come once per stretch."""
        seen: dict[int, int] = {}
        items: list[tuple[int, int, int, int]] = []
        for row, (_, pages) in enumerate(rows):
            for number, page in enumerate(pages):
                seen[page] = turn = seen.get(page, -1) + 1
                items.append((turn, page, row, number))
        items.sort()
        return [item[1:] for item in items]

    def holds_for(self, tables: Sequence[PageTable], tokens: int) -> bool:
        return (
            tokens == self.tokens
            and len(tables) == len(self.tables)
            and all(a is b for a, b in zip(tables, self.tables, strict=True))
            and [table.version for table in tables] == self.versions
        )


@dataclass(slots=True)
class Group:
    """Rows of a pass that have as many new tokens; `take` finds theirs among all, None = all."""

    reading: Reading
    segments: list[Segment]
    take: Tensor | None

    def places(self, device: torch.device) -> Tensor:
        """int64 `[rows, tokens]`: where in its row's text each new token stands."""
        past = [segment.past for segment in self.segments for _ in range(segment.rows)]
        first = to_device(past, device)[:, None]
        if self.reading.tokens == 1:
            return first
        return first + torch.arange(self.reading.tokens, device=device)


class KindPass:
    """One pass as the layers of one kind see it. `segments` follow each other, and are `alone` if
    the pass holds no others."""

    def __init__(
        self, store: KvStore, kind: Kind, segments: Sequence[Segment], *, alone: bool = True
    ) -> None:
        self.kind = kind
        self._alone = alone
        self.device = store.device
        self.slabs = store.slabs(kind)
        self._readings = store.readings
        self.segments = segments
        self.writes = self._find_places()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put `[N, heads, dim]` where the packed tokens belong; others' are left out."""
        if not self._alone:
            mine = slice(self.segments[0].start, self.segments[-1].end)
            keys, values = keys[mine], values[mine]
        for slab, take, index in self.writes:
            for held, new in zip(slab.layers[layer], (keys, values), strict=True):
                held[index] = new if take is None else new[take]

    def _find_places(self) -> list[tuple[Slab, Tensor | None, _Index]]:
        pages: list[int] = []
        offsets: list[int] = []
        for segment in self.segments:
            table = segment.tables[self.kind]
            for row in table.rows:
                at = segment.past
                while at < segment.total:
                    end = min(segment.total, (at // PAGE + 1) * PAGE)
                    pages += [row[at // PAGE - table.first]] * (end - at)
                    offsets += range(at % PAGE, at % PAGE + end - at)
                    at = end
        low, high = min(pages), max(pages)
        writes: list[tuple[Slab, Tensor | None, _Index]] = []
        for slab in self.slabs:
            first, last = slab.pages.start, slab.pages.stop
            if first <= low and high < last:
                return [(slab, None, self._index(first, pages, offsets))]
            if mine := [at for at, page in enumerate(pages) if first <= page < last]:
                part = self._index(first, [pages[at] for at in mine], [offsets[at] for at in mine])
                writes.append((slab, to_device(mine, self.device), part))
        return writes

    def _index(self, first: int, pages: list[int], offsets: list[int]) -> _Index:
        local = [page - first for page in pages] if first else pages
        if len(local) == 1:  # plain numbers take half the time there
            return local[0], slice(None), offsets[0]
        return to_device(local, self.device), slice(None), to_device(offsets, self.device)

    def groups(self) -> list[Group]:
        """The rows with few new tokens, by how many."""
        by_tokens: dict[int, list[Segment]] = {}
        for segment in self.segments:
            if segment.tokens <= SHORT:
                by_tokens.setdefault(segment.tokens, []).append(segment)
        return [self._group(tokens, members) for tokens, members in by_tokens.items()]

    def _group(self, tokens: int, members: list[Segment]) -> Group:
        tables = [segment.tables[self.kind] for segment in members]
        reading = self._readings.get((self.kind, tokens))
        if reading is None or not reading.holds_for(tables, tokens):
            reading = Reading(self.slabs, tables, tokens, self.device)
            self._readings[self.kind, tokens] = reading
        if self._alone and len(members) == len(self.segments):
            return Group(reading, members, None)
        packed = [place for segment in members for place in range(segment.start, segment.end)]
        return Group(reading, members, to_device(packed, self.device))

    def gather(self, layer: int, segment: Segment, skip: int = 0) -> tuple[Tensor, Tensor]:
        """Copies of a session's keys and values, `[rows, heads, total - first_slot, dim]`, without
        so many pages in front."""
        table = segment.tables[self.kind]
        room = len(table.rows[0]) - skip
        left = segment.total - self.first_slot(segment) - skip * PAGE
        if self.device.type in LAUNCHES:
            keys, values = self._side_by_side(layer, [row[skip:] for row in table.rows])
            return keys[:, :, :left], values[:, :, :left]
        runs = [_runs(self.slabs, row[skip:]) for row in table.rows]
        copies: list[Tensor] = []
        for which in (0, 1):
            like = self.slabs[0].layers[layer][which]
            heads, dim = like.shape[1], like.shape[3]
            copy = like.new_empty(segment.rows, heads, room, PAGE, dim)
            for row, parts in enumerate(runs):
                for run in parts:
                    held = run.slab.layers[layer][which][run.first : run.last]
                    copy[row, :, run.begin : run.end] = held.transpose(0, 1)
            copies.append(copy.flatten(2, 3)[:, :, :left])
        return copies[0], copies[1]

    def rectangle(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of all rows' keys and values side by side, `[rows, heads, width, dim]`. What is
        behind a row's text is finite, or that row's own, and must be masked."""
        rows = [row for segment in self.segments for row in segment.tables[self.kind].rows]
        return self._side_by_side(layer, rows)

    def _side_by_side(self, layer: int, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        most = max(len(row) for row in rows)
        pages = [row[min(at, len(row) - 1)] for row in rows for at in range(most)]
        copies: list[Tensor] = []
        for which in (0, 1):
            parts: list[Tensor] = []
            if len(self.slabs) == 1:
                held, first = self.slabs[0].layers[layer][which], self.slabs[0].pages.start
                index = to_device([page - first for page in pages], self.device)
                parts.append(held.index_select(0, index))
            else:
                for run in _runs(self.slabs, pages):
                    parts.append(run.slab.layers[layer][which][run.first : run.last])
            copy = torch.cat(parts) if len(parts) > 1 else parts[0]
            copies.append(copy.unflatten(0, (len(rows), most)).transpose(1, 2).flatten(2, 3))
        return copies[0], copies[1]

    def first_slot(self, segment: Segment) -> int:
        """The first position whose keys are still held."""
        return segment.tables[self.kind].first * PAGE


def _runs(slabs: Sequence[Slab], pages: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    begin = 0
    for end in range(1, len(pages) + 1):
        if end < len(pages) and pages[end] == pages[end - 1] + 1:
            continue
        while begin < end:  # a slab may end within the stretch
            slab, first = place(slabs, pages[begin])
            count = min(end - begin, len(slab.pages) - first)
            runs.append(Run(slab, first, first + count, begin, begin + count))
            begin += count
    return runs
