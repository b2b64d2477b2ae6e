"""Whatever dies, and whenever: sessions give what they would have given undisturbed."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from swarm.client import route
from swarm.errors import CannotRewind
from swarm.fakes import Fate
from swarm.messages import Message, Output, Step
from swarm.models.cache import SpanCache
from swarm.wire import decode
from tests.client.twins import THIRDS, House
from tests.inprocess import STEADY, Server

TOKENS = 64
BORDERS = (0, 2, 4)


# The sweep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", range(3))
def test_the_hop_in_use_may_die_before_any_position(house: House, hop: int) -> None:
    with house.twin() as twin:
        twin.step(5)
        for position in range(TOKENS):
            dead = twin.kill(hop)
            twin.step()
            assert twin.session.recoveries == position + 1
            house.swarm.revive(dead)


# Between steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "frames"), [(0, 2), (4, 3), (9, 5), (10, 6)], ids=["first", "chunk", "step", "later"]
)
@pytest.mark.parametrize(
    ("point", "hop"),
    [(point, hop) for hop in range(3) for point in ("not computed", "not pushed", "not copied")],
)
def test_it_may_die_at_each_point_of_a_step(
    house: House, hop: int, point: str, start: int, frames: int
) -> None:
    """`not pushed` and `not copied` of the last hop are both: answered but not received.

    `frames` have been pushed when the step from `start` on has.
    """
    network = house.swarm.network
    peers = {s.peer_id for s in house.servers if s.record.record.blocks.start == BORDERS[hop]}
    answers = Output if point == "not copied" or (point, hop) == ("not pushed", 2) else Step

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        place = destination if point == "not computed" else source
        return isinstance(message, answers) and message.start == start and place in peers

    async def act() -> Fate:
        route = [hop.peer_id for hop in twin.session.hops]
        while answers is Output and hop < 2:
            if network.frames[route[hop], route[hop + 1], "push"] == frames:
                break
            await asyncio.sleep(0)
        network.cut(twin.serving(hop).endpoint)
        return Fate.BREAK

    network.frames.clear()
    with house.twin(chunk_bytes=4 * 4 * house.whole.hidden_size) as twin:
        trap = house.swarm.trap(fits, act)
        twin.step(9)  # in chunks of 4
        twin.step()
        twin.step()
        assert trap.sprung
        twin.step(3)
        assert twin.session.recoveries == 1


def test_many_deaths_in_the_middle_of_steps(house: House) -> None:
    """What the dead owed, and what the living had not begun, is not waited for."""
    with house.twin() as twin:
        twin.step(3)
        killed: list[str] = []

        async def act() -> Fate:
            victim = twin.serving(1)
            killed.append(victim.peer_id)
            house.swarm.network.cut(victim.endpoint)
            return Fate.BREAK

        for _ in range(20):
            house.swarm.trap(lambda *frame: frame[2] == "push", act)
            twin.step()
            house.swarm.no_trap()
            for server in house.servers:
                house.swarm.revive(server)
        assert [peer_id for peer_id, _ in house.swarm.router.failures] == killed
        assert len(killed) == 20


@pytest.mark.parametrize("hop", [0, 1])
def test_a_dead_link_between_living_servers_is_gone_round(house: House, hop: int) -> None:
    with house.twin() as twin:
        twin.step(5)
        route = [h.peer_id for h in twin.session.hops]
        pair = (route[hop], route[hop + 1])
        house.swarm.on_loop(house.swarm.network.block, *pair)
        relayed = house.swarm.network.frames["client 99", route[hop + 1], "session"]
        for _ in range(4):
            twin.step()
        twin.step(6)
        assert [h.peer_id for h in twin.session.hops] == route
        assert not house.swarm.router.failures
        assert house.swarm.network.frames["client 99", route[hop + 1], "session"] >= relayed + 4
        house.swarm.on_loop(house.swarm.network.unblock, *pair)


def test_pushes_that_vanish_are_relayed_after_a_while(house: House) -> None:
    """Nobody breaks, nobody complains: the client finds out by silence."""
    with house.twin(timeouts=replace(STEADY, step=0.5)) as twin:
        twin.step(5)
        route = [h.peer_id for h in twin.session.hops]

        async def swallow(source: str, destination: str, method: str, frame: bytes) -> Fate:
            if (source, destination) == (route[0], route[1]):
                await asyncio.Event().wait()
            return Fate.DELIVER

        house.swarm.network.before_frame = swallow
        for _ in range(3):
            twin.step()
        assert [h.peer_id for h in twin.session.hops] == route
        house.swarm.no_trap()


def test_an_answer_to_what_was_asked_before_a_repair_does_not_end_the_step(house: House) -> None:
    """All had computed it when a link broke, so it was asked for again. The servers' answers to
    that are yet to come when the first answer does; until then nobody knows where they stand."""
    network = house.swarm.network
    with house.twin() as twin, ThreadPoolExecutor(1) as aside:
        twin.step(5)
        route, first, last = list(twin.session.hops), twin.serving(0), twin.serving(2)
        begun, gate, submit = threading.Event(), asyncio.Event(), last.executor.submit

        async def held(work: Any, *more: Any) -> Any:
            begun.set()
            await gate.wait()
            return await submit(work, *more)

        async def slow(source: str, destination: str, method: str, frame: bytes) -> Fate:
            if source == first.peer_id and isinstance(decode(frame), Output):
                await asyncio.sleep(0.2)
            return Fate.DELIVER

        last.executor.submit = held  # type: ignore[method-assign]
        try:
            stepping = aside.submit(twin.step, 3)
            assert begun.wait(20)
            asked = first.handler.counters.steps_from_clients
            network.before_frame = slow
            house.swarm.on_loop(network.block, route[1].peer_id, route[2].peer_id)
            house.swarm.wait_until(lambda: first.handler.counters.steps_from_clients > asked)
            house.swarm.on_loop(gate.set)
            stepping.result(20)
            twin.rollback(5)
            twin.step(2)
        finally:
            last.executor.submit = submit  # type: ignore[method-assign]
            house.swarm.on_loop(network.unblock, route[1].peer_id, route[2].peer_id)
        assert twin.session.hops == route  # nobody had to refuse a step, and be replaced


# More than one disaster --------------------------------------------------------------------------


@pytest.mark.parametrize("hop", range(3))
def test_twice_in_a_row(house: House, hop: int) -> None:
    with house.twin() as twin:
        twin.step(6)
        dead = twin.kill(hop)
        twin.step()
        house.swarm.revive(dead)
        twin.kill(hop)
        twin.step()
        twin.step()


@pytest.mark.parametrize("hop", range(3))
def test_the_replacement_dies_during_replay(house: House, hop: int) -> None:
    with house.twin(chunk_bytes=2 * 4 * house.whole.hidden_size) as twin:
        twin.step(9)
        first = twin.kill(hop)

        async def act() -> Fate:
            house.swarm.network.cut(twin.serving(hop).endpoint)
            house.swarm._revive(first)
            return Fate.BREAK

        trap = house.swarm.trap(lambda *frame: getattr(frame[3], "quiet", False), act)
        twin.step()
        assert trap.sprung
        twin.step(2)


@pytest.mark.parametrize("hop", range(3))
def test_a_neighbour_dies_during_replay(house: House, hop: int) -> None:
    with house.twin(chunk_bytes=2 * 4 * house.whole.hidden_size) as twin:
        twin.step(9)
        twin.kill(hop)

        async def act() -> None:
            house.swarm.network.cut(twin.serving((hop + 1) % 3).endpoint)

        trap = house.swarm.trap(lambda *frame: getattr(frame[3], "quiet", False), act)
        twin.step()
        assert trap.sprung
        twin.step(2)


# Servers that cannot go back ---------------------------------------------------------------------


def cannot_rewind(server: Server) -> None:
    """As one whose blocks keep a recurrent state."""
    open_cache = server.handler._span.open_cache

    def open_stubborn_cache(*args: Any) -> SpanCache:
        cache = open_cache(*args)
        crop = cache.crop

        def refuse(length: int) -> None:
            if length not in (0, cache.length):
                raise CannotRewind("a recurrent state")
            crop(length)

        cache.crop = refuse  # type: ignore[method-assign]
        return cache

    server.handler._span.open_cache = open_stubborn_cache  # type: ignore[method-assign]


def test_what_cannot_be_rewound_is_replayed_and_nobody_is_blamed() -> None:
    with House(spans=THIRDS) as house, house.twin(batch=2) as twin:
        for server in house.servers:
            cannot_rewind(server)
        twin.step(8)
        twin.rollback(5)
        twin.step(2)
        twin.rollback(4)
        twin.reorder(1, 1)
        twin.step()
        twin.step()
        assert not house.swarm.router.failures


@pytest.mark.parametrize("known", [True, False])
def test_who_opens_no_session_in_time_is_passed_over(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a text, if it is known how far they are; else they may just be far."""
    monkeypatch.setattr(route, "_OPENING", 0.05)
    with House(spans=THIRDS * 3) as house:
        timeouts = replace(STEADY, connect=1.0)
        with house.twin(timeouts=timeouts) as twin:
            twin.step(5)
            frozen = house.servers[4]  # the fake router takes them in order
            assert twin.serving(1) is house.servers[1]
            if known:
                house.swarm.router.rtts = {s.peer_id: 0.0 for s in house.servers}
            house.swarm.on_loop(house.swarm.network.freeze, frozen.endpoint)
            twin.kill(1)
            twin.step()
            assert twin.serving(1) is house.servers[7]
            peer_id, why = house.swarm.router.failures[-1]
            assert peer_id == frozen.peer_id
            assert f"within {0.05 if known else 1.0:g} s" in str(why)
            house.swarm.on_loop(house.swarm.network.thaw, frozen.endpoint)
