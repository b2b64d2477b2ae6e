"""What `swarm plan` computes behaves as machines do: more room is never fewer blocks, and so on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.plan import GB, GPUS, HOURS, Assumptions, Block, Machine, Wish, capacity, offer

ASSUMED = Assumptions()

blocks = st.lists(
    st.builds(
        Block,
        weights=st.integers(1, 20 * GB),
        active=st.just(0),
        kept=st.integers(0, 1 << 16),
        window=st.none() | st.integers(1, 8192),
        fixed=st.integers(0, 1 << 24),
    ).flatmap(lambda b: st.integers(1, b.weights).map(lambda n: replace(b, active=n))),
    min_size=1,
    max_size=40,
)
machines = st.builds(
    Machine,
    name=st.just("m"),
    memory=st.integers(0, 200 * GB),
    bandwidth=st.floats(1e10, 1e13),
    watts=st.floats(1, 1000),
    rent=st.floats(0, 20),
)
wishes = st.builds(
    Wish,
    sessions=st.integers(1, 500),
    tokens=st.integers(1, 100_000),
    replicas=st.integers(1, 5),
    rtt=st.floats(0, 1),
)


@settings(max_examples=40)
@given(blocks, machines, wishes)
def test_what_is_offered_holds_everything_and_fits(
    model: list[Block], machine: Machine, wish: Wish
) -> None:
    found = offer(model, machine, wish, ASSUMED)
    each = -(-wish.sessions // wish.replicas)
    sizes = [block.weights + each * block.cache(wish.tokens) for block in model]
    if found is None:
        assert max(sizes) > capacity(machine, ASSUMED)
        return
    assert sum(found.spans) == len(model)
    assert found.machines == len(found.spans) * wish.replicas
    begin = 0
    for count in found.spans:
        assert count > 0
        assert sum(sizes[begin : begin + count]) <= capacity(machine, ASSUMED)
        begin += count
    assert 0 < found.alone <= found.together
    assert found.free_tokens >= 0


@settings(max_examples=40)
@given(blocks, machines, wishes, st.integers(0, 100 * GB), st.floats(1, 4))
def test_more_memory_and_a_quicker_one_never_hurt(
    model: list[Block], machine: Machine, wish: Wish, more: int, faster: float
) -> None:
    found = offer(model, machine, wish, ASSUMED)
    if found is None:
        return
    roomy = offer(model, replace(machine, memory=machine.memory + more), wish, ASSUMED)
    assert roomy is not None
    assert roomy.machines <= found.machines
    quick = offer(model, replace(machine, bandwidth=machine.bandwidth * faster), wish, ASSUMED)
    assert quick is not None
    assert quick.alone >= found.alone * (1 - 1e-9)
    assert quick.together >= found.together * (1 - 1e-9)


@settings(max_examples=40)
@given(blocks, machines, wishes)
def test_a_longer_way_takes_longer(model: list[Block], machine: Machine, wish: Wish) -> None:
    near, far = (offer(model, machine, replace(wish, rtt=r), ASSUMED) for r in (0.0, 0.1))
    if near is None or far is None:
        return
    ways = (len(near.spans) + 1) / 2 * 0.1
    assert 1 / far.alone == pytest.approx(1 / near.alone + ways)


@settings(max_examples=40)
@given(blocks, machines, st.integers(1, 50), st.integers(1, 4))
def test_more_sessions_on_the_same_machines_give_no_less(
    model: list[Block], machine: Machine, sessions: int, factor: int
) -> None:
    few, many = (Wish(sessions=n, tokens=64, replicas=1) for n in (sessions, sessions * factor))
    one, other = (offer(model, machine, wish, ASSUMED) for wish in (few, many))
    if one is None or other is None or one.spans != other.spans:
        return
    assert other.together >= one.together * (1 - 1e-9)
    assert other.together <= one.together * factor * (1 + 1e-9)


@settings(max_examples=40)
@given(blocks, machines, wishes)
def test_money_adds_up(model: list[Block], machine: Machine, wish: Wish) -> None:
    found = offer(model, machine, wish, ASSUMED)
    if found is None:
        return
    assert machine.rent is not None
    assert machine.watts is not None
    assert found.rent_month == pytest.approx(found.machines * machine.rent * HOURS)
    assert found.watts == pytest.approx(found.machines * (machine.watts + ASSUMED.machine_watts))
    million = found.per_million(found.rent_month)
    assert million is not None
    tokens = found.together * 3600 * HOURS
    assert million * tokens / 1e6 == pytest.approx(found.rent_month)


def test_unknown_prices_stay_unknown() -> None:
    here = Machine("here", 100 * GB, 0.0, block_seconds=0.001, batch_seconds=0.0015)
    found = offer([Block(GB, GB, 1000)] * 10, here, Wish(sessions=1, replicas=1, rtt=0), ASSUMED)
    assert found is not None
    assert (found.watts, found.power_month, found.rent_month) == (None, None, None)
    assert found.per_million(None) is None
    expected = 10 * 0.001 + ASSUMED.hop_seconds + ASSUMED.client_seconds
    assert found.alone == pytest.approx(1 / expected)


def test_a_measured_machine_shares_passes_as_it_measured() -> None:
    here = Machine("here", 100 * GB, 0.0, block_seconds=0.001, batch_seconds=0.0016)
    wish = Wish(sessions=16, replicas=1, rtt=0)
    found = offer([Block(GB, GB, 1000)] * 10, here, wish, ASSUMED)
    assert found is not None
    expected = 10 * 0.0016 + ASSUMED.hop_seconds + ASSUMED.client_seconds
    assert found.together == pytest.approx(16 / expected)


def test_a_window_bounds_what_is_kept() -> None:
    assert Block(1, 1, kept=10, window=100, fixed=7).cache(1000) == 1007
    assert Block(1, 1, kept=10, window=100).cache(50) == 500
    assert Block(1, 1, kept=10).cache(1000) == 10_000


def test_known_gpus_are_what_their_data_sheets_say() -> None:
    by_name = {gpu.name: gpu for gpu in GPUS}
    assert (by_name["H200"].memory, by_name["H200"].bandwidth) == (141 * GB, 4.8e12)
    assert all(gpu.watts and gpu.rent and 1e11 < gpu.bandwidth < 1e13 for gpu in GPUS)
