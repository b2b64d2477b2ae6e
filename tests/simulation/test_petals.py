"""Petals' rules on swarms that can be worked out by hand: else the comparison would be unfair."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from simulation.petals import Entry, PetalsRules, Picture, balance_quality, best_start, shortest
from simulation.rules import Server, Stage, Wanted
from simulation.world import Leaving, Machine, Place, Scenario
from swarm.dht.records import ServerState
from swarm.errors import NoRoute
from swarm.types import BlockRange

HERE = Place(1, 0, 0, 0.0, 0)


def stage(
    num_blocks: int, client_rtt: Callable[[int, int], float] = lambda one, other: 0.1
) -> Stage:
    return Stage(Scenario(num_blocks=num_blocks), lambda one, other: 0.1, client_rtt)


def entry(
    index: int,
    blocks: str,
    throughput: float = 1.0,
    *,
    speed: float = 100.0,
    free: int = 10_000,
    rtts: dict[int, float] | None = None,
    online: bool = True,
) -> Entry:
    span = BlockRange.parse(blocks)
    return Entry(index, span, throughput, speed, online, free, rtts or {}, 0.0)


def route(
    entries: Sequence[Entry], rtts: dict[int, float], *, banned: set[int] | None = None
) -> list[tuple[int, str]]:
    blocks = max(each.blocks.end for each in entries)
    wanted = Wanted(BlockRange(0, blocks), 1000)
    legs = shortest(Picture(list(entries), blocks), wanted, rtts, banned or set())
    return [(index, str(span)) for index, span in legs]


@pytest.mark.parametrize(
    ("throughputs", "length", "start"),
    [
        ([3, 1, 2, 2], 2, 1),  # both windows with the 1: then 2 is less than 3
        ([3, 1, 3, 1], 1, 1),  # equals: the first
        ([5, 5, 5, 0], 2, 2),
        ([0, 5, 0, 4, 0], 3, 2),  # [0, 0, 4] before [0, 0, 5]
        ([1, 2, 3], 3, 0),
    ],
)
def test_the_window_that_comes_first(throughputs: list[float], length: int, start: int) -> None:
    assert best_start(np.array(throughputs, float), length) == start


def test_the_window_is_the_least_of_all_sorted_ones() -> None:
    rng = random.Random(0)
    for _ in range(300):
        count = rng.randint(1, 12)
        values = [float(rng.randint(0, 4)) for _ in range(count)]
        length = rng.randint(1, count)
        windows = [sorted(values[i : i + length]) for i in range(count - length + 1)]
        assert best_start(np.array(values), length) == windows.index(min(windows))


def test_quality_is_what_moving_would_change() -> None:
    crowded = [entry(0, "0:2"), entry(1, "0:2"), entry(2, "0:2"), entry(3, "2:4")]
    assert balance_quality(Picture(crowded, 4), random.Random(0)) == pytest.approx(0.5, rel=0.01)
    even = [entry(0, "0:2"), entry(1, "0:2"), entry(2, "2:4"), entry(3, "2:4")]
    assert balance_quality(Picture(even, 4), random.Random(0)) == 1.0


def test_who_moves_is_whose_place_is_not_the_best() -> None:
    rules = PetalsRules(stage(4))
    for index, start in enumerate((0, 0, 0, 2)):
        rules.announce(server(index, start), 0.0)
    picture = rules.picture(0.0)
    assert rules.consider(server(0, 0), picture, 0.0) == BlockRange(2, 4)
    assert rules.consider(server(3, 2), picture, 0.0) is None  # that would leave a hole


def server(index: int, start: int) -> Server:
    machine = Machine(0.5, 2, 1e6, 1e6, HERE, 0.0, 1.0, Leaving.KILLED)
    return Server(index, machine, ServerState.ONLINE, BlockRange(start, start + 2))


def test_a_step_costs_what_the_constants_say() -> None:
    # Over 0 and 1: 2 x 0.018 + half of 0.1 to 0, 0.15 unknown between, 0.15 back, 0.08 computing.
    # Over 2 alone: 0.018 + 2 x 0.15 and 8 blocks of 1/x.
    two = [entry(0, "0:4"), entry(1, "4:8")]
    alone = 0.036 + 0.05 + 0.15 + 0.15 + 0.08 - 0.018 - 0.3  # for 8 blocks
    slower = [*two, entry(2, "0:8", speed=8 / (alone + 0.001))]
    faster = [*two, entry(2, "0:8", speed=8 / (alone - 0.001))]
    assert route(slower, {0: 0.1}) == [(0, "0:4"), (1, "4:8")]
    assert route(faster, {0: 0.1}) == [(2, "0:8")]


def test_an_rtt_between_servers_counts_half() -> None:
    known = [entry(0, "0:4", rtts={2: 0.2}), entry(1, "4:8"), entry(2, "4:8", speed=99)]
    assert route(known, {}) == [(0, "0:4"), (2, "4:8")]
    known = [entry(0, "0:4", rtts={2: 0.4}), entry(1, "4:8"), entry(2, "4:8", speed=99)]
    assert route(known, {}) == [(0, "0:4"), (1, "4:8")]


def test_servers_are_used_to_their_end_and_entered_anywhere() -> None:
    assert route([entry(0, "0:6"), entry(1, "2:8")], {}) == [(0, "0:6"), (1, "6:8")]


def test_full_banned_and_loading_servers_are_avoided() -> None:
    two = [entry(0, "0:8", free=10), entry(1, "0:8", speed=1)]
    assert route(two, {}) == [(1, "0:8")]
    assert route(two, {}, banned={1}) == [(0, "0:8")]
    with pytest.raises(NoRoute):
        route([entry(0, "0:8", online=False)], {})


def test_a_client_never_measures_who_holds_only_the_first_block() -> None:
    asked: list[int] = []

    def rtt(client: int, server: int) -> float:
        asked.append(server)
        return 0.1

    client = PetalsRules(stage(8, rtt)).memory(0)
    picture = Picture([entry(0, "0:1"), entry(1, "1:7"), entry(2, "7:8")], 8)
    for _ in range(50):
        client.look(picture, 0.0)
    assert set(asked) == {1, 2}


def test_bans_double_and_are_ignored_when_nobody_else_is_left() -> None:
    client = PetalsRules(stage(2)).memory(0)
    picture = Picture([entry(0, "0:2"), entry(1, "0:2", speed=1)], 2)
    wanted = Wanted(BlockRange(0, 2), 10)
    client.failed(server(0, 0), 0.0)
    assert client.route(picture, wanted, 14.9)[0][0] == 1
    assert client.route(picture, wanted, 15.1)[0][0] == 0
    client.failed(server(0, 0), 20.0)
    assert client.route(picture, wanted, 49.9)[0][0] == 1
    client.failed(server(1, 0), 20.0)
    with pytest.raises(NoRoute):  # until it has looked again
        client.route(picture, wanted, 30.0)
    again = Picture(picture.entries, 2)
    assert client.route(again, wanted, 31.0)[0][0] == 0
