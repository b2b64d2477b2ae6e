"""Servers go where the swarm needs them, stay there unless moving pays, and take what fits."""

from __future__ import annotations

import random
from dataclasses import replace
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.server.placement import (
    Holder,
    believe,
    can_give,
    capacities,
    check_fit,
    choose_span,
    consider_move,
    fitting_blocks,
    settle,
    swarm_throughput,
)
from swarm.types import BlockRange

QUALITY = 0.75


def holder(name: str, start: int, end: int, speed: float = 1.0) -> Holder:
    return Holder(name, BlockRange(start, end), speed)


def move(
    num_blocks: int,
    holders: list[Holder],
    me: Holder,
    *,
    move_seconds: float = 60.0,
    since_move: float = 1e9,
    now_random: float = 0.0,
) -> BlockRange | None:
    return consider_move(
        num_blocks,
        holders,
        me,
        quality=QUALITY,
        move_seconds=move_seconds,
        since_move=since_move,
        now_random=now_random,
    )


@st.composite
def swarms(draw: st.DrawFn) -> tuple[int, list[Holder]]:
    """A model's blocks, and servers of uneven speeds and sizes, wherever they may have gone."""
    num_blocks = draw(st.integers(1, 24))
    holders: list[Holder] = []
    for index in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, num_blocks))
        holders.append(holder(f"peer{index}", start, end, draw(st.floats(0.1, 1000.0))))
    return num_blocks, holders


def settled(num_blocks: int, holders: list[Holder], rng: random.Random) -> int:
    """Let everybody look, again and again, until nobody moves; how many moves that took."""
    moves = 0
    while True:
        moved = False
        for index in rng.sample(range(len(holders)), len(holders)):
            blocks = move(num_blocks, holders, holders[index])
            if blocks is not None:
                holders[index] = replace(holders[index], blocks=blocks)
                moved, moves = True, moves + 1
        if not moved:
            return moves


def test_servers_that_come_one_by_one_cover_the_model() -> None:
    holders: list[Holder] = []
    for name in "abc":
        holders.append(Holder(name, choose_span(24, holders, 10), 1.0))
    assert [str(holder.blocks) for holder in holders] == ["0:10", "10:20", "14:24"]
    assert swarm_throughput(24, holders) == pytest.approx(0.1, rel=1e-3)


def test_a_hole_is_filled_first() -> None:
    holders = [holder("a", 0, 8), holder("b", 0, 8), holder("c", 12, 24)]
    assert choose_span(24, holders, 4) == BlockRange(8, 12)


def test_one_fast_server_counts_for_several_slow_ones() -> None:
    holders = [holder("fast", 0, 8, 100.0), holder("slow", 8, 16), holder("slow2", 8, 16)]
    assert choose_span(16, holders, 8) == BlockRange(8, 16)


@given(swarms(), st.integers(1, 30), st.floats(0.1, 1000))
def test_no_other_window_would_help_the_swarm_more(
    swarm: tuple[int, list[Holder]], wanted: int, speed: float
) -> None:
    """From the rarest block on, as the order of a sorted list has it."""
    num_blocks, holders = swarm
    chosen = choose_span(num_blocks, holders, wanted)
    assert len(chosen) == min(wanted, num_blocks)

    def rarest(blocks: BlockRange) -> list[float]:
        return sorted(capacities(num_blocks, [*holders, Holder("new", blocks, speed)]))

    size = len(chosen)
    windows = [BlockRange(start, start + size) for start in range(num_blocks - size + 1)]
    assert rarest(chosen) == max(map(rarest, windows))


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 40))
def test_a_swarm_of_equal_servers_never_starves_a_block(
    num_blocks: int, wanted: int, servers: int
) -> None:
    holders: list[Holder] = []
    for index in range(servers):
        holders.append(Holder(str(index), choose_span(num_blocks, holders, wanted), 1.0))
    if servers * min(wanted, num_blocks) >= 2 * num_blocks:
        assert swarm_throughput(num_blocks, holders) > 0


def test_others_blocks_beyond_our_model_are_not_counted() -> None:
    assert capacities(2, [holder("a", 1, 9, 8.0), holder("b", 5, 7)]) == [0.0, 1.0]


@given(swarms(), st.randoms(use_true_random=False))
def test_a_move_opens_no_hole_lowers_no_throughput_and_the_last_one_comes(
    swarm: tuple[int, list[Holder]], rng: random.Random
) -> None:
    num_blocks, holders = swarm
    for _ in range(200):
        moves = [move(num_blocks, holders, each) for each in holders]
        movers = [index for index, blocks in enumerate(moves) if blocks is not None]
        if not movers:
            return
        mover = rng.choice(movers)
        before = capacities(num_blocks, holders)
        blocks = moves[mover]
        assert blocks is not None
        assert len(blocks) == len(holders[mover].blocks)
        holders[mover] = replace(holders[mover], blocks=blocks)
        after = capacities(num_blocks, holders)
        assert all(new > 0 for old, new in zip(before, after, strict=True) if old > 0)
        assert min(after) >= min(before)
    pytest.fail("they move for ever")


@given(swarms(), st.randoms(use_true_random=False))
def test_measurements_that_differ_by_a_tenth_move_nobody(
    swarm: tuple[int, list[Holder]], rng: random.Random
) -> None:
    num_blocks, holders = swarm
    settled(num_blocks, holders, rng)
    low = swarm_throughput(num_blocks, holders)
    moves = 0
    for _ in range(10):
        noisy = [replace(h, speed=h.speed * rng.uniform(0.95, 1.05)) for h in holders]
        moves += settled(num_blocks, noisy, rng)
        holders = [replace(h, blocks=n.blocks) for h, n in zip(holders, noisy, strict=True)]
    assert moves <= len(holders)  # nobody goes to and fro
    assert swarm_throughput(num_blocks, holders) >= 0.9 * low


def test_a_spare_server_fills_the_hole_of_one_that_died_at_once() -> None:
    holders = [holder("a", 0, 8), holder("b", 0, 8), holder("c", 8, 16)]
    died = [*holders, holder("d", 16, 24)]
    assert [move(24, died, each) for each in died] == [None] * 4
    assert move(24, holders, holders[2], since_move=1.0) is None  # it is the only one there
    moves = [move(24, holders, each, since_move=1.0) for each in holders[:2]]
    assert moves == [BlockRange(16, 24)] * 2  # if nobody else would
    drawn = [move(24, holders, each, since_move=1.0, now_random=0.99) for each in holders[:2]]
    assert sorted(drawn, key=str) == [BlockRange(16, 24), None]


def test_a_hole_is_filled_even_if_a_slow_server_is_all_that_stays_behind() -> None:
    holders = [holder("slow", 0, 8, 1.0), holder("fast", 0, 8, 1000.0)]
    assert move(16, holders, holders[1], move_seconds=3600.0) == BlockRange(8, 16)


def test_a_move_must_pay() -> None:
    def swarm(few: int, many: int) -> list[Holder]:
        low = [holder(f"few{i}", 0, 8) for i in range(few)]
        return [*low, *(holder(f"many{i}", 8, 16) for i in range(many))]

    holders = swarm(2, 9)
    assert move(16, holders, holders[-1]) == BlockRange(0, 8)
    assert move(16, holders, holders[-1], since_move=500.0) is None  # it has just come
    assert move(16, holders, holders[-1], move_seconds=1800.0) is None  # 100 GB over a slow line
    even = swarm(5, 7)
    assert [move(16, even, each) for each in even] == [None] * 12


@given(swarms())
def test_parts_of_spans_give_no_less_than_whole_ones_and_no_more_than_there_is(
    swarm: tuple[int, list[Holder]],
) -> None:
    num_blocks, holders = swarm
    assert can_give(num_blocks, holders, 0.999 * swarm_throughput(num_blocks, holders))
    ideal = sum(each.speed for each in holders) / num_blocks
    assert not can_give(num_blocks, holders, 1.001 * ideal)


def test_nobody_moves_while_routes_over_parts_of_spans_make_up_for_it() -> None:
    small = [holder("one", 0, 2, 4.0), holder("two", 0, 2, 4.0)]
    holders = [holder("large", 0, 4, 8.0), *small]  # which can leave 0:2 to the others
    assert capacities(4, holders) == [6.0, 6.0, 2.0, 2.0]
    assert can_give(4, holders, 4.0)
    assert [move(4, holders, each) for each in holders] == [None] * 3
    holders[0] = holder("large", 0, 4, 2.0)
    assert not can_give(4, holders, 2.0)
    assert move(4, holders, holders[1]) == BlockRange(2, 4)


def test_nobody_moves_if_other_blocks_are_rarer() -> None:
    """1:3 would be a better place than 0:2, but the swarm would give as little as before."""
    holders = [holder("me", 0, 2, 2.0), holder("first", 0, 1, 5.0), holder("last", 2, 3, 3.0)]
    assert capacities(3, holders) == [6.0, 1.0, 3.0]
    assert move(3, holders, holders[0]) is None
    holders[2] = holder("last", 2, 3, 1.0)  # now that one is as rare
    assert move(3, holders, holders[0]) == BlockRange(1, 3)


@pytest.mark.parametrize(("beside", "moves"), [(4.2, False), (4.3, True)])
def test_a_gain_of_a_quarter_of_what_it_can_add_is_worth_a_move(
    beside: float, *, moves: bool
) -> None:
    holders = [holder("rare", 0, 2, 8.0), holder("beside", 2, 4, 2 * beside)]
    holders += [holder("rich", 4, 6, 20.0), holder("me", 2, 4, 2.0)]
    assert move(6, holders, holders[-1]) == (BlockRange(0, 2) if moves else None)


def test_only_a_few_of_many_move_at_once_and_the_swarm_is_level_soon() -> None:
    """Each looks once a round, at the same picture; ten servers are where a quarter should be."""
    rng = random.Random(7)
    holders = [holder(f"peer{i}", 20 * (i % 3), 20 * (i % 3) + 20) for i in range(300)]
    holders += [holder(f"last{i}", 60, 80) for i in range(10)]
    rounds, ideal = 0, 310 / 80
    while swarm_throughput(80, holders) < QUALITY * ideal:
        picture, rounds, moved = list(holders), rounds + 1, 0
        for index, each in enumerate(picture):
            blocks = move(80, picture, each, now_random=rng.random())
            if blocks is not None:
                holders[index] = replace(each, blocks=blocks)
                moved += 1
        assert 1 <= moved <= 20
        assert rounds < 30
    assert settled(80, holders, rng) <= 3


def test_a_thousand_servers_are_looked_at_in_no_time() -> None:
    rng = random.Random(1)
    holders = [holder(f"peer{i}", s := rng.randrange(61), s + 20) for i in range(1000)]
    holders = [h for h in holders if h.blocks.start < 40]
    best = 1.0
    for _ in range(5):
        begin = perf_counter()
        move(80, holders, holders[5])
        best = min(best, perf_counter() - begin)
    assert best < 0.05


def test_one_liar_counts_for_no_more_than_thirty_servers() -> None:
    holders = [holder(f"peer{i}", 0, 8, 8.0) for i in range(3)]
    believed = believe([*holders, holder("liar", 0, 8, 1e9), holder("new", 0, 8, 0.0)])
    assert [h.speed for h in believed] == [8.0, 8.0, 8.0, 240.0, 8.0]
    assert believe([holder("new", 0, 8, 0.0)])[0].speed > 0


def test_those_who_start_together_part() -> None:
    known = [holder("old", 0, 8)]
    rivals = [Holder(f"peer{i}", choose_span(32, known, 8), 1.0) for i in range(3)]
    names = {rival.peer_id for rival in rivals}
    spans = [settle(32, [*known, *rivals], rival, names) for rival in rivals]
    assert sorted(map(str, spans)) == ["16:24", "24:32", "8:16"]
    # Who was there before is no rival, and need not be asked.
    assert settle(16, [*known, rivals[0]], rivals[0], set()) == BlockRange(8, 16)


def test_what_cannot_fit_is_refused_before_it_is_read() -> None:
    check_fit(8, block_bytes=1 << 30, free_bytes=8 << 30)
    with pytest.raises(UsageError, match=r"9 blocks need 9\.0 GiB and 8\.0 are free: serve fewer"):
        check_fit(9, block_bytes=1 << 30, free_bytes=8 << 30)


def test_no_more_blocks_than_fit_with_room_to_breathe() -> None:
    gib = 2**30
    sizes = {"block_bytes": gib // 2, "cache_bytes": gib // 2}
    assert fitting_blocks(32, **sizes, free_bytes=10 * gib) == 7
    assert fitting_blocks(4, **sizes, free_bytes=10 * gib) == 4


def test_no_room_for_one_block_says_how_much_is_needed() -> None:
    with pytest.raises(UsageError, match=r"one block needs 1\.4 GiB free and there are 1\.0"):
        fitting_blocks(32, block_bytes=2**29, cache_bytes=2**29, free_bytes=2**30)
