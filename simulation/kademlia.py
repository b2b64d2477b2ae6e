"""What the DHT costs each node: messages counted in simulated look-ups, bytes by the wire's sizes.

As `swarm/dht/keeping.py` has hivemind search: a beam of 20 nodes, every one of them asked, and
each answers with 20 nodes that it knows. Those found are then asked, or told, directly. Which pages
there are, and who reads which, is simulated with the decisions of `swarm/dht/pages.py`.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulation.pages import Bucket
from swarm.dht.announcer import REGISTRY_ENTRIES
from swarm.dht.pages import MAX_BITS, Shelf, count_buckets
from swarm.dht.records import MAX_LIFETIME

Ids = npt.NDArray[np.uint64]

BITS = 64  # instead of 160: as good for ten thousand nodes
BUCKET = 20  # nodes per distance in a routing table; also the beam of a search
REPLICAS = 5
QUESTION = 150  # bytes: keys, who asks, envelope
NODE = 62  # bytes of a node in an answer: its id, its peer id, tags
RECORD = 830  # bytes of a signed record (777 with all fields in use) with its subkey
ANNOUNCE, SURVEYS = 30.0, 0.25  # seconds; so many of them are preceded by a survey (announcer.py)
SEARCH = 180.0  # seconds for which those are known who keep a key (keeping.py)
LOOK, LOOK_RARELY, LOOK_EACH = 20.0, 32.0, 0.05  # seconds between a client's looks (network.py)
PAGES, FEW = 2, 64  # that it reads of a bucket; servers up to which it asks all (directory.py)
SERVER_LOOK, PER_SERVER = 60.0, 0.1  # seconds (balancer.py, and the same again in neighbours.py)
SHARED = 1.5  # looks in such a time, as each of the two will do with a picture half as old
_READERS = 30  # that are simulated


class Overlay:
    """Nodes that know, for every distance, up to 20 others there; tables are drawn when asked."""

    def __init__(self, nodes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.ids: Ids = np.sort(rng.integers(0, 1 << 63, nodes, np.uint64) * np.uint64(2))
        self._seed = seed
        self._tables: dict[int, Ids] = {}

    def table(self, place: int) -> Ids:
        if place not in self._tables:
            rng = np.random.default_rng((self._seed, place))
            me, known = int(self.ids[place]), list[Ids]()
            for bit in range(BITS):
                low = (me ^ (1 << bit)) >> bit << bit  # the ids that first differ in that bit
                bounds = np.array([low, low + (1 << bit) - 1], np.uint64)
                first = int(np.searchsorted(self.ids, bounds[0]))
                last = int(np.searchsorted(self.ids, bounds[1], "right"))
                if last - first > BUCKET:
                    known.append(self.ids[rng.choice(np.arange(first, last), BUCKET, False)])
                else:
                    known.append(self.ids[first:last])
            self._tables[place] = np.concatenate(known)
        return self._tables[place]

    def search(self, start: int, key: int) -> list[int]:
        """Places of the nodes that are asked, in order, from the table of `start`."""
        target = np.uint64(key)
        waiting: list[tuple[int, int]] = []
        beam: list[int] = []  # the nearest distances, negative
        seen: set[int] = {int(self.ids[start])}
        asked: list[int] = []

        def meet(place: int) -> None:
            table = self.table(place)
            near = table[np.argsort(table ^ target)[:BUCKET]]
            for node in near.tolist():
                distance = node ^ key
                if node not in seen and (len(beam) < BUCKET or distance < -beam[0]):
                    seen.add(node)
                    heapq.heappush(waiting, (distance, node))
                    heapq.heappush(beam, -distance)
                    if len(beam) > BUCKET:
                        heapq.heappop(beam)

        meet(start)
        while waiting and (len(beam) < BUCKET or waiting[0][0] <= -beam[0]):
            _, node = heapq.heappop(waiting)
            asked.append(int(np.searchsorted(self.ids, np.uint64(node))))
            meet(asked[-1])
        return asked


@dataclass(frozen=True, slots=True)
class Traffic:
    """Means over all servers, but for the last two, which are of the busiest nodes of all."""

    messages: float  # that one search asks
    page: float  # records on a page, those of servers that are gone included
    seen: float  # servers that a client knows
    announcing: float  # bytes/s in and out that a server's own announcements make
    looking: float  # bytes/s that a server's own looks make
    client: float  # bytes/s that a client's looks make
    answering: float  # bytes/s that a server sends to others
    registry: float  # bytes/s that a node sends who keeps the list of models
    keeping: float  # bytes/s that a node sends who keeps a page


def traffic(
    servers: int, clients: int, num_blocks: int, seed: int = 0, mean_lifetime: float = 9976.0
) -> Traffic:
    """By the protocol as it is; searches and pages are simulated, the rest is arithmetic."""
    overlay, rng = Overlay(servers, seed), np.random.default_rng(seed)
    searches = [
        overlay.search(int(rng.integers(servers)), int(rng.integers(0, 1 << 63)) * 2)
        for _ in range(100)
    ]
    messages = float(np.mean([len(asked) for asked in searches]))
    search = messages * (QUESTION + BUCKET * NODE)
    library = _Library(servers, count_buckets(num_blocks), seed)
    holders = min(REPLICAS, servers)
    asked = 1 if library.seen >= FEW else holders
    records = library.on_page * (1 + MAX_LIFETIME / mean_lifetime)
    page = QUESTION + BUCKET * NODE + records * RECORD
    kept = search / SEARCH  # bytes/s for knowing who keeps a key

    period = max(LOOK, min(LOOK_RARELY, LOOK_EACH * library.seen))
    look = library.read * page * asked + search  # the finer page that is tried is a new one
    client = look / period + library.read * kept
    every = max(SERVER_LOOK, PER_SERVER * servers) / SHARED
    whole = library.total * (page * asked + search * min(1.0, every / SEARCH))
    written = 2 if library.bits else 1
    survey = 2 * (2 if library.bits else 1) * page
    registry = SURVEYS / ANNOUNCE * 2.0**-library.bits * 2 * REGISTRY_ENTRIES * RECORD
    announcing = (
        written * (holders * (QUESTION + RECORD) / ANNOUNCE + kept)
        + survey * SURVEYS / ANNOUNCE
        + registry
        + kept
    )
    reads = clients * library.read / period + servers * library.total / every
    return Traffic(
        messages,
        records,
        library.seen,
        announcing,
        whole / every,
        client,
        (client * clients + (whole / every + announcing) * servers) / servers,
        servers * registry / holders,
        (reads * asked / holders / library.total + 2 * library.on_page * SURVEYS / ANNOUNCE) * page,
    )


class _Library:
    """What the pages of a model come to: one bucket is simulated, the others are like it."""

    def __init__(self, servers: int, buckets: int, seed: int) -> None:
        rng, count = random.Random(seed), -(-servers // buckets)
        bucket = Bucket(f"server{seed}-{i}" for i in range(count))
        bucket.settle(rng)
        seen, read, sizes = 0, 0, list[int]()
        for _ in range(_READERS):
            shelf = Shelf(rng.randrange(1 << MAX_BITS))
            looks = [bucket.read(shelf, PAGES) for _ in range(3)]
            found, pages = looks[-1]  # by now it stays where it is
            seen, read = seen + len(found), read + len(pages)
            sizes += [len(bucket.page(page)) for page in pages]
        self.bits = float(np.median(list(bucket.bits.values())))
        self.seen = min(servers, buckets * seen / _READERS)
        self.read = buckets * read / _READERS  # pages in a client's look
        shelf = Shelf(rng.randrange(1 << MAX_BITS))
        everything = [bucket.read(shelf, None)[1] for _ in range(3)][-1]
        self.total = buckets * len(everything)  # pages in a server's
        self.on_page = float(np.mean(sizes)) * min(1.0, servers / (count * buckets))
