"""Two of every server make training nearly twice as quick, where computing is all that counts."""

from __future__ import annotations

from benchmarks.stubbed import tokens_per_second
from swarm.types import BlockRange

THIRDS = [BlockRange(0, 4), BlockRange(4, 8), BlockRange(8, 12)]


def test_two_of_everything_share_a_batch() -> None:
    one, two = (tokens_per_second(THIRDS * n, 8, 128) for n in (1, 2))
    assert two >= 1.6 * one


def test_three_in_a_row_work_at_the_same_time() -> None:
    alone, row = (tokens_per_second(spans, 8, 128) for spans in ([BlockRange(0, 12)], THIRDS))
    assert row >= 2.0 * alone
