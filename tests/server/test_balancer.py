"""A server moves when the swarm needs it elsewhere, once, and not for nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from swarm.dht.directory import Directory, SwarmView
from swarm.dht.memory import MemoryDht
from swarm.dht.records import ServerState, SignedRecord, keys_of
from swarm.errors import UsageError
from swarm.server.balancer import Balancer, look_again, next_look, others_in
from swarm.server.placement import Holder
from swarm.types import BlockRange, Numerics
from tests.dht.samples import ALICE, BOB, EVE, MODEL, NOW, signed

ME = "me"


class Willing:
    """Draws so that it moves, even where others had better do."""

    def random(self) -> float:
        return 0.0


@dataclass
class Server:
    """Holds some blocks, and notes what it is told to do."""

    blocks: BlockRange
    world: World
    move_seconds: float = 10.0
    fetched: list[BlockRange] = field(default_factory=list)
    moves: list[BlockRange] = field(default_factory=list)
    claimed: BlockRange | None = None  # instead of these
    hub_is_down: bool = False
    arrives: SignedRecord | None = None  # while weights are fetched
    rival: SignedRecord | None = None  # says the same at the same moment

    @property
    def holder(self) -> Holder:
        return Holder(ME, self.blocks, 8.0)

    async def fetch(self, blocks: BlockRange) -> None:
        if self.hub_is_down:
            raise UsageError("the hub cannot be reached")
        self.fetched.append(blocks)
        if self.arrives is not None:
            self.world.put(self.arrives)

    async def claim(self, blocks: BlockRange) -> None:
        self.claimed, self.blocks = self.blocks, blocks
        if self.rival is not None:
            self.world.put(self.rival)

    async def stay(self) -> None:
        assert self.claimed is not None
        self.blocks = self.claimed

    async def move(self, blocks: BlockRange) -> None:
        assert self.blocks == blocks
        self.moves.append(blocks)


class World:
    """A DHT, one clock, and a server `me` on the same blocks as Alice; Bob has the others."""

    def __init__(self, quality: float = 0.75) -> None:
        self.dht = MemoryDht("reader")
        self.clock = 0.0
        self.directory = Directory(self.dht, MODEL, 24, lambda: self.clock)
        self.server = Server(BlockRange(0, 12), self)
        self.balancer = Balancer(
            self.directory, Numerics(), self.server, quality, Willing(), lambda: self.clock
        )
        self.put(signed(ALICE, "0:12", throughput=1.0))
        self.put(signed(BOB, "12:24", throughput=1.0))

    def put(self, server: SignedRecord) -> None:
        subkeys = self.dht.values.setdefault(keys_of(server.record, None)[0], {})
        subkeys[server.record.peer_id] = (server.data, server.record.kept_until)

    def leave(self) -> None:
        """Bob."""
        self.put(signed(BOB, "12:24", now=NOW + 1, state=ServerState.OFFLINE))

    def look(self, seconds_later: float = 30.0) -> bool:
        self.clock += seconds_later
        self.dht.time += seconds_later
        return asyncio.run(self.balancer.look())


def test_whoever_is_needed_elsewhere_moves_and_stays() -> None:
    world = World()
    assert not world.look()
    world.leave()
    assert world.look()
    assert world.server.fetched == world.server.moves == [BlockRange(12, 24)]
    assert not any(world.look() for _ in range(10))


def test_a_dead_server_counts_until_it_has_been_silent_for_too_long() -> None:
    world = World()
    for seconds in range(30, 90, 30):  # of a lifetime of 90 s
        world.put(signed(ALICE, "0:12", now=NOW + seconds, throughput=1.0))
        assert not world.look()
    world.put(signed(ALICE, "0:12", now=NOW + 120, throughput=1.0))
    assert world.look(60.0)
    assert world.server.moves == [BlockRange(12, 24)]


def test_if_somebody_comes_first_nothing_was_given_up() -> None:
    world = World()
    world.leave()
    world.server.arrives = signed(EVE, "12:24", state=ServerState.JOINING)
    assert not world.look()
    assert world.server.fetched == [BlockRange(12, 24)]
    assert world.server.claimed is None


def test_of_two_that_would_move_at_the_same_moment_both_think_again() -> None:
    """Alice was there before, and claims what we claim."""
    world = World()
    world.leave()
    world.server.rival = signed(ALICE, "12:24", now=NOW + 1, state=ServerState.JOINING)
    assert not world.look()
    assert world.server.claimed == BlockRange(0, 12)
    assert (world.server.moves, world.server.blocks) == ([], BlockRange(0, 12))


def test_whoever_cannot_have_the_weights_does_not_try_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.leave()
    world.server.hub_is_down = True
    assert not world.look()
    assert "could not move, and stay for good: the hub cannot be reached" in caplog.text
    world.server.hub_is_down = False
    assert not any(world.look() for _ in range(10))
    asyncio.run(world.balancer.run(60.0))  # it is over


def test_without_a_view_nobody_moves() -> None:
    world = World()
    world.dht.down = True
    assert not world.look()


def test_only_those_count_that_can_share_a_route() -> None:
    world = World()
    world.put(signed(EVE, "0:24", numerics=Numerics(dtype="bfloat16")))
    world.put(signed(BOB, "12:24", now=NOW + 1, state=ServerState.DRAINING))
    view = asyncio.run(world.directory.refresh())
    [alice] = others_in(view, Numerics(), ME)
    assert alice == Holder(ALICE.peer_id, BlockRange(0, 12), 12.0)
    world.put(signed(ALICE, "0:12", now=NOW + 1, throughput=1.0, batch_throughput=3.0))
    view = asyncio.run(world.directory.refresh())
    assert [other.speed for other in others_in(view, Numerics(), ME)] == [36.0]
    assert others_in(view, Numerics(), ALICE.peer_id) == []


def test_of_two_that_chose_the_same_one_chooses_again() -> None:
    """Both looked before either was announced."""
    world = World()
    world.leave()
    before = asyncio.run(world.directory.refresh())
    for rival in (EVE, BOB):
        world.put(signed(rival, "12:18", now=NOW + 2, state=ServerState.JOINING))

    def decide(peer_id: str, known: SwarmView) -> str:
        me = Holder(peer_id, BlockRange(12, 18), 0.0)
        return str(asyncio.run(look_again(world.directory, known, Numerics(), me)))

    assert sorted(decide(peer.peer_id, before) for peer in (EVE, BOB)) == ["12:18", "18:24"]
    # Who was seen before the choice is counted, and need not yield...
    after = asyncio.run(world.directory.refresh())
    assert decide(EVE.peer_id, after) == "12:18"
    # ...unless it moves.
    world.put(signed(ALICE, "12:18", now=NOW + 3, state=ServerState.JOINING))
    assert decide(ALICE.peer_id, after) != decide(BOB.peer_id, after)
    world.dht.down, world.directory = True, Directory(world.dht, MODEL, 24)
    assert decide(EVE.peer_id, before) == "12:18"  # for want of anything better


def test_looks_are_spread_and_few_in_large_swarms() -> None:
    assert [next_look(60.0, 10, lot) for lot in (0.0, 0.5, 0.999)] == pytest.approx(
        [30.0, 60.0, 89.94]
    )
    assert 10_000 / next_look(60.0, 10_000, 0.5) <= 10  # records per second, each up to 1 kB
