"""Parts of a batch go where they are through soonest, and servers get work by their speed."""

from __future__ import annotations

from collections import Counter

import pytest

from swarm.client.training_plan import Leg, Workers
from swarm.dht.records import SignedRecord
from swarm.types import BlockRange
from tests.client.market import server

WHOLE = BlockRange(0, 6)


def held(name: str, start: int, end: int, speed: float = 100.0) -> SignedRecord:
    return server(name, f"{start}:{end}", throughput=speed)


def names(workers: Workers, servers: list[SignedRecord], parts: int) -> Counter[str]:
    """Who is given how many parts that come at the same time."""
    got: Counter[str] = Counter()
    for _ in range(parts):
        leg = workers.next_leg(servers, WHOLE, 128)
        assert leg is not None
        workers.give(leg, 128)
        got[leg.server.record.peer_id] += 1
    return got


def test_work_is_given_by_speed() -> None:
    quick, slow = held("quick", 0, 6, 3000.0), held("slow", 0, 6, 1000.0)
    got = names(Workers(), [quick, slow], 40)
    assert 28 <= got[quick.record.peer_id] <= 32


@pytest.mark.parametrize("claim", [1e9, 5e-324])
def test_what_was_claimed_gives_way_to_what_is_seen(claim: float) -> None:
    liar, honest = held("liar", 0, 6, claim), held("honest", 0, 6, 1000.0)
    workers = Workers()
    leg = Leg(liar, WHOLE)
    for _ in range(20):
        work = workers.give(leg, 128)
        workers.took(leg, 128, 10.0)
        workers.take(leg, work)
    assert names(workers, [liar, honest], 10)[honest.record.peer_id] == 10


def test_a_chain_must_come_to_the_end() -> None:
    """As quick as it may be, and however few hops it saves."""
    first, middle, last = held("x", 0, 3, 1e6), held("a", 2, 4), held("b", 4, 6)
    leg = Workers().next_leg([first, middle, last], WHOLE, 128)
    assert leg == Leg(first, BlockRange(0, 3))
    assert Workers().next_leg([first, last], WHOLE, 128) is None
    assert Workers().next_leg([], WHOLE, 128) is None


def test_servers_are_entered_anywhere_and_used_to_their_end() -> None:
    one, two = held("a", 0, 3), held("b", 1, 6)
    workers = Workers()
    assert workers.next_leg([one, two], WHOLE, 1) == Leg(one, BlockRange(0, 3))
    assert workers.next_leg([one, two], BlockRange(3, 6), 1) == Leg(two, BlockRange(3, 6))
    assert workers.holder([one, two], BlockRange(1, 3), 1) is not None
    assert workers.holder([one, two], BlockRange(0, 4), 1) is None
