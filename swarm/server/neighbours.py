"""How far the servers are that a route could go to from here, and where that puts this server: it
announces both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from heapq import nsmallest
from typing import Protocol

from swarm import coordinates
from swarm.coordinates import Coordinates, Packed
from swarm.dht.directory import Directory
from swarm.dht.records import (
    MAX_NEXT_RTTS,
    Milliseconds,
    ServerRecord,
    ServerState,
    SignedRecord,
    peer_tag,
)
from swarm.errors import PeerUnavailable, SwarmError
from swarm.transport import Endpoint

logger = logging.getLogger(__name__)

_PERIOD = 60.0  # seconds between two rounds...
_SECONDS_PER_SERVER = 0.1  # ...and for each server that is looked up: 10 kB/s
_PROBES = 4  # servers that are asked in a round; twice as many in the first one
_WEIGHED = 2  # of them, to which 128 KiB are sent: 4 kB/s
_SMOOTHING = 0.3  # weight of the newest observation
_MAX_MILLISECONDS = 65_535
_MAX_UPLINK = (1 << 32) - 1  # KiB/s

Measure = Callable[[Endpoint], Awaitable[float]]
"""Seconds to a server and back, or bytes per second on the way there. Raises SwarmError."""


class Rng(Protocol):
    """A `random.Random`."""

    def random(self) -> float: ...


class Neighbours:
    """Run `run` as a task; `next_rtts`, `coordinates` and `uplink` are for the record."""

    def __init__(
        self,
        directory: Directory,
        describe: Callable[[], ServerRecord],
        measure: Measure,
        weigh: Measure,
        rng: Rng,
    ) -> None:
        self._directory, self._describe = directory, describe
        self._measure, self._weigh = measure, weigh
        self.uplink = 0  # KiB per second that the line to others has left; 0: not known
        self._rng = rng
        self._rtts: dict[str, float] = {}  # seconds by peer id
        self._place: Coordinates | None = None

    @property
    def next_rtts(self) -> dict[str, int]:
        return pack(self._rtts)

    @property
    def coordinates(self) -> Packed | None:
        return coordinates.pack(self._place) if self._place is not None else None

    async def run(self) -> None:
        """Measure a few at a time, until cancelled."""
        probes, age = 2 * _PROBES, 0.0
        while True:
            try:
                view = await self._directory.recent(age)
            except PeerUnavailable as error:
                logger.info("cannot see who could follow: %s", error)
                view = self._directory.view
            await self.look(view.servers, probes)
            probes = _PROBES
            period = max(_PERIOD, _SECONDS_PER_SERVER * len(view.servers))
            age = period / 2
            await asyncio.sleep(period * (0.5 + self._rng.random()))

    async def look(self, servers: Sequence[SignedRecord], probes: int) -> None:
        """One round, over the servers that there are."""
        likely = likely_next(self._describe(), (server.record for server in servers))
        self._rtts = {r.peer_id: self._rtts[r.peer_id] for r in likely if r.peer_id in self._rtts}
        chosen = choose_probes(likely, self._rtts, self._place, probes, self._rng)
        await asyncio.gather(*map(self._probe, chosen))
        self._place = find_place(likely, self._rtts, self._place, self._rng)
        # One after the other, and the best counts: others' lines may be slower than ours.
        reached = [record for record in chosen if record.peer_id in self._rtts][:_WEIGHED]
        rates = [await self._rate(record) for record in reached]
        if best := max(rates, default=0.0):
            self.uplink = max(1, min(_MAX_UPLINK, int(best / 1024)))

    async def _rate(self, record: ServerRecord) -> float:
        try:
            return await self._weigh(_endpoint(record))
        except SwarmError as error:
            logger.debug("cannot reach %s: %s", record.peer_id, error)
            return 0.0

    async def _probe(self, record: ServerRecord) -> None:
        name = record.peer_id
        try:
            rtt = await self._measure(_endpoint(record))
        except SwarmError as error:
            logger.debug("cannot reach %s: %s", name, error)
            self._rtts.pop(name, None)
        else:
            known = self._rtts.get(name, rtt)
            self._rtts[name] = known + _SMOOTHING * (rtt - known)


def _endpoint(record: ServerRecord) -> Endpoint:
    return Endpoint(record.host, record.port, record.peer_id, record.certificate_digest)


def likely_next(me: ServerRecord, others: Iterable[ServerRecord]) -> list[ServerRecord]:
    """Who can go on where our blocks end, or sooner, and computes as we do. After the last block
    comes the first one: that is of no use to routes, but tells where we are."""
    end = me.blocks.end % me.num_blocks
    return [
        other
        for other in others
        if other.peer_id != me.peer_id
        and other.state is ServerState.ONLINE
        and other.numerics == me.numerics
        and other.blocks.start <= end < other.blocks.end
    ]


def find_place(
    likely: Iterable[ServerRecord],
    rtts: Mapping[str, float],
    present: Coordinates | None,
    rng: Rng,
) -> Coordinates:
    """By where others say that they are, and how far those are."""
    known = [
        (coordinates.unpack(other.coordinates), rtts[other.peer_id])
        for other in likely
        if other.coordinates is not None and other.peer_id in rtts
    ]
    return coordinates.locate(known, present) or coordinates.somewhere(rng)


def choose_probes(
    likely: Sequence[ServerRecord],
    rtts: Mapping[str, float],
    place: Coordinates | None,
    count: int,
    rng: Rng,
) -> list[ServerRecord]:
    """Half of them from those that are announced now, so that it stays true; the rest from those
    that may be nearer: whom coordinates put nearest of all strangers, and others by lot."""
    announced = pack(rtts).keys()
    near = [record for record in likely if peer_tag(record.peer_id) in announced]
    others = [record for record in likely if peer_tag(record.peer_id) not in announced]
    chosen = _draw(near, count - min(count // 2, len(others)), rng)
    wanted = count - len(chosen)
    if place is not None:
        strangers = [o for o in others if o.coordinates is not None and o.peer_id not in rtts]
        nearest = nsmallest(wanted // 2, strangers, key=lambda other: _distance(place, other))
        chosen += nearest
        taken = {other.peer_id for other in nearest}
        others = [other for other in others if other.peer_id not in taken]
    return chosen + _draw(others, count - len(chosen), rng)


def _distance(place: Coordinates, other: ServerRecord) -> float:
    assert other.coordinates is not None
    return coordinates.distance(place, coordinates.unpack(other.coordinates))


def pack(rtts: Mapping[str, float]) -> dict[str, Milliseconds]:
    """The nearest ones, as a record says it."""
    nearest = sorted(rtts, key=lambda name: rtts[name])[:MAX_NEXT_RTTS]
    return {peer_tag(name): min(_MAX_MILLISECONDS, int(1e3 * rtts[name])) for name in nearest}


def _draw(records: Sequence[ServerRecord], count: int, rng: Rng) -> list[ServerRecord]:
    return sorted(records, key=lambda _: rng.random())[:count]
