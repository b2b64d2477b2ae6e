"""Second servers trail the first ones, and losing a server costs little more than a step."""

from __future__ import annotations

import pytest

from swarm.client.standby import _LAG
from swarm.config import ClientConfig
from swarm.fakes import Fate
from swarm.messages import Message, Step
from tests.client.twins import THIRDS, House, Twin
from tests.inprocess import Server

LONG = 40  # positions, from which on there are standbys


def attended(house: House, batch: int = 1, max_length: int = 128) -> Twin:
    return house.twin(batch, max_length, standby_after=LONG)


def trailing(twin: Twin, count: int = 3) -> None:
    """Until so many standbys lack less than a pass of theirs."""

    def near() -> bool:
        hops = twin.session.standbys
        return len(hops) == count and all(
            twin.session.position - hop.trusted < _LAG for hop in hops
        )

    twin.swarm.wait_until(near)


def server_of(house: House, peer_id: str) -> Server:
    return next(server for server in house.servers if server.peer_id == peer_id)


def passes(server: Server) -> int:
    return server.executor.counters["device_tokens"]


@pytest.mark.parametrize("hop", range(3))
def test_who_stands_by_goes_on_where_the_other_one_was(hop: int) -> None:
    with House() as house, attended(house) as twin:
        twin.step(LONG)
        for _ in range(3):
            twin.step()
        trailing(twin)
        spare = twin.session.standbys[hop]
        before = passes(server_of(house, spare.peer_id))
        assert spare.peer_id != twin.session.hops[hop].peer_id
        twin.kill(hop)
        twin.step()
        assert twin.session.hops[hop] is spare
        assert passes(server_of(house, spare.peer_id)) - before <= _LAG
        twin.step(4)
        twin.step(5, keep=1)  # of which the others must have all
        twin.step()
        assert twin.session.recoveries == 1


def test_short_texts_have_none() -> None:
    with House() as house, attended(house) as twin:
        twin.step(LONG - 2)
        twin.step()
        assert not twin.session.standbys
        twin.step()
        trailing(twin)


def test_all_may_die_at_once() -> None:
    with House() as house, attended(house) as twin:
        twin.step(LONG)
        trailing(twin)
        for hop in range(3):
            twin.kill(hop)
        twin.step()
        twin.step(3)
        assert twin.session.recoveries == 1


def test_a_standby_may_be_dead_when_it_is_wanted() -> None:
    with House(spans=THIRDS * 3) as house, attended(house) as twin:
        twin.step(LONG)
        trailing(twin)
        house.swarm.cut(server_of(house, twin.session.standbys[1].peer_id))
        twin.kill(1)
        twin.step()
        twin.step(2)
        assert twin.session.recoveries == 1


@pytest.mark.parametrize("back", [1, 5, LONG + 4])
def test_what_was_rolled_back_is_not_trusted(back: int) -> None:
    """Standbys that held the old text take the new one over it, soon or when they are needed."""
    with House() as house, attended(house) as twin:
        twin.step(LONG)
        for _ in range(10):
            twin.step()
        trailing(twin)
        twin.rollback(twin.session.position - back)
        twin.step(back)  # as long as before, but another text
        twin.kill(1)
        twin.step()
        twin.rollback(3)
        for _ in range(LONG):
            twin.step()
        trailing(twin, 2)
        twin.kill(0)
        twin.step(2)


def test_one_that_lags_far_behind_is_fed_the_rest() -> None:
    """As its link stands still: what it has is used, and only that."""

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return isinstance(message, Step) and message.quiet and message.start > 0

    async def act() -> Fate:
        return Fate.BREAK

    with House() as house, attended(house) as twin:
        twin.step(LONG)
        trailing(twin)
        trap = house.swarm.trap(fits, act)
        for _ in range(_LAG + 1):
            twin.step()
        house.swarm.wait_until(lambda: trap.sprung)
        twin.kill(2)
        twin.step()
        twin.step(2)


def test_beams_have_none() -> None:
    """They would have to follow every reorder."""
    with House() as house, attended(house, batch=2) as twin:
        twin.step(LONG)
        trailing(twin)
        twin.reorder(1, 0)
        twin.step()
        assert not twin.session.standbys
        twin.kill(1)
        twin.step(2)


def test_a_session_that_outgrows_its_reservation_gets_larger_ones() -> None:
    with House() as house, attended(house, max_length=LONG + 2) as twin:
        twin.step(LONG)
        trailing(twin)
        twin.step(4)
        trailing(twin)
        twin.kill(0)
        twin.step()


def test_those_who_died_lately_are_passed_by() -> None:
    """Their records outlive them by a minute and a half, and they look like good choices."""
    with House(spans=(*THIRDS, *THIRDS[1:2] * 6, *THIRDS)) as house, attended(house) as twin:
        for dead in house.servers[3:9]:
            house.swarm.cut(dead)
        twin.step(LONG)
        twin.step()
        trailing(twin)


def test_texts_with_nobody_to_stand_by_are_as_without() -> None:
    with House(spans=THIRDS) as house, attended(house) as twin:
        twin.step(LONG)
        twin.step()
        assert not twin.session.standbys
    assert ClientConfig().standby_after is None
