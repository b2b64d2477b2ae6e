"""A server that leaves hands its sessions over: nothing is computed twice, and nothing changes."""

from __future__ import annotations

import asyncio

import pytest
import torch

from swarm.fakes import Fate
from swarm.messages import HandOver, Heritage, Inherit, Message, Open, Step
from swarm.server import handler
from tests.client.twins import THIRDS, House, Twin
from tests.inprocess import Server

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])


def leave(house: House, server: Server) -> None:
    """As a server does when it is stopped politely."""
    house.swarm.loop.call(server.handler.leave())


def moved(twin: Twin, count: int) -> None:
    session = twin.session
    twin.swarm.wait_until(lambda: session.moves == count)
    assert session.recoveries == 0


def passes(server: Server) -> int:
    return server.executor.counters["device_tokens"]


@pytest.mark.parametrize("hop", range(3))
def test_the_replacement_goes_on_where_the_other_one_was(hop: int) -> None:
    with House() as house, house.twin() as twin:
        twin.step(9)
        twin.step()
        before = twin.serving(hop)
        leave(house, before)
        moved(twin, 1)
        after = twin.serving(hop)
        assert after is not before
        assert passes(after) == 0
        twin.step()
        twin.step(4, keep=1)
        assert passes(after) == 5, "only what is new"
        assert before.handler.counters.handed_over == after.handler.counters.inherited == 1
        # And what was inherited can be rolled back, and replayed, like anything else.
        twin.rollback(7)
        twin.step(2)
        house.swarm.revive(before)
        before.handler.draining = False
        twin.kill(hop)
        twin.step()
        assert twin.session.recoveries == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "bloom", "qwen3_moe"])
def test_every_kind_of_attention_moves(family: str) -> None:
    """Windows that have slid on (tiny models see 16 tokens or so), padding, beams."""
    with House(family) as house, house.twin(batch=2, max_length=512) as twin:
        twin.step(8, padding=LEFT)
        twin.step(230)
        twin.step()
        twin.reorder(1, 1)
        twin.step(2)
        for hop in range(3):
            leave(house, twin.serving(hop))
            moved(twin, hop + 1)
            twin.step()
        twin.rollback(twin.session.position - 3)
        twin.reorder(1, 0)
        twin.step(5)
        assert twin.session.recoveries == 0


def test_all_hops_may_leave_at_once() -> None:
    with House() as house, house.twin() as twin:
        twin.step(12)
        for hop in range(3):
            leave(house, twin.serving(hop))
        moved(twin, 3)
        twin.step()
        twin.step(3)
        moved(twin, 3)


def test_sessions_that_hold_nothing_yet_move_too() -> None:
    with House() as house, house.twin() as twin:
        twin.step(1)
        twin.rollback(0)
        leave(house, twin.serving(1))
        moved(twin, 1)
        twin.step(4)


def test_a_step_in_the_middle_of_which_it_says_so_is_finished_first() -> None:
    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return isinstance(message, Step) and message.start == 5

    async def act() -> Fate:
        await leaving.handler.leave()
        return Fate.DELIVER

    with House() as house, house.twin() as twin:
        twin.step(5)
        leaving = twin.serving(1)
        house.swarm.trap(fits, act)
        twin.step()
        moved(twin, 1)
        twin.step()


@pytest.mark.parametrize("back", [0, 3, 18])
def test_the_text_goes_on_while_it_is_copied(back: int) -> None:
    """And may go back, even before what was copied already: the rest is what is missing then."""

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return isinstance(message, Heritage)

    async def act() -> Fate:
        await gate.wait()
        return Fate.DELIVER

    async def new_gate() -> asyncio.Event:
        return asyncio.Event()

    async def open_gate() -> None:
        gate.set()

    with House() as house, house.twin() as twin:
        gate = house.swarm.loop.call(new_gate())
        twin.step(20)
        leaving = twin.serving(1)
        trap = house.swarm.trap(fits, act)
        leave(house, leaving)
        house.swarm.wait_until(lambda: trap.sprung)
        twin.step()
        twin.rollback(twin.session.position - back)
        twin.step(2)
        assert twin.session.moves == 0
        house.swarm.loop.call(open_gate())
        moved(twin, 1)
        assert passes(twin.serving(1)) == 0
        twin.step(3)
        twin.rollback(2)
        twin.step()


@pytest.mark.parametrize("kind", [HandOver, Inherit, Heritage])
@pytest.mark.parametrize("who", ["giver", "taker"])
def test_either_may_die_in_the_middle_of_it(kind: type[Message], who: str) -> None:
    """Then the text is replayed, or the old server goes on while it can."""

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return isinstance(message, kind)

    async def act() -> Fate:
        others = (
            s for s in house.servers if s.record.record.blocks == leaving.record.record.blocks
        )
        dead = leaving if who == "giver" else next(s for s in others if s is not leaving)
        house.swarm.network.cut(dead.endpoint)
        return Fate.BREAK

    with House() as house, house.twin() as twin:
        twin.step(20)
        leaving = twin.serving(1)
        house.add(2, 4)  # a third one, in case both are lost
        trap = house.swarm.trap(fits, act)
        leave(house, leaving)
        house.swarm.wait_until(lambda: trap.sprung)
        for _ in range(3):
            twin.step()
        assert twin.session.moves == 0
        assert twin.session.recoveries <= 1


def test_who_has_nobody_to_hand_over_to_serves_to_the_end() -> None:
    with House(spans=THIRDS) as house, house.twin() as twin:
        twin.step(5)
        leave(house, twin.serving(1))
        twin.step(2)
        assert twin.session.moves == twin.session.recoveries == 0


def test_blocks_that_only_several_servers_have_are_replayed() -> None:
    """Pieces are not handed over; the session goes on with the old server until it ends."""
    with House(spans=[*THIRDS, (2, 3), (3, 4)]) as house, house.twin() as twin:
        twin.step(5)
        leaving = twin.serving(1)
        leave(house, leaving)
        twin.step()
        house.swarm.cut(leaving)
        twin.step(2)
        assert twin.session.recoveries == 1
        assert len(twin.session.hops) == 4


def test_what_lies_not_in_pages_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As recurrent states do, which no other server could take over."""
    monkeypatch.setattr(handler, "can_move", lambda cache: False)
    with House() as house, house.twin() as twin:
        twin.step(5)
        leaving = twin.serving(1)
        leave(house, leaving)
        twin.step()
        house.swarm.cut(leaving)
        twin.step(2)
        assert (twin.session.moves, twin.session.recoveries) == (0, 1)
        assert leaving.handler.counters.handed_over == 0


def test_an_idle_session_moves_without_a_step() -> None:
    """A chat whose user reads: the server may be gone when they write again."""
    with House() as house, house.twin() as twin:
        twin.step(30)
        leaving = twin.serving(2)
        leave(house, leaving)
        moved(twin, 1)
        house.swarm.wait_until(lambda: leaving.handler.sessions == 0)
        house.swarm.cut(leaving)
        twin.step()
        moved(twin, 1)


def test_between_two_turns_a_better_route_is_taken() -> None:
    """What stays in the route keeps its cache, the others are told the text anew."""
    with House() as house, house.twin() as twin:
        twin.step(20)
        twin.step()
        kept, left = twin.serving(0), twin.serving(1)
        others = [server for server in house.servers if server not in (kept, left)]
        better = [next(s for s in others if s.record.record.blocks.start == at) for at in (2, 4)]
        house.swarm.router.best = [(s.record, s.record.record.blocks) for s in (kept, *better)]
        twin.step()
        assert twin.session.moves == 0, "in the middle of a text nobody looks"
        twin.step(5, keep=1)
        assert twin.session.moves == 1
        assert twin.session.recoveries == 0
        assert [twin.serving(hop) for hop in range(3)] == [kept, *better]
        assert passes(kept) == 27
        twin.step()
        twin.step(5, keep=2)
        twin.step()
        assert twin.session.moves == 1


def test_a_better_route_that_cannot_be_opened_changes_nothing() -> None:
    with House() as house, house.twin() as twin:
        twin.step(20)
        before = list(twin.session.hops)
        others = [s for s in house.servers if s.peer_id not in {hop.peer_id for hop in before}]
        house.swarm.cut(others[0])
        house.swarm.router.best = [(s.record, s.record.record.blocks) for s in others]
        twin.step(5)
        assert list(twin.session.hops) == before
        assert twin.session.moves == twin.session.recoveries == 0


def test_who_is_left_alone_while_a_better_route_is_opened_leaves_nothing_behind() -> None:
    """The quiet swarm at the end is what is asserted: no session, and no task, of those opened."""

    def fits(source: str, destination: str, method: str, message: Message) -> bool:
        return isinstance(message, Open) and opening.peer_id == destination

    async def act() -> Fate:
        step.cancel()
        return Fate.DELIVER

    with House() as house, house.twin() as twin:
        twin.step(20)
        before = list(twin.session.hops)
        others = [s for s in house.servers if s.peer_id not in {hop.peer_id for hop in before}]
        opening = others[-1]
        house.swarm.router.best = [(s.record, s.record.record.blocks) for s in others]
        house.swarm.trap(fits, act)

        async def cancelled() -> None:
            nonlocal step
            remote = twin.session.remote(1)
            step = asyncio.ensure_future(remote.step(torch.zeros(1, 5, twin.span.hidden_size)))
            with pytest.raises(asyncio.CancelledError):
                await step

        step: asyncio.Future[torch.Tensor]
        house.swarm.loop.call(cancelled())
        assert list(twin.session.hops) == before
        house.swarm.router.best = None
        twin.step(2)


def test_a_hop_that_became_slow_is_left_in_the_middle_of_a_text() -> None:
    with House() as house:
        house.swarm.router.expected = -1.0  # whatever they take is too long
        with house.twin() as twin:
            twin.step(20)
            now = twin.session.hops
            spare = [s for s in house.servers if s.peer_id not in {hop.peer_id for hop in now}]
            house.swarm.router.best = [(s.record, s.record.record.blocks) for s in spare]
            for _ in range(40):
                twin.step()
            assert twin.session.moves == 1
            assert {hop.peer_id for hop in twin.session.hops} == {s.peer_id for s in spare}
