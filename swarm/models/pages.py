"""Which pages of the key-value cache hold whose text: counted references, no tensors.

A page has room for `PAGE` consecutive tokens of one row, in all layers of one kind. Rows with a
common past (beams) share its pages, and who writes into a shared page gets a copy of it first
(PagedAttention, Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from swarm.errors import CannotRewind, LocalProtocolError

PAGE = 64  # tokens; 32 made more of the small products, 128 more padding, and neither was faster
SLACK = 128  # tokens that sliding layers keep behind their window: so far a rewind stays exact


class PagePool:
    """The pages of one kind of layer. Low numbers go first, so that those in use lie together."""

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}  # references to every page in use
        self._free: list[int] = []  # a heap

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._uses)

    def uses(self, page: int) -> int:
        return self._uses.get(page, 0)

    def add(self, pages: range) -> None:
        """These exist from now on."""
        self._free += pages
        heapq.heapify(self._free)

    def remove(self, pages: range) -> None:
        """These, all of them free, exist no more."""
        assert not any(page in self._uses for page in pages)
        self._free = [page for page in self._free if page not in pages]
        heapq.heapify(self._free)

    def take(self) -> int:
        """A free page, with one reference to it; there must be one."""
        page = heapq.heappop(self._free)
        self._uses[page] = 1
        return page

    def share(self, page: int) -> None:
        self._uses[page] += 1

    def drop(self, page: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            del self._uses[page]
            heapq.heappush(self._free, page)

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """Raises LocalProtocolError unless `tables`, all there are, explain every reference."""
        found = Counter(page for table in tables for row in table.rows for page in row)
        if found != Counter(self._uses):
            raise LocalProtocolError("pages are counted that nobody has, or had uncounted")
        if len(set(self._free)) != len(self._free) or any(p in self._uses for p in self._free):
            raise LocalProtocolError("a page is free twice, or free and in use")


@dataclass(slots=True)
class Growth:
    """What the storage has to do before a pass: copy pages, then wipe those it fills in part.

    Wiped, since a former owner's numbers (NaN among them) must not be multiplied, even by zero.
    """

    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    wipes: list[int] = field(default_factory=list[int])


class PageTable:
    """The pages of one session in one kind of layer.

    Slot `s` of row `i` lies in page `rows[i][s // PAGE - first]`; `first` pages in front were
    given back because no window (of `window` tokens; None = it sees everything) reaches them.
    """

    def __init__(self, pool: PagePool, rows: int, window: int | None = None) -> None:
        self.pool = pool
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.window = window
        self.first = 0
        self.version = 0  # changes with every change

    def needs(self, start: int, end: int) -> int:
        """How many pages `grow` would take."""
        more = max(0, -(-end // PAGE) - self.first - len(self.rows[0]))
        touched = self._touched(start, end)
        return more * len(self.rows) + len(touched) - len(set(touched))

    def grow(self, start: int, end: int) -> Growth:
        """Make room for slots `[start, end)` of every row, in pages that are the row's own.

        The pool must have what `needs` says.
        """
        pool, done, last = self.pool, Growth(), -(-end // PAGE) - self.first
        if len(self.rows) > 1:  # else nothing is shared
            for row in self.rows:
                for index in range(start // PAGE - self.first, min(len(row), last)):
                    if pool.uses(row[index]) > 1:
                        pool.drop(row[index])
                        done.copies.append((row[index], pool.take()))
                        row[index] = done.copies[-1][1]
                        self.version += 1
        for row in self.rows:
            if len(row) < last:
                self.version += 1
                row += [pool.take() for _ in range(last - len(row))]
                if end % PAGE:
                    done.wipes.append(row[-1])
        return done

    def check_crop(self, length: int) -> None:
        """Raises CannotRewind if the window of the token at `length` would reach what was given
        back in front."""
        if length and self.first and length - self._reach() < self.first * PAGE:
            raise CannotRewind(
                f"a window of {self.window} tokens keeps {SLACK} more for rewinding, so it cannot "
                f"go back to {length}; open a new session and replay"
            )

    def crop(self, length: int) -> None:
        """Give back what lies behind `length` tokens, to which `check_crop` must have agreed."""
        if length == 0:
            self.release()
            return
        keep = -(-length // PAGE) - self.first
        for row in self.rows:
            if keep < len(row):
                self.version += 1
            for page in row[keep:]:
                self.pool.drop(page)
            del row[keep:]

    def slide(self, length: int) -> None:
        """Give back pages that neither the next token's window nor a rewind by SLACK reaches."""
        if self.window is None:
            return
        unseen = max(0, length - self._reach() - SLACK) // PAGE - self.first
        if unseen > 0:
            for row in self.rows:
                for page in row[:unseen]:
                    self.pool.drop(page)
                del row[:unseen]
            self.first += unseen
            self.version += 1

    def reorder(self, rows: Sequence[int]) -> None:
        """Old row `rows[i]` becomes row `i`."""
        self.version += 1
        before = self.rows
        self.rows = [list(before[row]) for row in rows]
        for row in self.rows:
            for page in row:
                self.pool.share(page)
        for row in before:
            for page in row:
                self.pool.drop(page)

    def release(self) -> None:
        """Give back everything; the table is then as new."""
        self.version += 1
        for row in self.rows:
            for page in row:
                self.pool.drop(page)
            row.clear()
        self.first = 0

    def _reach(self) -> int:
        return 0 if self.window is None else self.window - 1

    def _touched(self, start: int, end: int) -> list[int]:
        """Pages that hold some of these slots already, once per row."""
        if len(self.rows) == 1:
            return []
        span = slice(start // PAGE - self.first, -(-end // PAGE) - self.first)
        return [page for row in self.rows for page in row[span]]
