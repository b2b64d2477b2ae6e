"""Several deaths at once, and deaths amid beams, batches, rollbacks and odd replacements."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import torch

from swarm.client import session
from swarm.errors import NoRoute
from swarm.fakes import Fate
from swarm.messages import Message, Output, Step
from tests.client.twins import THIRDS, House
from tests.inprocess import STEADY

BORDERS = (0, 2, 4)


@pytest.mark.parametrize("hops", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_several_at_once(house: House, hops: tuple[int, ...]) -> None:
    with house.twin() as twin:
        twin.step(6)
        for hop in hops:
            twin.kill(hop)
        twin.step()
        twin.step(3)


# What sessions do --------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", range(3))
def test_after_a_rollback(house: House, hop: int) -> None:
    with house.twin() as twin:
        for dies_first in (True, False):
            twin.step(8)
            for _ in range(3):
                twin.step()
            if dies_first:
                dead = twin.kill(hop)
                twin.rollback(5)
            else:
                twin.rollback(5)
                dead = twin.kill(hop)
            twin.step(2)
            twin.step()
            house.swarm.revive(dead)
            twin.rollback(0)


@pytest.mark.parametrize("keep", [1, 4, None])
@pytest.mark.parametrize("hop", range(3))
def test_another_text_after_a_rollback_whoever_dies(
    house: House, hop: int, keep: int | None
) -> None:
    """Who lives holds the former text beyond it, and answers the new one's end only."""
    with house.twin() as twin:
        twin.step(20)
        twin.rollback(5)
        dead = twin.kill(hop)
        twin.step(12, keep=keep)
        twin.step()
        house.swarm.revive(dead)


@pytest.mark.parametrize("hop", range(3))
def test_another_text_that_only_some_servers_have_heard_of(house: House, hop: int) -> None:
    """Whoever has not heard of it when another one dies still holds the former text."""
    with house.twin() as twin:
        twin.step(20)
        twin.rollback(5)
        victim = twin.serving(hop)

        def fits(source: str, destination: str, method: str, message: Message) -> bool:
            return isinstance(message, Step) and victim.peer_id == destination

        async def die() -> Fate:
            house.swarm.network.cut(victim.endpoint)
            return Fate.BREAK

        trap = house.swarm.trap(fits, die)
        twin.step(12, keep=1)
        assert trap.sprung
        house.swarm.no_trap()
        twin.step()
        house.swarm.revive(victim)


@pytest.mark.parametrize("hop", range(3))
def test_beams(house: House, hop: int) -> None:
    with house.twin(batch=3) as twin:
        twin.step(6)
        for number, rows in enumerate([(0, 0, 1), (2, 1, 0), (1, 1, 1), (0, 2, 2), (2, 0, 1)]):
            twin.reorder(*rows)
            if number % 2:
                dead = twin.kill(hop)
                twin.step()
                house.swarm.revive(dead)
            twin.step()
            twin.rollback(7)
            twin.reorder(*rows)
            twin.step(2)


@pytest.mark.parametrize("hop", range(3))
@pytest.mark.parametrize("point", ["not pushed", "not copied"])
def test_beams_when_only_some_servers_have_reordered(house: House, hop: int, point: str) -> None:
    peers = {s.peer_id for s in house.servers if s.record.record.blocks.start == BORDERS[hop]}
    last = Output if point == "not copied" or hop == 2 else Step

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return source in peers and isinstance(message, last) and message.start == 7

    async def act() -> Fate:
        house.swarm.network.cut(twin.serving(hop).endpoint)
        return Fate.BREAK

    with house.twin(batch=3) as twin:
        twin.step(6)
        trap = house.swarm.trap(fits, act)
        for rows in [(2, 0, 0), (1, 2, 0), (1, 1, 0)]:
            twin.reorder(*rows)
            twin.step()
        assert trap.sprung


@pytest.mark.parametrize("hop", range(3))
def test_padding_at_the_left_and_in_the_middle(house: House, hop: int) -> None:
    left = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    middle = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]])
    with house.twin(batch=3) as twin:
        twin.step(5, padding=left)
        twin.step()
        dead = twin.kill(hop)
        twin.step()
        house.swarm.revive(dead)
        twin.step(3, padding=middle)
        twin.kill(hop)
        twin.step()
        twin.step(2)


@pytest.mark.parametrize("family", ["mistral", "bloom", "qwen3_moe"])
def test_other_families(family: str) -> None:
    """A sliding window, positions that come from the mask, experts."""
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    with House(family) as house, house.twin(batch=2) as twin:
        twin.step(8, padding=left)
        for hop in range(3):
            twin.step()
            dead = twin.kill(hop)
            twin.step()
            house.swarm.revive(dead)
        twin.rollback(9)
        twin.reorder(1, 0)
        twin.kill(1)
        twin.step(3)
        twin.step()


def test_padding_that_comes_late(house: House) -> None:
    with house.twin(batch=2) as twin:
        twin.step(5)
        twin.step(3, padding=torch.tensor([[1, 1, 1], [0, 0, 1]]))
        twin.kill(1)
        twin.step()


def test_growing_beyond_what_was_reserved(house: House) -> None:
    with house.twin(max_length=6) as twin:
        twin.step(5)
        for _ in range(3):
            twin.step()
        twin.kill(1)
        twin.step(20)


# Who takes over ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "victim"),
    [
        ([*THIRDS, (2, 3), (3, 4)], 1),
        ([*THIRDS, (0, 1), (1, 3)], 0),
        ([*THIRDS, (0, 6)], 1),
        ([*THIRDS, (1, 6)], 2),
        ([*THIRDS, (1, 3), (3, 5)], 1),
    ],
    ids=["pieces", "overlapping pieces", "larger", "last of a larger one", "parts of larger ones"],
)
def test_replacements_cut_elsewhere(spans: list[tuple[int, int]], victim: int) -> None:
    with House(spans=THIRDS) as house, house.twin() as twin:
        twin.step(6)
        for start, end in spans[3:]:
            house.add(start, end)
        dead = twin.kill(victim)
        twin.step()
        twin.step(3)
        lost_again = twin.kill(victim)  # some piece, perhaps
        house.swarm.revive(dead)
        twin.step()
        house.swarm.revive(lost_again)
        twin.step()


def test_a_frozen_server_counts_as_dead_after_the_deadline(house: House) -> None:
    timeouts = replace(STEADY, step=0.3, sync=0.3)
    with house.twin(timeouts=timeouts) as twin:
        twin.step(5)
        frozen = twin.serving(1)
        house.swarm.on_loop(house.swarm.network.freeze, frozen.endpoint)
        twin.step()
        assert frozen.peer_id not in {hop.peer_id for hop in twin.session.hops}
        house.swarm.on_loop(house.swarm.network.thaw, frozen.endpoint)
        twin.step()


def test_records_of_the_dead_cost_time_but_no_patience(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with house.twin() as twin:
        twin.step(6)
        monkeypatch.setattr(session, "_ATTEMPTS", -1)  # so that two disasters are too many
        dead = [house.servers[1], house.servers[4], house.add(2, 4), house.add(2, 4)]
        house.add(2, 4)
        for server in dead:
            house.swarm.cut(server)
        twin.step()
        assert len(house.swarm.router.failures) == len(dead)


def test_without_a_replacement_the_missing_blocks_are_named_in_time() -> None:
    timeouts = replace(STEADY, recovery=0.3)
    with House(spans=THIRDS) as house, house.twin(timeouts=timeouts) as twin:
        twin.step(5)
        dead = twin.kill(1)
        begin = time.monotonic()
        with pytest.raises(NoRoute, match="2:4"):
            twin.session.step(torch.randn(1, 1, house.whole.hidden_size))
        assert time.monotonic() - begin < STEADY.recovery / 2
        house.swarm.revive(dead)  # and the session is none the worse
        twin.step()


def test_it_goes_on_by_itself_when_a_server_comes_back() -> None:
    with House(spans=THIRDS) as house, house.twin() as twin:
        twin.step(5)
        dead = twin.kill(1)

        async def comes_back() -> None:
            while house.swarm.router.refreshed < 3:  # noqa: ASYNC110
                await asyncio.sleep(0)
            house.swarm._revive(dead)

        returning = asyncio.run_coroutine_threadsafe(comes_back(), house.swarm.loop._loop)
        twin.step()
        returning.result(30)
        twin.step()


@pytest.mark.parametrize("hop", range(3))
def test_a_frozen_server_is_found_by_what_steps_usually_take(hop: int) -> None:
    """Long before the 20 s that the configuration allows; and one that is only slow is kept."""
    timeouts = replace(STEADY, least=0.25)
    with House() as house, house.twin(timeouts=timeouts) as twin:
        twin.step(5)
        for _ in range(16):
            twin.step()
        frozen = twin.serving(hop)
        house.swarm.on_loop(house.swarm.network.freeze, frozen.endpoint)
        begin = time.monotonic()
        twin.step()
        assert time.monotonic() - begin < 15
        assert twin.session.recoveries == 1
        assert twin.serving(hop) is not frozen
        house.swarm.on_loop(house.swarm.network.thaw, frozen.endpoint)
        twin.step(3)
