"""In simulated time: streams keep their pace beside prefill, and batches come to fit the chain."""

from __future__ import annotations

from statistics import median

import pytest

from tests.server.pipeline import Cost, Pipeline

SMALL = Cost(1.2, 0.15, 0.08, noise=0.3)  # ms, as four blocks of hidden size 256 on a CPU
LARGE = Cost(20, 1.7, 1.0)  # of hidden size 1024
SECONDS = {SMALL: 6, LARGE: 40}


def settled(cost: Cost, stages: int, streams: int, **links: float) -> tuple[Pipeline, Pipeline]:
    """The same chain twice: passes that take what is ready, and passes that are cut."""
    pair = tuple(
        Pipeline([cost] * stages, streams, cuts=cuts, **links)  # type: ignore[arg-type]
        for cuts in (False, True)
    )
    for pipeline in pair:
        pipeline.run(1e3 * SECONDS[cost])
    return pair[0], pair[1]


@pytest.mark.parametrize(
    ("cost", "stages", "streams", "gain"),
    [(SMALL, 1, 4, 1.15), (LARGE, 1, 4, 1.5), (LARGE, 1, 16, 1.25), (SMALL, 3, 16, 1.1)],
)
def test_batches_that_came_apart_are_put_together(
    cost: Cost, stages: int, streams: int, gain: float
) -> None:
    greedy, cut = settled(cost, stages, streams)
    half = greedy.now / 2
    assert cut.rate(half) > gain * greedy.rate(half)
    assert median(cut.delays(half)) < median(greedy.delays(half))


@pytest.mark.parametrize("cost", [SMALL, LARGE])
@pytest.mark.parametrize(("stages", "streams"), [(3, 1), (1, 1), (3, 2), (3, 4), (3, 64), (6, 16)])
@pytest.mark.parametrize("latency", [0.2, 25.0])
def test_cutting_never_makes_it_much_worse(
    cost: Cost, stages: int, streams: int, latency: float
) -> None:
    greedy, cut = settled(cost, stages, streams, latency=latency)
    half = greedy.now / 2
    assert cut.rate(half) > 0.95 * greedy.rate(half)
    if streams == 1:
        assert cut.delays(half) == greedy.delays(half)


@pytest.mark.parametrize("cost", [SMALL, LARGE])
@pytest.mark.parametrize("streams", [1, 4, 16])
def test_a_long_prompt_beside_streams_costs_them_little(cost: Cost, streams: int) -> None:
    """The 99th percentile of a step, against its quiet median."""
    pipeline = Pipeline([cost] * 3, streams)
    pipeline.run(1e3 * SECONDS[cost] / 2)
    quiet, begin = median(pipeline.delays(pipeline.now / 2)), pipeline.now
    pipeline.prefill(4096)
    while pipeline.prefilling:
        pipeline.run(10 * quiet)
    delays = pipeline.delays(begin)
    assert delays[int(0.99 * len(delays))] < 4 * quiet
    # And the prompt gets on: a few times what it takes alone, not a hundred times.
    assert pipeline.now - begin < 6 * 4096 * cost.token


def test_a_prompt_alone_is_not_held_back() -> None:
    pipeline = Pipeline([SMALL] * 3, 0)
    pipeline.prefill(4096)
    while pipeline.prefilling:
        pipeline.run(1.0)
    assert pipeline.now < 2 * 4096 * SMALL.token


def test_streams_that_come_and_go_are_not_waited_for() -> None:
    """When most streams have ended, passes do not wait for rows that will not come."""
    pipeline = Pipeline([LARGE], 16)
    pipeline.run(20_000)
    pipeline.streams = 2
    pipeline.run(5_000)
    quick = Pipeline([LARGE], 2, cuts=False)
    quick.run(5_000)
    since = pipeline.now - 2_500
    assert median(pipeline.delays(since)) < 1.1 * median(quick.delays(2_500))
