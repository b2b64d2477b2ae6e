"""The formulas for loads, against passes one by one: else simulated step times mean nothing."""

from __future__ import annotations

import numpy as np
import pytest

from simulation.load import FIXED, ROW, Demand, Loads
from simulation.world import TOKEN_BYTES
from tests.server.pipeline import Cost, Pipeline

BLOCKS = 4.0
ALONE = 20.0  # ms of a pass with one row


def demand(hops: list[list[int]], network: float) -> Demand:
    owner = [session for session, servers in enumerate(hops) for _ in servers]
    servers = [server for route in hops for server in route]
    return Demand(
        np.array(owner),
        np.array(servers),
        np.full(len(servers), BLOCKS),
        np.full(len(hops), network),
    )


def settled(loads: Loads, wanted: Demand) -> float:
    """Mean seconds of a step, after a while."""
    steps = np.ones(len(wanted.network))
    for _ in range(100):
        steps = loads.settle(wanted, steps)
    return float(steps.mean())


def three(up: float = 1e12) -> Loads:
    loads = Loads(np.full(3, ALONE / 1e3 / BLOCKS), np.full(3, up))
    loads.span[:] = BLOCKS
    return loads


def test_a_lone_session_waits_for_nobody() -> None:
    assert settled(three(), demand([[0, 1, 2]], 0.1)) == pytest.approx(0.1 + 3 * ALONE / 1e3)


def test_sixteen_rows_cost_half_as_much_again() -> None:
    assert pytest.approx(1.5) == FIXED + 16 * ROW


@pytest.mark.parametrize("sessions", [2, 8, 24, 64])
@pytest.mark.parametrize("latency", [5.0, 50.0])
def test_loads_are_those_of_real_schedulers(sessions: int, latency: float) -> None:
    """Three stages of real `Scheduler`s, pass by pass, against the formulas: within a fifth."""
    cost = Cost(ALONE * FIXED, ALONE * ROW, 1.0, noise=0.3)
    pipeline = Pipeline([cost] * 3, sessions, latency=latency, client=0.0)
    pipeline.run(20_000)
    exact = float(np.mean(pipeline.delays(pipeline.now / 2))) / 1e3
    routes = [[0, 1, 2] for _ in range(sessions)]
    assert settled(three(), demand(routes, 4 * latency / 1e3)) == pytest.approx(exact, rel=0.2)


def test_a_link_gives_no_more_than_it_has() -> None:
    up = 1e5  # bytes per second: three tokens, there and to the client
    loads = three(up)
    step = settled(loads, demand([[0]] * 20, 0.0))
    assert 20 / step == pytest.approx(up / (2 * TOKEN_BYTES), rel=0.1)


def test_prompts_lengthen_passes_by_half() -> None:
    loads = three()
    loads.bulk[1] = 1
    assert settled(loads, demand([[0, 1, 2]], 0.0)) == pytest.approx(3.5 * ALONE / 1e3)


def test_samples_have_the_mean_of_the_formula() -> None:
    loads = three()
    wanted = demand([[0, 1, 2]] * 12, 0.05)
    step = settled(loads, wanted)
    rng = np.random.default_rng(0)
    samples = np.concatenate([loads.samples(wanted, rng) for _ in range(500)])
    assert samples.mean() == pytest.approx(step, rel=0.02)
    assert samples.std() > 0
