"""Pages are shared, copied and counted as lists of tokens would be, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import CannotRewind, LocalProtocolError
from swarm.models.pages import PAGE, SLACK, PagePool, PageTable

PAGES = 24
WINDOW = 40


class Text:
    """A session as anybody would write it: one list of tokens per row, beside its page table."""

    def __init__(self, pool: PagePool, rows: int, window: int | None) -> None:
        self.table = PageTable(pool, rows, window)
        self.rows: list[list[int]] = [[] for _ in range(rows)]


class World:
    """Sessions on one pool, and a storage that keeps tokens where the tables say."""

    def __init__(self) -> None:
        self.pool = PagePool()
        self.pool.add(range(PAGES))
        self.held = {page: [-1] * PAGE for page in range(PAGES)}
        self.texts: list[Text] = []
        self.token = 0

    def open(self, rows: int, window: int | None) -> None:
        self.texts.append(Text(self.pool, rows, window))

    def grow(self, text: Text, tokens: int) -> None:
        start = len(text.rows[0])
        end = start + tokens
        needed = text.table.needs(start, end)
        if needed > self.pool.free:
            return
        free = self.pool.free
        growth = text.table.grow(start, end)
        assert free - self.pool.free == needed
        for source, target in growth.copies:
            self.held[target] = list(self.held[source])
        for page in growth.wipes:
            self.held[page] = [0] * PAGE
        for pages, row in zip(text.table.rows, text.rows, strict=True):
            for slot in range(start, end):
                self.token += 1
                row.append(self.token)
                self.held[pages[slot // PAGE - text.table.first]][slot % PAGE] = self.token
            assert -1 not in self.held[pages[-1]]  # nothing of a former owner is left
        text.table.slide(end)

    def crop(self, text: Text, part: float) -> None:
        length = int(len(text.rows[0]) * part)
        back = len(text.rows[0]) - length
        try:
            text.table.check_crop(length)
        except CannotRewind:
            assert text.table.window is not None
            assert back > SLACK
            return
        text.table.crop(length)
        for row in text.rows:
            del row[length:]

    def reorder(self, text: Text, rows: list[int]) -> None:
        rows = [row % len(text.rows) for row in rows]
        text.table.reorder(rows)
        text.rows = [list(text.rows[row]) for row in rows]

    def check(self) -> None:
        self.pool.check_integrity(text.table for text in self.texts)
        assert self.pool.free + self.pool.used == PAGES
        for text in self.texts:
            table, length = text.table, len(text.rows[0])
            first = 0
            if table.window is not None:
                first = max(0, length - table.window + 1)
                assert length - table.first * PAGE < WINDOW + SLACK + PAGE
            for pages, row in zip(table.rows, text.rows, strict=True):
                assert len(pages) == -(-length // PAGE) - table.first
                for slot in range(first, length):
                    assert self.held[pages[slot // PAGE - table.first]][slot % PAGE] == row[slot]


actions = st.one_of(
    st.tuples(st.just("open"), st.integers(1, 3), st.sampled_from([None, WINDOW])),
    st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 3 * PAGE)),
    st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(0, 5), st.floats(0, 1)),
    st.tuples(
        st.just("reorder"),
        st.integers(0, 5),
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
    ),
    st.tuples(st.just("release"), st.integers(0, 5), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=25))
def test_any_history_keeps_every_token_where_its_reader_looks(history: list[Any]) -> None:
    world = World()
    for action, number, value in history:
        if action == "open":
            world.open(number, value)
        elif world.texts:
            text = world.texts[number % len(world.texts)]
            if action == "release":
                text.table.release()
                world.texts.remove(text)
            else:
                getattr(world, action)(text, value)
        world.check()
    for text in world.texts:
        text.table.release()
    assert world.pool.free == PAGES


def test_beams_share_their_past_and_copy_only_what_they_write() -> None:
    pool = PagePool()
    pool.add(range(PAGES))
    table = PageTable(pool, 1)
    table.grow(0, 3 * PAGE + 5)
    table.reorder([0, 0, 0])
    assert pool.used == 4
    growth = table.grow(3 * PAGE + 5, 3 * PAGE + 6)
    assert pool.used == 6
    assert [source for source, _ in growth.copies] == [3, 3]
    table.reorder([1, 1, 2])
    assert pool.used == 5


def test_a_window_keeps_its_slack_and_no_more() -> None:
    pool = PagePool()
    pool.add(range(PAGES))
    table, length = PageTable(pool, 1, WINDOW), 0
    while length < 1000:
        table.grow(length, length + 10)
        length += 10
        table.slide(length)
        assert len(table.rows[0]) <= -(-(WINDOW + SLACK) // PAGE) + 1
        table.check_crop(max(0, length - SLACK))
    with pytest.raises(CannotRewind, match="replay"):
        table.check_crop(length - SLACK - 2 * PAGE)
    table.crop(0)
    assert (pool.used, table.first) == (0, 0)


def test_pages_that_nobody_explains_are_noticed() -> None:
    pool = PagePool()
    pool.add(range(PAGES))
    table = PageTable(pool, 2)
    table.grow(0, 10)
    pool.check_integrity([table])
    with pytest.raises(LocalProtocolError):
        pool.check_integrity([])
    table.rows[0].clear()
    with pytest.raises(LocalProtocolError):
        pool.check_integrity([table])
