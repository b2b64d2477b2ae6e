"""A server without --blocks goes where the swarm needs it, and takes no more than fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.server.placement import check_fit, choose_blocks, count_servers, fitting_blocks
from swarm.types import BlockRange

COVERAGE = st.lists(st.integers(0, 5), min_size=1, max_size=40)


def test_servers_that_come_one_by_one_cover_the_model() -> None:
    spans: list[BlockRange] = []
    for _ in range(3):
        spans.append(choose_blocks(count_servers(24, spans), 10))
    assert list(map(str, spans)) == ["0:10", "10:20", "14:24"]
    assert min(count_servers(24, spans)) == 1


def test_a_hole_is_filled_first() -> None:
    spans = [BlockRange(0, 8), BlockRange(0, 8), BlockRange(12, 24)]
    assert choose_blocks(count_servers(24, spans), 4) == BlockRange(8, 12)


def test_what_cannot_fit_is_refused_before_it_is_read() -> None:
    check_fit(8, block_bytes=1 << 30, free_bytes=8 << 30)
    with pytest.raises(UsageError, match=r"9 blocks need 9\.0 GiB and 8\.0 are free: serve fewer"):
        check_fit(9, block_bytes=1 << 30, free_bytes=8 << 30)


@given(COVERAGE, st.integers(1, 50))
def test_the_choice_is_a_window_with_a_rarest_block(coverage: list[int], wanted: int) -> None:
    chosen = choose_blocks(coverage, wanted)
    assert len(chosen) == min(wanted, len(coverage))
    assert min(coverage) in coverage[chosen.start : chosen.end]


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 40))
def test_a_swarm_of_equal_servers_never_starves_a_block(
    num_blocks: int, wanted: int, servers: int
) -> None:
    spans: list[BlockRange] = []
    for _ in range(servers):
        spans.append(choose_blocks(count_servers(num_blocks, spans), wanted))
    if servers * min(wanted, num_blocks) >= 2 * num_blocks:
        assert min(count_servers(num_blocks, spans)) >= 1


def test_others_blocks_beyond_our_model_are_not_counted() -> None:
    assert count_servers(2, [BlockRange(1, 9)]) == [0, 1]


def test_no_more_blocks_than_fit_with_room_to_breathe() -> None:
    gib = 2**30
    sizes = {"block_bytes": gib // 2, "cache_bytes": gib // 2}
    assert fitting_blocks(32, **sizes, free_bytes=10 * gib) == 7
    assert fitting_blocks(4, **sizes, free_bytes=10 * gib) == 4


def test_no_room_for_one_block_says_how_much_is_needed() -> None:
    with pytest.raises(UsageError, match=r"one block needs 1\.4 GiB free and there are 1\.0"):
        fitting_blocks(32, block_bytes=2**29, cache_bytes=2**29, free_bytes=2**30)
