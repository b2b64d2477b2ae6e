"""What the DHT costs each node: messages counted in simulated look-ups, bytes by the wire's sizes.

As hivemind searches: a beam of 20 nodes, every one of them asked, since look-ups want the newest
records; each answers with 20 nodes that it knows and, if it is one of the 5 that keep the key, with
all records under it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm.dht.announcer import REGISTRY_ENTRIES
from swarm.dht.records import BLOCKS_PER_KEY, RETENTION

Ids = npt.NDArray[np.uint64]

BITS = 64  # instead of 160: as good for ten thousand nodes
BUCKET = 20  # nodes per distance in a routing table; also the beam of a search
REPLICAS = 5
QUESTION = 150  # bytes: keys, who asks, envelope
NODE = 62  # bytes of a node in an answer: its id, its peer id, tags
RECORD = 830  # bytes of a signed record (777 with all fields in use) with its subkey
ANNOUNCE, LOOK = 30.0, 20.0  # seconds (announcer.py, network.py)
SERVER_LOOK, PER_SERVER = 60.0, 0.1  # seconds (balancer.py, and the same again in neighbours.py)


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
    """Means over all servers, but for the last two, which are of the busiest node of all."""

    messages: float  # that one search asks
    announcing: float  # bytes/s in and out that a server's own announcements make
    looking: float  # bytes/s that a server's own looks make
    client: float  # bytes/s that a client's looks make
    answering: float  # bytes/s that a server sends to others
    registry: float  # bytes/s that a node sends who keeps the list of models
    keeping: float  # bytes/s that a node sends who keeps one of the model's keys


def traffic(
    servers: int, clients: int, num_blocks: int, seed: int = 0, mean_lifetime: float = 9976.0
) -> Traffic:
    """By the protocol as it is; searches are simulated, the rest is arithmetic."""
    overlay, rng = Overlay(servers, seed), np.random.default_rng(seed)
    searches = [
        overlay.search(int(rng.integers(servers)), int(rng.integers(0, 1 << 63)) * 2)
        for _ in range(100)
    ]
    messages = float(np.mean([len(asked) for asked in searches]))
    holders = min(REPLICAS, servers)
    search = messages * (QUESTION + BUCKET * NODE)
    keys = -(-num_blocks // BLOCKS_PER_KEY)
    records = servers * (1 + RETENTION / mean_lifetime)  # those of the dead are kept for so long
    registry = min(REGISTRY_ENTRIES, servers) * RECORD
    announcement = 2 * search + holders * (registry + QUESTION + RECORD)
    look = keys * search + holders * records * RECORD
    server_looks = 2 / max(SERVER_LOOK, PER_SERVER * servers)
    looks = clients / LOOK + servers * server_looks
    return Traffic(
        messages,
        announcement / ANNOUNCE,
        look * server_looks,
        look / LOOK,
        (look * looks + announcement * servers / ANNOUNCE) / servers,
        servers / ANNOUNCE * registry,
        looks * records / keys * RECORD,
    )
