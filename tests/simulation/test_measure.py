"""The figures themselves: percentiles, and what a placement can give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from simulation.measure import Histogram, Measure, parts_throughput, whole_throughput
from swarm.server.placement import Holder, swarm_throughput
from swarm.types import BlockRange

BLOCKS = 6
spans = st.lists(
    st.tuples(
        st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).map(
            lambda pair: BlockRange(pair[0], min(BLOCKS, pair[0] + pair[1]))
        ),
        st.floats(0.1, 100.0),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(spans)
def test_the_most_that_parts_of_spans_give_is_the_linear_programs(
    holders: list[tuple[BlockRange, float]],
) -> None:
    """Variables: the rate, and how much of each server goes to each of its blocks."""
    shares = [(s, b) for s, (span, _) in enumerate(holders) for b in range(span.start, span.end)]
    enough = np.zeros((BLOCKS, 1 + len(shares)))
    enough[:, 0] = 1
    spent = np.zeros((len(holders), 1 + len(shares)))
    for column, (server, block) in enumerate(shares, 1):
        enough[block, column] = -1
        spent[server, column] = 1
    best = linprog(
        [-1.0] + [0.0] * len(shares),
        A_ub=np.vstack([enough, spent]),
        b_ub=[0.0] * BLOCKS + [speed for _, speed in holders],
    )
    assert parts_throughput(BLOCKS, holders) == pytest.approx(-best.fun, rel=1e-4, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(spans)
def test_whole_spans_give_no_more_than_parts_and_as_much_as_placement_says(
    holders: list[tuple[BlockRange, float]],
) -> None:
    whole = whole_throughput(BLOCKS, holders)
    assert whole <= parts_throughput(BLOCKS, holders) + 1e-3
    named = [Holder(str(i), blocks, speed) for i, (blocks, speed) in enumerate(holders)]
    assert whole == pytest.approx(swarm_throughput(BLOCKS, named), abs=1e-4)


def test_percentiles_are_exact_to_two_per_cent() -> None:
    histogram = Histogram()
    histogram.add(np.arange(1.0, 101.0), np.ones(100))
    histogram.add(500.0, 2.0)
    assert histogram.percentile(0.5) == pytest.approx(51, rel=0.02)
    assert histogram.percentile(0.99) == pytest.approx(500, rel=0.02)


def test_nothing_counts_before_the_warm_up_is_over() -> None:
    measure = Measure(10.0)
    for now in (9.0, 11.0):
        measure.mended(now, 1.0, moved=False)
        measure.decoded(now, np.ones(1), np.ones(1))
        measure.count("moves", now)
        measure.was_blocked(now, 1.0)
    assert measure.counts == {"recoveries": 1, "moves": 1}
    assert (measure.tokens, measure.blocked) == (1.0, 1.0)
