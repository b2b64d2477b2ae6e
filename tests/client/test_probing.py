"""A client asks few servers how far they are: those that a route may need, and none too often."""

import asyncio
import random

import pytest

from swarm.client.network import ModelRouter
from swarm.client.peers import PeerBook
from swarm.client.probing import choose_probes
from swarm.config import ClientConfig
from swarm.dht.directory import Directory, SwarmView
from swarm.dht.memory import MemoryDht
from swarm.dht.records import ServerState
from swarm.errors import NoRoute, PeerUnavailable
from swarm.transport import Endpoint
from tests.client.market import MODEL, book, request, server


def chosen(servers: list[str], peers: PeerBook, now: float = 0.0, count: int = 16) -> set[str]:
    """Of servers such as `name 0:8`."""
    records = [server(*text.split()) for text in servers]
    return {r.peer_id for r in choose_probes(records, peers, now, count, random.Random(0))}


def test_the_blocks_whose_holders_are_least_known_come_first() -> None:
    servers = [*(f"a{i} 0:8" for i in range(20)), "lonely 8:16"]
    assert "lonely" in chosen(servers, book(), count=2)
    assert len(chosen(servers, book())) == 5  # four of each block are enough
    known = book(a0=0.1, a1=0.1, a2=0.1)
    for name in ("a0", "a1", "a2"):
        known.asked(name, 0.0)
    assert len(chosen(servers, known) - {"lonely"}) == 1


def test_of_those_that_are_as_little_known_the_nearest_are_asked() -> None:
    peers = book()
    peers.coordinates = (0.0, 0.0, 0.0, 0.001)
    servers = [server(f"s{i:02}", "0:8", coordinates=(100 * i, 0, 0, 10)) for i in range(40)]
    servers += [server("nowhere", "0:8")]
    asked = choose_probes(servers[::-1], peers, 0.0, 3, random.Random(0))
    assert [record.peer_id for record in asked] == ["s00", "s01", "s02"]


def test_nobody_is_asked_too_often_nor_never_again() -> None:
    peers = book(known=0.1)
    for name in ("known", "deaf"):
        peers.asked(name, 0.0)
    servers = ["known 0:8", "deaf 0:8"]
    assert chosen(servers, peers, now=59.0) == set()
    assert chosen(servers, peers, now=60.0) == {"deaf"}
    assert chosen(servers, peers, now=600.0) == {"known", "deaf"}
    peers.failed("deaf", 600.0)
    assert chosen(servers, peers, now=600.1) == {"known"}


def test_who_takes_no_sessions_is_not_asked() -> None:
    leaving = server("leaving", "0:8", state=ServerState.DRAINING)
    assert choose_probes([leaving], book(), 0.0, 16, random.Random(0)) == []


def test_in_large_swarms_no_more_are_asked() -> None:
    lots = random.Random(0)
    starts = [lots.randint(0, 76) for _ in range(2000)]
    servers = [f"s{i} {start}:{start + 4}" for i, start in enumerate(starts)]
    assert len(chosen(servers, book(), count=16)) == 16


def router(servers: list[str]) -> ModelRouter:
    directory = Directory(MemoryDht("me"), MODEL, 100)
    records = tuple(server(*text.split()) for text in servers)
    directory.view = SwarmView(MODEL, 100, records)
    return ModelRouter(directory, book(), random.Random(0), ClientConfig())


def test_addresses_that_lead_nowhere_or_to_somebody_else_are_known_before_they_are_needed() -> None:
    async def measure(endpoint: Endpoint) -> float:
        if endpoint.peer_id == "nowhere":
            raise PeerUnavailable(f"{endpoint}: connection refused")
        return {"near": 0.01, "far": 0.3}[endpoint.peer_id]

    routes = router(["nowhere 0:8", "near 0:8", "far 0:8"])
    asyncio.run(routes.probe(measure, 16))
    for _ in range(20):
        [hop] = routes.choose(request("0:8"))
        assert hop.server.record.peer_id == "near"
        [priced] = routes.price([hop], request("0:8"))
        assert (priced.offer.rtt, priced.offer.rtt_known) == (0.01, True)
    alone = router(["nowhere 0:8"])
    asyncio.run(alone.probe(measure, 16))
    with pytest.raises(NoRoute, match="try again in"):
        alone.choose(request("0:8"))
