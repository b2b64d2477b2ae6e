"""The picture of the swarm: true while servers come, go, move, lie and fall silent."""

import asyncio
import random

import pytest

from swarm.dht.directory import Directory, ModelListing, SwarmView, list_models
from swarm.dht.memory import MemoryDht
from swarm.dht.records import REGISTRY, ServerState, SignedRecord, keys_of
from swarm.errors import PeerUnavailable
from swarm.identity import Identity, SwarmKey
from swarm.types import BlockRange, ModelId
from tests.dht.samples import ALICE, BOB, EVE, KEY, MODEL, NOW, OTHER_KEY, signed


class World:
    """A DHT, a directory, and one clock that both look at."""

    def __init__(self, key: SwarmKey | None = None) -> None:
        self.dht = MemoryDht("reader", key=key)
        self.clock = 0.0
        self.directory = Directory(self.dht, MODEL, 24, lambda: self.clock)

    def put(self, server: SignedRecord, *names: str) -> None:
        for name in names or keys_of(server.record, self.dht.key)[:1]:
            subkeys = self.dht.values.setdefault(name, {})
            subkeys[server.record.peer_id] = (server.data, server.record.kept_until)

    def look(self, seconds_later: float = 0.0) -> SwarmView:
        self.clock += seconds_later
        self.dht.time += seconds_later
        return asyncio.run(self.directory.refresh())


def spans(view: SwarmView) -> list[str]:
    return [str(server.record.blocks) for server in view.servers]


@pytest.mark.parametrize("key", [None, KEY])
def test_a_reader_sees_who_serves_what(key: SwarmKey | None) -> None:
    world = World(key)
    world.put(signed(BOB, "9:20", key=key))
    world.put(signed(ALICE, "0:9", key=key))
    view = world.look()
    assert spans(view) == ["0:9", "9:20"]
    assert [server.record.peer_id for server in view.holders(9)] == [BOB.peer_id]
    assert view.missing_blocks() == (BlockRange(20, 24),)
    assert view is world.directory.view


def test_others_have_their_turn_while_a_large_swarm_is_read() -> None:
    """Or a server's sessions would stand still for 0.2 ms per server, at each look."""
    world = World()
    server = signed(ALICE, "0:8")
    [key] = keys_of(server.record, None)[:1]
    world.dht.values[key] = {str(i): (server.data, server.record.kept_until) for i in range(40)}
    turns = 0

    async def look() -> None:
        nonlocal turns
        looking = asyncio.create_task(world.directory.refresh())
        while not looking.done():
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(look())
    assert turns >= 40 / 8


def test_a_recent_picture_will_do_for_whoever_says_so() -> None:
    world = World()
    first = asyncio.run(world.directory.recent(30.0))
    world.put(signed(ALICE, "0:9"))
    world.clock += 30.0
    assert asyncio.run(world.directory.recent(30.0)) is first
    world.clock += 1.0
    assert spans(asyncio.run(world.directory.recent(30.0))) == ["0:9"]


def test_an_empty_swarm_misses_every_block() -> None:
    assert World().look().missing_blocks() == (BlockRange(0, 24),)


@pytest.mark.parametrize("state", [ServerState.JOINING, ServerState.DRAINING])
def test_servers_that_take_no_sessions_are_seen_but_hold_nothing(state: ServerState) -> None:
    world = World()
    world.put(signed(ALICE, "0:24", state=state))
    view = world.look()
    assert spans(view) == ["0:24"]
    assert view.holders(3) == ()
    assert view.missing_blocks() == (BlockRange(0, 24),)


def test_who_said_farewell_is_gone_and_stays_gone() -> None:
    world = World()
    online = signed(ALICE, "0:24")
    world.put(online)
    assert spans(world.look()) == ["0:24"]
    world.put(signed(ALICE, "0:24", NOW + 1, state=ServerState.OFFLINE))
    assert spans(world.look(1)) == []
    world.put(online)  # a replica that missed the farewell
    assert spans(world.look(1)) == []


def test_a_server_that_moved_is_where_it_said_last() -> None:
    world = World()
    world.put(signed(ALICE, "0:8", NOW))
    world.put(signed(ALICE, "8:16", NOW + 5))
    assert spans(world.look()) == ["8:16"]


def test_other_weights_and_bad_records_are_as_if_they_did_not_exist() -> None:
    world = World()
    bucket = keys_of(signed(ALICE, "0:8").record, None)[0]
    world.put(signed(ALICE, "0:8", model=ModelId("demo", "cd" * 32)), bucket)
    world.put(signed(BOB, "0:8", num_blocks=48), bucket)
    world.put(signed(EVE, "0:8", key=OTHER_KEY), bucket)
    world.dht.values[bucket]["somebody"] = (b"garbage", NOW + 1e6)
    assert spans(world.look()) == []


def test_a_silent_server_gives_way_to_one_that_is_heard() -> None:
    world = World()
    world.put(signed(ALICE, "0:16"))
    world.put(signed(BOB, "8:24"))
    world.look()
    world.put(signed(BOB, "8:24", NOW + 60))
    view = world.look(91)
    assert spans(view) == ["0:16", "8:24"]  # nobody else holds blocks 0 to 7
    assert view.silent == {ALICE.peer_id}
    world.put(signed(EVE, "0:8", NOW + 91))
    view = world.look(1)
    assert spans(view) == ["0:8", "8:24"]
    assert not view.silent


def test_a_silent_server_is_heard_again() -> None:
    world = World()
    world.put(signed(ALICE, "0:24"))
    world.look()
    assert world.look(91).silent == {ALICE.peer_id}
    world.put(signed(ALICE, "0:24", NOW + 91))
    assert not world.look(1).silent


@pytest.mark.parametrize("wrong", [-3_500.0, 3_400.0])
def test_a_clock_an_hour_wrong_hides_nobody_who_keeps_talking(wrong: float) -> None:
    world = World()
    world.put(signed(ALICE, "0:24", NOW + wrong))
    assert spans(world.look()) == ["0:24"]
    world.put(signed(BOB, "0:24", NOW))
    for _ in range(5):
        world.put(signed(ALICE, "0:24", world.dht.time + 30 + wrong))
        world.put(signed(BOB, "0:24", world.dht.time + 30))
        world.look(30)
    assert spans(world.directory.view) == ["0:24", "0:24"]
    assert not world.directory.view.silent


def test_the_dead_are_forgotten_in_the_end() -> None:
    world = World()
    world.put(signed(ALICE, "0:24"))
    assert spans(world.look()) == ["0:24"]
    assert spans(world.look(3_800)) == []


def test_while_the_dht_is_down_the_last_picture_serves() -> None:
    world = World()
    world.dht.down = True
    with pytest.raises(PeerUnavailable):
        world.look()
    world.dht.down = False
    world.put(signed(ALICE, "0:24"))
    world.look()
    world.dht.down = True
    view = world.look(300)
    assert spans(view) == ["0:24"]
    assert view.silent == {ALICE.peer_id}


def test_models_are_listed_by_how_many_serve_them() -> None:
    world, other = World(), ModelId("other", "ef" * 32)
    for identity, model in [(ALICE, MODEL), (BOB, other), (EVE, other)]:
        world.put(signed(identity, model=model), REGISTRY)
    world.put(signed(Identity.ephemeral(), state=ServerState.OFFLINE), REGISTRY)
    listed = asyncio.run(list_models(world.dht))
    assert listed == (ModelListing(other, 24), ModelListing(MODEL, 24))


def test_a_picture_of_many_servers_is_exact() -> None:
    rng, world = random.Random(7), World()
    expected: dict[str, BlockRange] = {}
    for _ in range(10):
        identity, start = Identity.ephemeral(), rng.randrange(24)
        blocks = BlockRange(start, rng.randint(start + 1, 24))
        expected[identity.peer_id] = blocks
        world.put(signed(identity, str(blocks)))
    view = world.look()
    for block in range(24):
        holders = {server.record.peer_id for server in view.holders(block)}
        assert holders == {p for p, b in expected.items() if b.start <= block < b.end}
