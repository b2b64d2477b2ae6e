"""However many flood, what waits stays within its bound, and whoever comes next finds room."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.server.holdings import Holdings

MOST = 1000


def flood(holdings: Holdings, client: str) -> int:
    held = 0
    while True:
        try:
            holdings.take(client, 1)
        except RemoteProtocolError:
            return held
        held += 1


def test_too_much_is_told_to_be_less() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        Holdings(MOST).take("hog", MOST // 2 + 1)
    assert caught.value.code is ErrorCode.BUSY
    assert caught.value.retry_after


@pytest.mark.parametrize("hogs", [1, 2, 5, 20])
def test_whoever_comes_next_finds_as_much_as_each_before(hogs: int) -> None:
    holdings = Holdings(MOST)
    held = [0] * hogs
    for _ in range(20):  # what some gave up, others take
        for hog in range(hogs):
            holdings.give(str(hog), held[hog])
            held[hog] = flood(holdings, str(hog))
    assert sum(held) + holdings.left == MOST
    assert flood(holdings, "modest") >= MOST // (hogs + 2) // 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-400, 400)), max_size=60))
def test_the_books_balance(changes: list[tuple[str, int]]) -> None:
    holdings = Holdings(MOST)
    held: dict[str, Counter[int]] = defaultdict(Counter)
    total = 0
    for client, count in changes:
        if count > 0:
            try:
                holdings.take(client, count)
            except RemoteProtocolError:
                continue
            held[client][count] += 1
            total += count
        elif held[client][-count]:
            holdings.give(client, -count)
            held[client][-count] -= 1
            total += count
        assert holdings.left == MOST - total >= 0
