"""Where peers are follows from few round-trip times, and tells the others; few liars do no harm."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import MAX_PACKED, Coordinates, locate, pack, somewhere, unpack
from swarm.dht.records import ServerRecord
from swarm.types import BlockRange, ModelId

places = st.tuples(*[st.floats(-0.2, 0.2)] * 3, st.floats(0.0, 0.05))


def rtt(one: Coordinates, other: Coordinates) -> float:
    return math.dist(one[:3], other[:3]) + one[3] + other[3]


def town(count: int, lots: random.Random) -> list[Coordinates]:
    return [
        (lots.gauss(0, 0.05), lots.gauss(0, 0.05), lots.gauss(0, 0.05), 0.02 * lots.random())
        for _ in range(count)
    ]


def wrongness(truth: list[Coordinates], told: list[Coordinates]) -> float:
    """The median relative error over all pairs."""
    pairs = [(i, j) for i in range(len(truth)) for j in range(i)]
    errors = [abs(rtt(told[i], told[j]) / rtt(truth[i], truth[j]) - 1) for i, j in pairs]
    return sorted(errors)[len(errors) // 2]


def test_a_newcomer_finds_its_place_by_a_few_rtts() -> None:
    lots = random.Random(1)
    others = town(60, lots)
    for me in town(20, lots):
        found = locate([(other, rtt(me, other)) for other in others[:16]], None)
        assert found is not None
        errors = sorted(abs(rtt(found, other) / rtt(me, other) - 1) for other in others[16:])
        assert errors[len(errors) // 2] < 0.1


def test_a_swarm_that_knows_nothing_finds_its_shape() -> None:
    lots = random.Random(2)
    truth = town(60, lots)
    told = [somewhere(lots) for _ in truth]
    known: list[dict[int, float]] = [{} for _ in truth]
    for _ in range(15):
        for me, place in enumerate(truth):
            others = [other for other in lots.sample(range(len(truth)), 4) if other != me]
            known[me] |= {other: rtt(place, truth[other]) for other in others}
            told[me] = locate([(told[o], r) for o, r in known[me].items()], told[me]) or told[me]
    assert wrongness(truth, told) < 0.1


def test_a_few_liars_move_nobody_far() -> None:
    lots = random.Random(3)
    others = town(40, lots)
    me = (0.0, 0.0, 0.0, 0.01)
    honest = [(other, rtt(me, other)) for other in others[:20]]
    lies = [((5.0, 5.0, 5.0, 0.0), 0.001)] * 3
    found = locate([*honest, *lies], None)
    for _ in range(10):
        found = locate([*honest, *lies], found)
    assert found is not None
    errors = sorted(abs(rtt(found, other) / rtt(me, other) - 1) for other in others[20:])
    assert errors[len(errors) // 2] < 0.2


@given(st.lists(st.tuples(places, st.floats(0.0, 10.0)), max_size=8), st.none() | places)
def test_whatever_is_said_a_place_comes_out(
    known: list[tuple[Coordinates, float]], present: Coordinates | None
) -> None:
    found = locate(known, present)
    if not known:
        assert found == present
    else:
        assert found is not None
        assert all(map(math.isfinite, found))
        assert found[3] >= 0


@given(st.tuples(*[st.floats()] * 4) | places)
def test_what_is_announced_fits_into_a_record_and_comes_back(place: Coordinates) -> None:
    packed = pack((*place[:3], abs(place[3])))
    assert all(abs(value) <= MAX_PACKED for value in packed)
    record = ServerRecord(
        peer_id="p",
        model=ModelId("m", "0" * 64),
        blocks=BlockRange(0, 1),
        num_blocks=1,
        host="h",
        port=1,
        certificate_digest=bytes(32),
        coordinates=packed,
    )
    assert record.coordinates == packed
    if all(abs(value) < 3 for value in place):
        back = unpack(packed)
        assert all(
            abs(a - b) < 1e-4 for a, b in zip(back, (*place[:3], abs(place[3])), strict=True)
        )
