"""Our rules: the very functions that servers and clients run, fed with what the simulation knows.

Looks, announcements and lifetimes of records are those of `swarm/dht/announcer.py`, `directory.py`,
`swarm/client/network.py` and `swarm/server/balancer.py`. Records are real, but not signed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from simulation.load import FIXED, ROW
from simulation.rules import Leg, Server, Stage, Wanted
from simulation.world import TOKEN_BYTES, Machine
from swarm import coordinates
from swarm.client.peers import PeerBook
from swarm.client.probing import choose_probes
from swarm.client.routing import Chart, Request, RouteHop, find_better, find_route, price_route
from swarm.config import ServerLimits
from swarm.coordinates import Coordinates
from swarm.dht.directory import Sighting, SwarmView, take_picture
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.errors import NoRoute
from swarm.server import neighbours
from swarm.server.balancer import next_look, others_in
from swarm.server.placement import Holder, believe, choose_span, consider_move, swarm_throughput
from swarm.types import BlockRange, ModelId, Numerics

LIFETIME = 90  # seconds of a record; announced three times in it
QUALITY = 0.75  # what --balance-quality is when nobody says
_LOOK_EVERY, _LOOK_RARELY, _PER_RECORD = 20.0, 32.0, 0.05  # seconds, of a client (network.py)
_FIRST_PROBES, _PROBES = 16, 2  # of a client (network.py)
_FIRST_NEIGHBOURS, _NEIGHBOURS = 8, 4  # of a server (neighbours.py)
_NEIGHBOURS_PERIOD, _PER_SERVER = 60.0, 0.1  # seconds
_LOOKS = 6  # of a client for each round of probes, so many times larger: saves time
_STRANGERS = 32  # servers that a simulated client draws before it looks closer at all these
_MANY = 1000  # steps, by whose price one is judged (network.py)
_OBSERVATIONS = 8  # a turn has a hundred steps; so many smoothed ones are as good as all
_BATCH = 16  # rows, of which records tell the throughput
_LIMITS = ServerLimits()
_MODEL = ModelId("simulated", "0" * 64)
_NUMERICS = Numerics()


@dataclass(slots=True)
class Picture:
    """The directory's view, and what follows from it, worked out once for all who look now."""

    view: SwarmView
    chart: Chart
    holders: list[Holder] | None = None
    share: float | None = None  # of what its servers could give, that the swarm gives
    likely: dict[int, list[ServerRecord]] = field(default_factory=dict[int, list[ServerRecord]])
    found: dict[str, SignedRecord] = field(default_factory=dict[str, SignedRecord])

    def believed(self) -> list[Holder]:
        if self.holders is None:
            self.holders = believe(others_in(self.view, _NUMERICS, "nobody"))
        return self.holders

    def is_well(self, quality: float) -> bool:
        """What `consider_move` asks first; the same for all who look, so asked once."""
        if self.share is None:
            count, holders = self.view.num_blocks, self.believed()
            ideal = sum(holder.speed for holder in holders) / count
            self.share = swarm_throughput(count, holders) / ideal if ideal else 0.0
        return self.share >= quality

    def likely_next(self, me: ServerRecord) -> list[ServerRecord]:
        """The same for all whose blocks end there."""
        end = me.blocks.end
        if end not in self.likely:
            records = (signed.record for signed in self.view.servers)
            self.likely[end] = neighbours.likely_next(me, records)
        return self.likely[end]

    def hops(self, legs: Sequence[Leg]) -> list[RouteHop] | None:
        """None: not all of them are announced any more."""
        records = self.records_of([f"server{index:08d}" for index, _ in legs])
        if len(records) < len(legs):
            return None
        return [RouteHop(signed, blocks) for signed, (_, blocks) in zip(records, legs, strict=True)]

    def records_of(self, peer_ids: Sequence[str]) -> list[SignedRecord]:
        if not self.found:
            self.found = {signed.record.peer_id: signed for signed in self.view.servers}
        return [self.found[name] for name in peer_ids if name in self.found]


class Client:
    """One client's PeerBook, its probes, and `find_route` by it."""

    def __init__(self, rules: OurRules, client: int) -> None:
        self._rules, self._client = rules, client
        self._rng = random.Random(f"ours {client}")
        self._book = PeerBook(self._rng)
        self._measured: dict[str, None] = {}
        self._looks = 0

    def route(self, picture: Picture, wanted: Wanted, now: float) -> Sequence[Leg]:
        request = _request(wanted, wanted.held + wanted.prompt)
        hops = find_route(picture.chart, request, self._book, now, tiebreak=self._rng.random())
        return [(_index(hop.server.record), hop.blocks) for hop in hops]

    def better(
        self, picture: Picture, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[Leg] | None:
        hops = picture.hops(legs)
        if hops is None:
            return None
        rest, lot = _request(wanted, wanted.prompt), self._rng.random()
        try:
            found = find_better(hops, picture.chart, rest, wanted.held, self._book, now, lot)
        except (NoRoute, KeyError):  # KeyError: one of them takes no sessions any more
            return None
        return [(_index(hop.server.record), hop.blocks) for hop in found] if found else None

    def expect(
        self, picture: Picture, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[float] | None:
        """As `ModelRouter.step_seconds`."""
        hops = picture.hops(legs)
        if hops is None:
            return None
        request = replace(_request(wanted, 0), new_tokens=_MANY)
        try:
            priced = price_route(hops, picture.chart, request, self._book, now)
        except KeyError:
            return None
        return [hop.seconds / _MANY for hop in priced]

    def look(self, picture: Picture, now: float) -> None:
        """Probe a few. Strangers are drawn first, or all clients would have to sift all servers."""
        self._looks += 1
        if self._looks % _LOOKS != 1:
            return
        count = _FIRST_PROBES if self._looks == 1 else _PROBES * _LOOKS
        servers = picture.view.servers
        strangers = self._rng.sample(servers, min(_STRANGERS, len(servers)))
        known = picture.records_of(list(self._measured))
        some = [*known, *(s for s in strangers if s.record.peer_id not in self._measured)]
        for record in choose_probes(some, self._book, now, count, self._rng):
            self._book.asked(record.peer_id, now)
            server = self._rules.servers[_index(record)]
            if server.alive:
                self._note_rtt(server, self._rules.client_rtt(self._client, server.index))
            else:
                self._book.failed(record.peer_id, now)
        self._book.locate(
            (name, coordinates.unpack(found.record.coordinates))
            for name in self._measured
            if (found := picture.found.get(name)) and found.record.coordinates
        )

    def failed(self, server: Server, now: float) -> None:
        self._book.failed(server.peer_id, now)

    def busy(self, server: Server, now: float) -> None:
        self._book.busy(server.peer_id, now, _LIMITS.kv_wait)

    def opened(self, server: Server, rtt: float) -> None:
        self._note_rtt(server, rtt)

    def _note_rtt(self, server: Server, rtt: float) -> None:
        self._book.measured(server.peer_id, rtt)
        self._measured[server.peer_id] = None

    def worked(self, server: Server, blocks: int, now: float) -> None:
        peer_id, seconds = server.peer_id, server.pass_seconds
        elapsed = server.delay + self._rules.client_rtt(self._client, server.index)
        for _ in range(_OBSERVATIONS):
            self._book.worked(peer_id, 1, seconds, blocks, elapsed=elapsed, now=now)


class OurRules:
    """Servers announce each half minute and when something changes, clients look each 20 s."""

    name = "ours"
    fetches_first = True
    announce_period = LIFETIME / 3

    def __init__(self, stage: Stage) -> None:
        scenario = stage.scenario
        self._frame = SwarmView(_MODEL, scenario.num_blocks)
        self.server_rtt, self.client_rtt = stage.server_rtt, stage.client_rtt
        self.look_period = min(_LOOK_RARELY, max(_LOOK_EVERY, _PER_RECORD * scenario.servers))
        self._rng = random.Random(f"ours {scenario.seed}")
        self._sightings: dict[str, Sighting] = {}
        self._rtts: dict[int, dict[str, float]] = {}  # that servers have measured
        self._places: dict[int, Coordinates] = {}  # where they say that they are
        self._uplinks: dict[int, float] = {}  # bytes per second that they have measured
        self.servers: dict[int, Server] = {}  # that have announced themselves

    def announce(self, server: Server, now: float) -> None:
        self.servers[server.index] = server
        known = self._sightings.get(server.peer_id)
        signed = SignedRecord(self._describe(server, now), b"")
        self._sightings[server.peer_id] = Sighting(signed, now, known is not None)

    def _describe(self, server: Server, now: float) -> ServerRecord:
        loaded = server.generation > 1 or server.state is not ServerState.JOINING
        alone = server.machine.speed / len(server.blocks) if loaded else 0.0
        place = self._places.get(server.index)
        return ServerRecord.model_construct(
            peer_id=server.peer_id,
            model=_MODEL,
            blocks=server.blocks,
            num_blocks=self._frame.num_blocks,
            host="host",
            port=1,
            certificate_digest=b"",
            numerics=_NUMERICS,
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
        return Picture(view, Chart(view.servers))

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
        return choose_span(self._frame.num_blocks, picture.believed(), server.machine.blocks)

    def next_check(self, random: float) -> float:
        return next_look(_LIMITS.balance_seconds, len(self._sightings), random)

    def consider(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        return self._consider(server, picture, now, self._rng.random())

    def confirm(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        return self._consider(server, picture, now, 0.0)

    def _consider(
        self, server: Server, picture: Picture, now: float, now_random: float
    ) -> BlockRange | None:
        if picture.is_well(QUALITY):
            return None
        holders = picture.believed()
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
        record = self._sightings[server.peer_id].signed.record
        rtts = self._rtts.get(server.index)
        likely = picture.likely_next(record)
        known = {r.peer_id: rtts[r.peer_id] for r in likely if r.peer_id in rtts} if rtts else {}
        count, place = (
            _FIRST_NEIGHBOURS if rtts is None else _NEIGHBOURS,
            self._places.get(server.index),
        )
        for other in neighbours.choose_probes(likely, known, place, count, self._rng):
            if self.servers[_index(other)].alive:
                known[other.peer_id] = self.server_rtt(server.index, _index(other))
            else:
                known.pop(other.peer_id, None)
        self._rtts[server.index], self._uplinks[server.index] = known, server.uplink
        self._places[server.index] = neighbours.find_place(likely, known, place, self._rng)
        period = max(_NEIGHBOURS_PERIOD, _PER_SERVER * len(picture.view.servers))
        return period * (0.5 + random)

    def memory(self, client: int) -> Client:
        return Client(self, client)


def _request(wanted: Wanted, prompt: int) -> Request:
    return Request(
        _MODEL,
        wanted.blocks,
        _NUMERICS,
        prompt_tokens=prompt,
        new_tokens=max(1, wanted.positions - wanted.held - wanted.prompt),
        position_bytes=TOKEN_BYTES,
    )


def _index(record: ServerRecord) -> int:
    return int(record.peer_id.removeprefix("server"))
