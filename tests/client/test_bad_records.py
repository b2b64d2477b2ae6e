"""Records that lie are as if they did not exist, or cost their authors what they hoped to gain."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from swarm.client.hop import Terms, endpoint_of
from swarm.client.network import ModelRouter
from swarm.client.peers import PeerBook
from swarm.config import ClientConfig
from swarm.dht.directory import Directory
from swarm.dht.memory import MemoryDht
from swarm.dht.records import CLOCK_SLACK, SignedRecord, keys_of, peer_tag
from swarm.errors import NoRoute, PeerUnavailable
from swarm.transport import Endpoint
from swarm.types import BlockRange, Numerics
from tests.dht.samples import ALICE, BOB, EVE, MODEL, NOW, signed

WHOLE = BlockRange(0, 24)
TERMS = Terms(MODEL, Numerics(), hidden_size=64, batch_size=1, max_length=64)
ROOM: dict[str, Any] = {"free_tokens": 1 << 20, "throughput": 100.0}
HONEST = {
    ALICE.peer_id: signed(ALICE, "0:12", port=1, **ROOM),
    BOB.peer_id: signed(BOB, "12:24", port=2, **ROOM),
}
BAD: dict[str, Callable[[], SignedRecord]] = {
    "unsigned": lambda: tampered(slice(256, 512), bytes(256)),
    "signed by another key": lambda: tampered(slice(0, 256), EVE.public_key),
    "another address": lambda: tampered(slice(512, None), _payload(port=666)),
    "more blocks than it has": lambda: tampered(slice(512, None), _payload(blocks="0:24")),
    "a megabyte": lambda: SignedRecord(HONEST[ALICE.peer_id].record, bytes(1 << 20)),
    "replayed": lambda: signed(ALICE, "0:12", now=NOW - 30, port=666, **ROOM),
    "expired": lambda: signed(EVE, "0:24", now=NOW - CLOCK_SLACK - 601, **ROOM),
    "from the future": lambda: signed(EVE, "0:24", now=NOW + CLOCK_SLACK + 1, **ROOM),
    "of a larger model": lambda: signed(EVE, "0:4096", num_blocks=4096, **ROOM),
}


def tampered(where: slice, new: bytes) -> SignedRecord:
    good = HONEST[ALICE.peer_id]
    data = bytearray(good.data)
    data[where] = new
    return SignedRecord(good.record, bytes(data))


def _payload(blocks: str = "0:12", **fields: Any) -> bytes:
    return signed(ALICE, blocks, **ROOM | fields).data[512:]


def router_over(*servers: SignedRecord) -> ModelRouter:
    """Each record lies under all keys, those of others too."""
    dht = MemoryDht("me")
    names = {name for server in servers for name in keys_of(server.record, None)}
    names |= {name for server in HONEST.values() for name in keys_of(server.record, None)}
    for name in names:
        subkeys = {str(i): (s.data, NOW + 7200) for i, s in enumerate(servers)}
        dht.values[name] = subkeys
    dht.time = NOW
    directory = Directory(dht, MODEL, 24)
    asyncio.run(directory.refresh())
    return ModelRouter(directory, PeerBook(random.Random(0)), random.Random(0), ClientConfig())


def targets(router: ModelRouter) -> list[tuple[str, str, int]]:
    hops = router.route(WHOLE, TERMS)
    return [(str(blocks), hop.record.peer_id, hop.record.port) for hop, blocks in hops]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("first", [False, True])
def test_what_is_not_a_record_redirects_nobody(bad: str, *, first: bool) -> None:
    servers = [*HONEST.values(), BAD[bad]()]
    router = router_over(*(servers[::-1] if first else servers))
    for _ in range(10):
        assert targets(router) == [("0:12", ALICE.peer_id, 1), ("12:24", BOB.peer_id, 2)]


@pytest.mark.parametrize("wrong", [-3500.0, 3500.0])
def test_clocks_may_be_wrong_by_an_hour(wrong: float) -> None:
    """Only who renews its record is known to be there, then; but nobody is missing."""
    alice = signed(ALICE, "0:12", now=NOW + wrong, port=1, **ROOM)
    assert targets(router_over(alice, HONEST[BOB.peer_id])) == [
        ("0:12", ALICE.peer_id, 1),
        ("12:24", BOB.peer_id, 2),
    ]


def test_a_liar_is_left_once_it_was_seen_and_its_address_once_it_was_asked() -> None:
    """EVE claims to be next to everybody, to hold all, and to be quicker than anything."""
    near = {peer_tag(name): 0 for name in HONEST}
    lies: dict[str, Any] = {"throughput": 1e9, "batch_throughput": 1e9, "next_rtts": near}
    eve = signed(EVE, "0:24", **ROOM | lies)
    router = router_over(*HONEST.values(), eve)
    routes = [targets(router) for _ in range(200)]
    chosen = sum(route[0][1] == EVE.peer_id for route in routes)
    assert 0 < chosen < 200 * 0.7  # one client in four believes it, and of the others every second
    for name in (*HONEST, EVE.peer_id):
        router.measured(name, 0.01)  # by opening a session
    for name in HONEST:
        router.worked(name, 1, 0.01, 12, elapsed=0.02)
    router.worked(EVE.peer_id, 1, 0.0, 24, elapsed=1.0)  # 0 s, it says
    assert all(targets(router)[0][1] == ALICE.peer_id for _ in range(50))

    async def measure(endpoint: Endpoint) -> float:
        if endpoint == endpoint_of(eve.record):
            raise PeerUnavailable(f"{endpoint} shows the certificate of somebody else")
        return 0.01

    router = router_over(*HONEST.values(), eve)
    asyncio.run(router.probe(measure, 16))
    assert all(targets(router)[0][1] == ALICE.peer_id for _ in range(50))
    router = router_over(eve)
    asyncio.run(router.probe(measure, 16))
    with pytest.raises(NoRoute, match="try again in"):
        router.route(WHOLE, TERMS)
