"""Our rules for clients: what each sees of the swarm and learns of it, and `find_route` by that.

As `swarm/client/network.py` does it, with the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from simulation.picture import MODEL, NUMERICS, Picture
from simulation.rules import Leg, Server, Stage, Wanted, index_of, peer_id_of
from simulation.world import TOKEN_BYTES
from swarm import coordinates
from swarm.client.peers import PeerBook
from swarm.client.probing import choose_probes
from swarm.client.routing import Chart, Request, RouteHop, find_better, find_route, price_route
from swarm.config import ServerLimits
from swarm.dht.pages import MAX_BITS, count_buckets
from swarm.dht.records import SignedRecord
from swarm.errors import NoRoute

_FIRST_PROBES, _PROBES = 16, 2  # of a client (network.py)
_LOOKS = 6  # of a client for each round of probes, so many times larger: saves time
_STRANGERS = 32  # servers that a simulated client draws before it looks closer at all these
_MANY = 1000  # steps, by whose price one is judged (network.py)
_OBSERVATIONS = 8  # a turn has a hundred steps; so many smoothed ones are as good as all
_LIMITS = ServerLimits()


class Client:
    """One client's PeerBook, its probes, and `find_route` by it, over the servers that it sees."""

    def __init__(self, client: int, servers: Mapping[int, Server], stage: Stage) -> None:
        self._client, self._servers, self._rtt = client, servers, stage.client_rtt
        self._rng = random.Random(f"ours {client}")
        self._book = PeerBook(self._rng)
        buckets = range(count_buckets(stage.scenario.num_blocks))
        self._pages = [self._rng.randrange(1 << MAX_BITS) for _ in buckets]
        self._picture: Picture | None = None  # whose chart is kept
        self._chart = Chart(())
        self._looks = 0

    def _seen(self, picture: Picture) -> Chart:
        if picture is not self._picture:
            self._picture, self._chart = picture, picture.chart_from(self._pages)
        return self._chart

    def route(self, picture: Picture, wanted: Wanted, now: float) -> Sequence[Leg]:
        request, lot = _request(wanted, wanted.held + wanted.prompt), self._rng.random()
        return _legs(find_route(self._seen(picture), request, self._book, now, tiebreak=lot))

    def better(
        self, picture: Picture, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[Leg] | None:
        hops, chart = self._hops(picture, legs), self._seen(picture)
        if hops is None:
            return None
        rest, lot = _request(wanted, wanted.prompt), self._rng.random()
        try:
            found = find_better(hops, chart, rest, wanted.held, self._book, now, lot)
        except NoRoute:
            return None
        return _legs(found) if found else None

    def expect(
        self, picture: Picture, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[float] | None:
        """As `ModelRouter.step_seconds`."""
        hops = self._hops(picture, legs)
        if hops is None:
            return None
        request = replace(_request(wanted, 0), new_tokens=_MANY)
        priced = price_route(hops, self._seen(picture), request, self._book, now)
        return [hop.seconds / _MANY for hop in priced]

    def _hops(self, picture: Picture, legs: Sequence[Leg]) -> list[RouteHop] | None:
        """None: one of them takes no sessions any more."""
        holders = self._seen(picture).holders(MODEL, NUMERICS)
        places = [holders.place_of.get(peer_id_of(index), -1) for index, _ in legs]
        if -1 in places:
            return None
        return [
            RouteHop(holders.servers[place], blocks)
            for place, (_, blocks) in zip(places, legs, strict=True)
        ]

    def look(self, picture: Picture, now: float) -> None:
        """Probe a few. Strangers are drawn first, which saves time, as do fewer rounds."""
        self._looks += 1
        if self._looks % _LOOKS != 1:
            return
        count = _FIRST_PROBES if self._looks == 1 else _PROBES * _LOOKS
        known: list[SignedRecord] = []
        strangers: list[SignedRecord] = []
        for server in picture.seen_from(self._pages):
            measured = self._book.rtt(server.record.peer_id) is not None
            (known if measured else strangers).append(server)
        some = known + self._rng.sample(strangers, min(_STRANGERS, len(strangers)))
        for record in choose_probes(some, self._book, now, count, self._rng):
            self._book.asked(record.peer_id, now)
            server = self._servers[index_of(record)]
            if server.alive:
                self._book.measured(server.peer_id, self._rtt(self._client, server.index))
            else:
                self._book.failed(record.peer_id, now)
        self._book.locate(
            (server.record.peer_id, coordinates.unpack(server.record.coordinates))
            for server in some
            if server.record.coordinates
        )

    def failed(self, server: Server, now: float) -> None:
        self._book.failed(server.peer_id, now)

    def busy(self, server: Server, now: float) -> None:
        self._book.busy(server.peer_id, now, _LIMITS.kv_wait)

    def opened(self, server: Server, rtt: float) -> None:
        self._book.measured(server.peer_id, rtt)

    def worked(self, server: Server, blocks: int, now: float) -> None:
        peer_id, seconds = server.peer_id, server.pass_seconds
        elapsed = server.delay + self._rtt(self._client, server.index)
        for _ in range(_OBSERVATIONS):
            self._book.worked(peer_id, 1, seconds, blocks, elapsed=elapsed, now=now)


def _request(wanted: Wanted, prompt: int) -> Request:
    return Request(
        MODEL,
        wanted.blocks,
        NUMERICS,
        prompt_tokens=prompt,
        new_tokens=max(1, wanted.positions - wanted.held - wanted.prompt),
        position_bytes=TOKEN_BYTES,
    )


def _legs(hops: Sequence[RouteHop]) -> list[Leg]:
    return [(index_of(hop.server.record), hop.blocks) for hop in hops]
