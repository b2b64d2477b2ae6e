"""Our rules: the very functions that servers and clients run, fed with what the simulation knows.

Looks, announcements and lifetimes of records are those of `swarm/dht/announcer.py`, `directory.py`
and `swarm/client/network.py`; records are real, but for their signatures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simulation.load import FIXED, ROW
from simulation.rules import Leg, Server, Wanted
from simulation.world import Machine
from swarm.client.peers import PeerBook
from swarm.client.routing import Request, find_route
from swarm.dht.directory import Sighting, SwarmView, take_picture
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.server.placement import Holder, believe, choose_span, consider_move
from swarm.types import BlockRange, ModelId, Numerics

LIFETIME = 90  # seconds of a record; announced three times in it
_MODEL = ModelId("simulated", "0" * 64)
_NUMERICS = Numerics()
_BATCH = 16  # rows, of which records tell the throughput
_QUALITY = 0.75  # what --balance-quality is when nobody says
_NEIGHBOURS = 8  # possible next hops, to which a record tells the RTT
_OBSERVATIONS = 8  # a turn has a hundred steps; so many smoothed ones are as good as all
_BATCH_SECONDS = _BATCH * ROW + FIXED  # of a pass, where one row takes 1


@dataclass(slots=True)
class Picture:
    """The directory's view, and what servers derive from it, once for all who look now."""

    view: SwarmView
    holders: list[Holder] | None = None

    def believed(self) -> list[Holder]:
        if self.holders is None:
            self.holders = believe(_holders(self.view))
        return self.holders


class Client:
    """One client's PeerBook, and `find_route` by it."""

    def __init__(self, rules: OurRules, client: int) -> None:
        self._rules, self._client = rules, client
        self._rng = random.Random(f"ours {client}")
        self._book = PeerBook(self._rng)

    def route(self, picture: Picture, wanted: Wanted, now: float) -> Sequence[Leg]:
        half = wanted.positions // 2  # as ModelRouter asks, who does not know better
        request = Request(_MODEL, wanted.blocks, _NUMERICS, half, half)
        hops = find_route(
            picture.view.servers, request, self._book, now, tiebreak=self._rng.random()
        )
        return [(int(hop.server.record.peer_id[6:]), hop.blocks) for hop in hops]

    def look(self, picture: Picture, now: float) -> None: ...

    def failed(self, server: Server, now: float) -> None:
        self._book.failed(server.peer_id, now)

    def busy(self, server: Server, now: float) -> None:
        self._book.busy(server.peer_id, now, None)

    def opened(self, server: Server, rtt: float) -> None:
        self._book.measured(server.peer_id, rtt)

    def worked(self, server: Server, blocks: int, now: float) -> None:
        for _ in range(_OBSERVATIONS):
            self._book.worked(server.peer_id, 1, server.pass_seconds, blocks)


class OurRules:
    """Servers announce each half minute and when something changes, clients look each 20 s."""

    name = "ours"
    look_period = 20.0
    check_period = 120.0
    announce_period = LIFETIME / 3

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        server_rtt: Callable[[int, int], float],
        client_rtt: Callable[[int, int], float],
    ) -> None:
        self._frame = SwarmView(_MODEL, num_blocks)
        self._server_rtt, self._client_rtt = server_rtt, client_rtt
        self._rng = random.Random(f"ours {seed}")
        self._sightings: dict[str, Sighting] = {}

    def announce(self, server: Server, now: float) -> None:
        known = self._sightings.get(server.peer_id)
        signed = SignedRecord(self._describe(server, now), b"")
        self._sightings[server.peer_id] = Sighting(signed, now, known is not None)

    def _describe(self, server: Server, now: float) -> ServerRecord:
        loaded = server.state in (ServerState.ONLINE, ServerState.DRAINING)
        alone = throughput(server.machine, len(server.blocks)) if loaded else 0.0
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
            queue=round(server.waiting),
            free_tokens=server.free_tokens,
            announced_at=round(now * 1000),
            lifetime=LIFETIME,
        )

    def picture(self, now: float) -> Picture:
        for peer_id, sighting in list(self._sightings.items()):
            gone = sighting.signed.record.state is ServerState.OFFLINE
            if gone or now - sighting.since > 4 * LIFETIME:
                del self._sightings[peer_id]
        return Picture(take_picture(self._frame, self._sightings, now, now))

    def choose(self, server: Server, picture: Picture) -> BlockRange:
        return choose_span(self._frame.num_blocks, picture.believed(), server.machine.blocks)

    def consider(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        holders = picture.believed()
        me = Holder(server.peer_id, server.blocks, server.machine.speed)
        return consider_move(
            self._frame.num_blocks,
            holders,
            next((holder for holder in holders if holder.peer_id == me.peer_id), me),
            quality=_QUALITY,
            move_seconds=server.machine.load_seconds(len(me.blocks)),
            since_move=now - server.moved,
            now_random=self._rng.random(),
        )

    def memory(self, client: int) -> Client:
        return Client(self, client)


def _holders(view: SwarmView) -> list[Holder]:
    """Who holds what, or will soon, as servers read it from records."""
    return [
        Holder(record.peer_id, record.blocks, record.throughput * len(record.blocks))
        for record in (signed.record for signed in view.servers)
        if record.state in (ServerState.JOINING, ServerState.ONLINE)
        and record.peer_id not in view.silent
    ]


def throughput(machine: Machine, blocks: int) -> float:
    """Steps of one token per second through so many blocks, alone, as `throughput.py` measures."""
    return machine.speed / blocks
