"""Simulated clients see what real ones do: some pages of each bucket, and more if blocks miss."""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

import numpy as np
import pytest

from simulation.kademlia import PAGES
from simulation.pages import Bucket
from simulation.picture import MODEL, NUMERICS, Cuts, Likely, Pages, Picture, count_seen
from simulation.rules import peer_id_of
from swarm.dht.directory import SwarmView
from swarm.dht.pages import MAX_BITS, Shelf, count_buckets
from swarm.dht.records import ServerRecord, SignedRecord
from swarm.server.neighbours import choose_probes
from swarm.types import BlockRange

BLOCKS = 80


def record(index: int, start: int, **fields: Any) -> ServerRecord:
    return ServerRecord.model_construct(
        peer_id=peer_id_of(index),
        model=MODEL,
        numerics=NUMERICS,
        blocks=BlockRange(start, start + 10),
        num_blocks=BLOCKS,
        **fields,
    )


def pages_of(count: int) -> tuple[Pages, list[SignedRecord]]:
    servers = [SignedRecord(record(i, i * 7 % 71), b"") for i in range(count)]
    return Cuts(BLOCKS).cut(servers), servers


def places(seed: int) -> list[int]:
    lots = random.Random(seed)
    return [lots.randrange(1 << MAX_BITS) for _ in range(count_buckets(BLOCKS))]


def test_a_small_swarm_is_seen_whole_and_of_a_large_one_always_the_same_part() -> None:
    few, all_few = pages_of(200)
    assert {s.record.peer_id for s in few.read(places(0), BLOCKS)} == {
        s.record.peer_id for s in all_few
    }
    many, _ = pages_of(2000)
    mine, yours = (many.read(places(seed), BLOCKS) for seed in (0, 1))
    assert mine == many.read(places(0), BLOCKS)
    assert len({s.record.peer_id for s in mine}) == len(mine)
    assert 300 < len(mine) < 800
    assert {s.record.peer_id for s in mine} != {s.record.peer_id for s in yours}


@pytest.mark.parametrize("servers", [100, 1000, 10_000])
def test_clients_see_as_many_as_pages_that_servers_count_for_themselves_would_show(
    servers: int,
) -> None:
    rng, buckets = random.Random(0), count_buckets(BLOCKS)
    bucket = Bucket(f"server{i}" for i in range(servers // buckets))
    bucket.settle(rng)
    seen: list[int] = []
    for _ in range(20):
        shelf = Shelf(rng.randrange(1 << MAX_BITS))
        seen.append(len([bucket.read(shelf, PAGES) for _ in range(3)][-1][0]))
    assert count_seen(servers, BLOCKS) == pytest.approx(buckets * mean(seen), rel=0.25)


def test_whoever_misses_blocks_reads_on() -> None:
    pages, servers = pages_of(2000)
    rare = SignedRecord(record(9999, 70), b"")
    kept = [server for server in servers if server.record.blocks.end < 80]
    seen = [Cuts(BLOCKS).cut([*kept, rare]).read(places(seed), BLOCKS) for seed in range(5)]
    assert all(rare in found for found in seen)
    assert len(pages.read(places(0), BLOCKS)) < len(servers) / 2


def test_servers_choose_among_few_as_they_would_among_all() -> None:
    """The nearest stranger is the same one, and nobody who is known is forgotten."""
    lots = np.random.default_rng(0)
    spots = [(*map(int, lots.integers(-999, 999, 3)), 10) for _ in range(300)]
    others = [record(i, 10, coordinates=spot) for i, spot in enumerate(spots)]
    view = SwarmView(MODEL, BLOCKS, tuple(SignedRecord(other, b"") for other in others))
    me = record(1000, 0)
    likely = Picture(view, pages_of(1)[0], 0.75).likely_next(me)
    assert isinstance(likely, Likely)
    rtts = {other.peer_id: 0.1 for other in others[:20]}
    for seed in range(10):
        x, y, z = (0.01 * lots.standard_normal(3)).tolist()
        place = (x, y, z, 0.001)
        some = likely.some(me, place, rtts, random.Random(seed))
        assert rtts.keys() <= {other.peer_id for other in some}
        assert len(some) < 100
        asked, also = (
            choose_probes(choice, rtts, place, 4, random.Random(seed)) for choice in (some, others)
        )
        assert asked[2] == also[2]
