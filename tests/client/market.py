"""Servers that say something of themselves, and clients that look for a route over them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from swarm.client.peers import PeerBook
from swarm.client.routing import Chart, Request, find_route
from swarm.dht.records import ServerRecord, SignedRecord
from swarm.types import BlockRange, ModelId, Numerics

MODEL = ModelId("tiny", "0" * 64)
NUMERICS = Numerics("float32")


def server(name: str, blocks: str, **fields: Any) -> SignedRecord:
    known: dict[str, Any] = {
        "model": MODEL,
        "num_blocks": 100,
        "host": "h",
        "port": 1,
        "certificate_digest": bytes(32),
        "numerics": NUMERICS,
        "throughput": 100.0,
        "free_tokens": 1 << 30,
    }
    record = ServerRecord(peer_id=name, blocks=BlockRange.parse(blocks), **(known | fields))
    return SignedRecord(record, b"")


def request(blocks: str, **changes: Any) -> Request:
    plain = Request(MODEL, BlockRange.parse(blocks), NUMERICS, prompt_tokens=16, new_tokens=32)
    return replace(plain, **changes)


def book(**rtts: float) -> PeerBook:
    peers = PeerBook(random.Random(0))
    for name, rtt in rtts.items():
        peers.measured(name, rtt)
    return peers


def route(
    servers: Sequence[SignedRecord] | Chart,
    wanted: Request,
    peers: PeerBook | None = None,
    **options: Any,
) -> list[tuple[str, str]]:
    hops = find_route(servers, wanted, peers or book(), now=0.0, **options)
    return [(hop.server.record.peer_id, str(hop.blocks)) for hop in hops]
