"""Which servers a client asks how far they are: few, and only those that a route may need."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Protocol

from swarm.client.peers import PeerBook
from swarm.coordinates import distance, unpack
from swarm.dht.records import ServerRecord, ServerState, SignedRecord

_ENOUGH = 4  # servers of a block that are known, before others of it are asked
_STALE = 600.0  # seconds, after which a distance is not known any more
_AGAIN = 60.0  # seconds, until somebody who did not answer is asked again
_SAMPLE = 64  # servers that are considered: it need not be the best choice


class Rng(Protocol):
    """A `random.Random`."""

    def sample(self, population: Sequence[ServerRecord], k: int) -> list[ServerRecord]: ...


def choose_probes(
    servers: Sequence[SignedRecord], book: PeerBook, now: float, count: int, rng: Rng
) -> list[ServerRecord]:
    """At most `count` servers, those first whose blocks have the fewest holders that are known, and
    of these the nearest ones, if coordinates tell: they are what routes would like to use."""
    known: dict[int, int] = {}
    strangers: list[ServerRecord] = []
    for record in (server.record for server in servers):
        asked = now - book.asked_at(record.peer_id)
        if record.state is not ServerState.ONLINE or now < book.banned_until(record.peer_id):
            continue
        if book.rtt(record.peer_id) is not None and asked < _STALE:
            _count(known, record)
        elif asked >= _AGAIN:
            strangers.append(record)
    strangers = rng.sample(strangers, min(_SAMPLE, len(strangers)))
    chosen: list[ServerRecord] = []
    while strangers and len(chosen) < count:
        needed = min(strangers, key=lambda r: (_least(known, r), _distance(book, r)))
        if _least(known, needed) >= _ENOUGH:
            break
        strangers.remove(needed)
        chosen.append(needed)
        _count(known, needed)
    return chosen


def _distance(book: PeerBook, record: ServerRecord) -> float:
    if book.coordinates is None or record.coordinates is None:
        return inf
    return distance(book.coordinates, unpack(record.coordinates))


def _least(known: dict[int, int], record: ServerRecord) -> int:
    return min(known.get(block, 0) for block in range(record.blocks.start, record.blocks.end))


def _count(known: dict[int, int], record: ServerRecord) -> None:
    for block in range(record.blocks.start, record.blocks.end):
        known[block] = known.get(block, 0) + 1
