"""What can be seen in the DHT by whoever looks at one time: all servers, or some pages."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from simulation.kademlia import PAGES
from simulation.world import Floats
from swarm.client.routing import Chart
from swarm.coordinates import Coordinates
from swarm.dht.directory import SwarmView
from swarm.dht.pages import MAX_BITS, Shelf, bucket_of, count_buckets, next_bits, pages_of
from swarm.dht.records import ServerRecord, SignedRecord
from swarm.server.balancer import others_in
from swarm.server.neighbours import likely_next
from swarm.server.placement import Holder, believe, is_well
from swarm.types import ModelId, Numerics

MODEL = ModelId("simulated", "0" * 64)
NUMERICS = Numerics()
_NEAREST, _BY_LOT = 8, 32  # strangers among whom a server chooses whom to measure: saves time


class Cuts:
    """Into how many pages each bucket is cut. Servers count their own; here the mean one counts."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self.bits = [0] * count_buckets(num_blocks)
        self._hashes: dict[str, str] = {}

    def cut(self, servers: Sequence[SignedRecord]) -> Pages:
        buckets: list[list[SignedRecord]] = [[] for _ in self.bits]
        for server in servers:
            buckets[bucket_of(server.record.blocks.start, self._num_blocks)].append(server)
        sizes = map(len, buckets)
        self.bits = [settled(*both) for both in zip(self.bits, sizes, strict=True)]
        pages = [defaultdict[str, list[SignedRecord]](list) for _ in buckets]
        for bucket, bits, page in zip(buckets, self.bits, pages, strict=True):
            for server in bucket:
                page[self._hash(server.record.peer_id)[:bits]].append(server)
        return Pages(self.bits, pages)

    def _hash(self, peer_id: str) -> str:
        if peer_id not in self._hashes:
            self._hashes[peer_id] = pages_of(peer_id, MAX_BITS)[0]
        return self._hashes[peer_id]


def settled(bits: int, count: int) -> int:
    """How finely a bucket of so many records is cut in the end, from `bits` on."""
    while (new := next_bits(bits, count >> bits, 0, 2 * count >> bits)) != bits:
        bits = new
    return bits


def count_seen(servers: int, num_blocks: int) -> int:
    """How many of them a client sees, about."""
    bits = settled(0, servers // count_buckets(num_blocks))
    return round(servers * min(1.0, PAGES / (1 << bits)))


@dataclass(frozen=True, slots=True)
class Pages:
    """Records by bucket and page. Pages that overlap are left out: nobody lags behind here."""

    bits: Sequence[int]
    pages: Sequence[Mapping[str, list[SignedRecord]]]

    def read(self, places: Sequence[int], num_blocks: int) -> list[SignedRecord]:
        """What a client sees who begins at these places; more pages if blocks are missing."""
        count = PAGES
        while True:
            seen: list[SignedRecord] = []
            for place, bits, pages in zip(places, self.bits, self.pages, strict=True):
                shelf = Shelf(place)
                shelf.bits = bits
                for page in shelf.pages(count):
                    seen += pages.get(page, ())
            covered: set[int] = set()
            for server in seen:
                covered.update(range(server.record.blocks.start, server.record.blocks.end))
            if len(covered) == num_blocks or count >= 1 << max(self.bits):
                return seen
            count *= 2


@dataclass
class Picture:
    """The directory's view, and what follows from it, worked out once for all who look now."""

    view: SwarmView
    pages: Pages
    quality: float  # of `is_well`

    def __post_init__(self) -> None:
        self._likely: dict[int, Likely] = {}

    @cached_property
    def believed(self) -> list[Holder]:
        return believe(others_in(self.view, NUMERICS, "nobody"))

    @cached_property
    def is_well(self) -> bool:
        """What `consider_move` asks; the same for all who look, so asked once."""
        return is_well(self.view.num_blocks, self.believed, self.quality)

    @cached_property
    def _chart(self) -> Chart:
        return Chart(self.view.servers)

    def seen_from(self, places: Sequence[int]) -> list[SignedRecord]:
        """By a client who begins at these places of the buckets."""
        return self.pages.read(places, self.view.num_blocks)

    def chart_from(self, places: Sequence[int]) -> Chart:
        whole = 1 << max(self.pages.bits) <= PAGES
        return self._chart if whole else Chart(self.seen_from(places))

    def likely_next(self, me: ServerRecord) -> Likely:
        """The same for all whose blocks end there."""
        end = me.blocks.end % me.num_blocks
        if end not in self._likely:
            holders = self._chart.holders(MODEL, NUMERICS)
            places = holders.of_block(end)
            records = [holders.servers[place].record for place in places.tolist()]
            self._likely[end] = Likely(records, holders.places[places])
        return self._likely[end]


class Likely:
    """Who could follow where some blocks end, and where they are (`Holders.places`)."""

    def __init__(self, records: Sequence[ServerRecord], places: Floats) -> None:
        self._records, self._places = records, places
        self._named = {record.peer_id: record for record in records}

    def some(
        self,
        me: ServerRecord,
        place: Coordinates | None,
        rtts: Mapping[str, float],
        lots: random.Random,
    ) -> list[ServerRecord]:
        """Those whose RTTs are known, the nearest of the others, and a few by lot: who chooses
        whom to measure need not look at more of them."""
        records, count = self._records, len(rtts) + _NEAREST
        if place is not None and len(records) > count + _BY_LOT:
            away = self._places[:, :3] - np.array(place[:3])
            told = np.sqrt((away * away).sum(1)) + self._places[:, 3]  # nan, not known, is last
            nearest = [records[i] for i in told.argpartition(count)[:count].tolist()]
            known = [self._named[name] for name in rtts if name in self._named]
            some = [*known, *nearest, *lots.sample(records, _BY_LOT)]
            records = {record.peer_id: record for record in some}.values()
        return likely_next(me, records)
