"""A model's router: requests as sessions mean them, moves, expectations, who may be used."""

import random
from dataclasses import replace
from typing import Any

import pytest

from swarm.client.hop import Terms
from swarm.client.network import ModelRouter, SwarmNetwork
from swarm.config import ClientConfig
from swarm.dht.directory import Directory, SwarmView
from swarm.dht.memory import MemoryDht
from swarm.dht.records import ServerState, SignedRecord
from swarm.errors import NoRoute
from swarm.types import BlockRange, Numerics
from tests.client.market import MODEL, NUMERICS, book, server

TERMS = Terms(MODEL, NUMERICS, hidden_size=4096, batch_size=2, max_length=512)
BOTH = BlockRange(0, 16)
LEGS = [("slow", BlockRange(0, 8)), ("tail", BlockRange(8, 16))]
SERVERS = (server("slow", "0:8"), server("fast", "0:8"), server("tail", "8:16"))


def router(*servers: SignedRecord, config: ClientConfig | None = None) -> ModelRouter:
    directory, peers = Directory(MemoryDht("me"), MODEL, 16), book(slow=0.3, fast=0.01, tail=0.01)
    directory.view = SwarmView(MODEL, 16, servers)
    return ModelRouter(directory, peers, random.Random(0), config or ClientConfig())


def names(route: list[tuple[SignedRecord, BlockRange]]) -> list[str]:
    return [hop.record.peer_id for hop, _ in route]


def test_a_session_moves_between_turns_and_stays_where_it_is_good() -> None:
    routes = router(*SERVERS)
    assert names(list(routes.better(LEGS, TERMS, 100) or [])) == ["fast", "tail"]
    assert routes.better([("fast", BlockRange(0, 8)), LEGS[1]], TERMS, 100) is None
    assert routes.better(LEGS, TERMS, 511) is None  # one token is left
    assert routes.better([("gone", BlockRange(0, 8)), LEGS[1]], TERMS, 100) is None
    assert router(SERVERS[0], SERVERS[2]).better(LEGS, TERMS, 100) is None
    draining = server("slow", "0:8", state=ServerState.DRAINING)
    assert router(draining, *SERVERS[1:]).better(LEGS, TERMS, 100) is None  # it asks to be left


def test_what_a_hop_takes_is_expected_as_it_is_seen() -> None:
    """From the client's point of view: its RTT and computing, by way of the client."""
    one = replace(TERMS, batch_size=1)
    steps = router(*SERVERS).step_seconds(LEGS, one)
    assert steps == pytest.approx([0.31, 0.02], rel=0.01)
    assert router(*SERVERS[1:]).step_seconds(LEGS, one) is None


def test_an_opening_that_waited_for_memory_moves_nobody_away() -> None:
    routes = router(*SERVERS)
    routes.measured("fast", 3.0)
    assert names(list(routes.route(BOTH, TERMS))) == ["fast", "tail"]


def test_routes_use_whom_the_client_allows_and_nobody_it_has_blocked() -> None:
    slow, fast, tail = SERVERS
    assert names(list(router(*SERVERS).route(BOTH, TERMS))) == ["fast", "tail"]
    blocking = ClientConfig(blocked_servers=frozenset({"fast"}))
    assert names(list(router(*SERVERS, config=blocking).route(BOTH, TERMS))) == ["slow", "tail"]
    allowing = ClientConfig(allowed_servers=frozenset({"fast"}))
    with pytest.raises(NoRoute, match=r"8:16 of tiny are held only by servers that this client"):
        router(slow, fast, tail, config=allowing).route(BOTH, TERMS)


def test_one_liar_does_not_decide_what_all_compute_in() -> None:
    half = Numerics(dtype="bfloat16")
    honest = [server("head", "0:8", numerics=half), server("tail", "8:16", numerics=half)]
    liar = server("liar", "0:16", numerics=Numerics(dtype="float32"))
    network: Any = object.__new__(SwarmNetwork)
    assert network.numerics(router(*honest, liar), None) == half
    alone = network.numerics(router(honest[0], liar), None)
    assert alone.dtype == "float32", "the other one has not all blocks"


def test_the_prompt_decides_if_it_is_known() -> None:
    """Far and quick with prompts, or near and slow with them."""
    routes = router(server("slow", "0:8"), server("fast", "0:8"))
    routes.pace.computed("slow", 8, 512, 0.01)
    routes.pace.computed("fast", 8, 512, 10.0)
    blocks, terms = BlockRange(0, 8), replace(TERMS, batch_size=1, max_length=2000)
    assert names(list(routes.route(blocks, terms, 4))) == ["fast"]
    assert names(list(routes.route(blocks, terms, 1990))) == ["slow"]
