"""Our rules for servers: the very functions that they run, fed with what the simulation knows.

Looks, announcements and lifetimes of records are those of `swarm/dht/announcer.py`, `directory.py`,
`swarm/client/network.py` and `swarm/server/balancer.py`. Records are real, but not signed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from simulation.load import FIXED, ROW
from simulation.our_clients import Client
from simulation.picture import MODEL, NUMERICS, Cuts, Picture, count_seen
from simulation.rules import Server, Stage, index_of
from simulation.world import Machine
from swarm import coordinates
from swarm.config import ServerLimits
from swarm.coordinates import Coordinates
from swarm.dht.directory import Sighting, SwarmView, take_picture
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.server import neighbours
from swarm.server.balancer import next_look
from swarm.server.placement import Holder, believe, choose_span, consider_move
from swarm.types import BlockRange

LIFETIME = 90  # seconds of a record; announced three times in it
QUALITY = 0.75  # what --balance-quality is when nobody says
_LOOK_EVERY, _LOOK_RARELY, _PER_RECORD = 20.0, 32.0, 0.05  # seconds, of a client (network.py)
_FIRST_NEIGHBOURS, _NEIGHBOURS = 8, 4  # of a server (neighbours.py)
_NEIGHBOURS_PERIOD, _PER_SERVER = 60.0, 0.1  # seconds
_BATCH = 16  # rows, of which records tell the throughput
_LIMITS = ServerLimits()


class OurRules:
    """Servers announce each half minute and when something changes, clients look each 20 s."""

    name = "ours"
    fetches_first = True
    announce_period = LIFETIME / 3

    def __init__(self, stage: Stage) -> None:
        scenario = stage.scenario
        self._frame = SwarmView(MODEL, scenario.num_blocks)
        self._stage, self._cuts = stage, Cuts(scenario.num_blocks)
        seen = count_seen(scenario.servers, scenario.num_blocks)
        self.look_period = min(_LOOK_RARELY, max(_LOOK_EVERY, _PER_RECORD * seen))
        self._rng = random.Random(f"ours {scenario.seed}")
        self._sightings: dict[str, Sighting] = {}
        self._rtts: dict[int, dict[str, float]] = {}  # that servers have measured
        self._places: dict[int, Coordinates] = {}  # where they say that they are
        self._uplinks: dict[int, float] = {}  # bytes per second that they have measured
        self._servers: dict[int, Server] = {}  # that have announced themselves

    def announce(self, server: Server, now: float) -> None:
        self._servers[server.index] = server
        known = self._sightings.get(server.peer_id)
        signed = SignedRecord(self._describe(server, now), b"")
        self._sightings[server.peer_id] = Sighting(signed, now, known is not None)

    def _describe(self, server: Server, now: float) -> ServerRecord:
        loaded = server.generation > 1 or server.state is not ServerState.JOINING
        alone = server.machine.speed / len(server.blocks) if loaded else 0.0
        place = self._places.get(server.index)
        return ServerRecord.model_construct(
            peer_id=server.peer_id,
            model=MODEL,
            blocks=server.blocks,
            num_blocks=self._frame.num_blocks,
            host="host",
            port=1,
            certificate_digest=b"",
            numerics=NUMERICS,
            state=server.state,
            throughput=alone,
            batch_throughput=alone * _BATCH / (FIXED + _BATCH * ROW),
            next_rtts=neighbours.pack(self._rtts.get(server.index, {})),
            queue=round(server.queue),
            free_tokens=server.free_tokens,
            coordinates=coordinates.pack(place) if place else None,
            uplink=int(self._uplinks.get(server.index, 0) / 1024),
            announced_at=round(now * 1000),
            lifetime=LIFETIME,
        )

    def picture(self, now: float) -> Picture:
        for peer_id, sighting in list(self._sightings.items()):
            gone = sighting.signed.record.state is ServerState.OFFLINE
            if gone or now - sighting.since > 4 * LIFETIME:
                del self._sightings[peer_id]
        view = take_picture(self._frame, self._sightings, now, now)
        return Picture(view, self._cuts.cut(view.servers), QUALITY)

    def settle(self, machines: Sequence[Machine]) -> list[BlockRange]:
        """Only the sums per block matter to `choose_span`: a holder for each block tells them."""
        count = self._frame.num_blocks
        sums = [Holder(str(block), BlockRange(block, block + 1), 0.0) for block in range(count)]
        typical = believe([Holder("", BlockRange(0, 1), machine.speed) for machine in machines])
        spans: list[BlockRange] = []
        for machine, believed in zip(machines, typical, strict=True):
            blocks = choose_span(count, sums, machine.blocks)
            for block in range(blocks.start, blocks.end):
                more = sums[block].speed + believed.speed / len(blocks)
                sums[block] = replace(sums[block], speed=more)
            spans.append(blocks)
        return spans

    def choose(self, server: Server, picture: Picture) -> BlockRange:
        return choose_span(self._frame.num_blocks, picture.believed, server.machine.blocks)

    def next_check(self, random: float) -> float:
        return next_look(_LIMITS.balance_seconds, len(self._sightings), random)

    def consider(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        return self._consider(server, picture, now, self._rng.random())

    def confirm(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        return self._consider(server, picture, now, 0.0)

    def _consider(
        self, server: Server, picture: Picture, now: float, now_random: float
    ) -> BlockRange | None:
        if picture.is_well:
            return None
        holders = picture.believed
        loading = server.machine.load_seconds(len(server.blocks))
        me = Holder(server.peer_id, server.blocks, server.machine.speed)
        return consider_move(
            self._frame.num_blocks,
            holders,
            next((holder for holder in holders if holder.peer_id == me.peer_id), me),
            quality=QUALITY,
            move_seconds=loading + (_LIMITS.stop_timeout if server.sessions else 0.0),
            since_move=now - server.moved,
            now_random=now_random,
        )

    def tend(self, server: Server, picture: Picture, random: float) -> float:
        """Measure how far some likely next servers are (`Neighbours.look`, smoothing left out)."""
        me, place = self._sightings[server.peer_id].signed.record, self._places.get(server.index)
        rtts = self._rtts.get(server.index)
        likely = picture.likely_next(me).some(me, place, rtts or {}, self._rng)
        known = {r.peer_id: rtts[r.peer_id] for r in likely if r.peer_id in rtts} if rtts else {}
        count = _FIRST_NEIGHBOURS if rtts is None else _NEIGHBOURS
        for other in neighbours.choose_probes(likely, known, place, count, self._rng):
            if self._servers[index_of(other)].alive:
                known[other.peer_id] = self._stage.server_rtt(server.index, index_of(other))
            else:
                known.pop(other.peer_id, None)
        self._rtts[server.index], self._uplinks[server.index] = known, server.uplink
        self._places[server.index] = neighbours.find_place(likely, known, place, self._rng)
        period = max(_NEIGHBOURS_PERIOD, _PER_SERVER * len(picture.view.servers))
        return period * (0.5 + random)

    def memory(self, client: int) -> Client:
        return Client(client, self._servers, self._stage)
