"""Which servers a session should use: the chain that is expected to take the least time.

Also whether another chain is worth the trouble of moving there, and why one was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from statistics import median

from swarm.client.peers import PeerBook
from swarm.client.pricing import Chart, Holders, Offer, Prices, Request
from swarm.client.sweep import cheapest
from swarm.dht.records import ServerRecord, SignedRecord
from swarm.errors import NoRoute
from swarm.types import BlockRange

__all__ = [
    "Chart",
    "PricedHop",
    "Request",
    "RouteHop",
    "better_route",
    "find_better",
    "find_route",
    "is_slow",
    "price_route",
]

JUDGED = 8  # steps by which a hop is judged
_SLOW = 2.0  # times what was expected...
_PATIENCE = 0.02  # ...and so many seconds more, before a hop counts as slow
_GAIN = 0.25  # of the time still to come, that another route must save...
_LEAST_GAIN = 1.0  # ...and so many seconds


@dataclass(frozen=True, slots=True)
class RouteHop:
    """`blocks` of what this server holds."""

    server: SignedRecord
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class PricedHop:
    """A hop and what makes its price; seconds are for the whole request."""

    hop: RouteHop
    offer: Offer
    link: float  # for coming there from the hop before otherwise than by way of the client

    @property
    def seconds(self) -> float:
        return self.offer.fixed + self.offer.per_block * len(self.hop.blocks) + self.link

    def __str__(self) -> str:
        offer, record = self.offer, self.hop.server.record
        distance = f"rtt {1e3 * offer.rtt:.1f} ms" + ("" if offer.rtt_known else " (assumed)")
        block = f"{1e3 * offer.block_seconds:.2f} ms/block ({offer.source})"
        room = "" if offer.has_room else ", no room for all of it"
        return (
            f"{self.hop.blocks} at {record.host}:{record.port} ({record.peer_id[-8:]}): "
            f"{self.seconds:.3f} s: {distance}, {block}, queue {record.queue}{room}"
        )


def find_route(
    servers: Sequence[SignedRecord] | Chart,
    request: Request,
    book: PeerBook,
    now: float,
    *,
    tiebreak: float | None = 0.0,
) -> tuple[RouteHop, ...]:
    """Hops that cover `request.blocks` in order, without gap or overlap.

    Clients with different `tiebreak` spread over servers that are about as good. A Chart of the
    servers is worth making for more than one route. Raises NoRoute, which names what is missing.
    """
    holders = _chart(servers).holders(request.model, request.numerics)
    if not holders.servers:
        raise NoRoute(_explain([request.blocks], holders, request, book, now))
    prices = Prices(holders, request, book, now, tiebreak)
    if not prices.cover(request.blocks):
        starts, ends = holders.start[prices.usable], holders.end[prices.usable]
        missing = _gaps(zip(starts.tolist(), ends.tolist(), strict=True), request.blocks)
        raise NoRoute(_explain(missing, holders, request, book, now))
    chain = cheapest(prices, request.blocks)
    return tuple(RouteHop(holders.servers[place], blocks) for place, blocks in chain)


def price_route(
    hops: Sequence[RouteHop],
    servers: Sequence[SignedRecord] | Chart,
    request: Request,
    book: PeerBook,
    now: float,
) -> list[PricedHop]:
    """What a route is expected to take, hop by hop, whoever may be shunned at the moment.

    Raises KeyError if somebody takes no sessions any more.
    """
    holders = _chart(servers).holders(request.model, request.numerics)
    return _priced(hops, Prices(holders, request, book, now, None))


def _priced(hops: Sequence[RouteHop], prices: Prices) -> list[PricedHop]:
    places = [prices.holders.place_of[hop.server.record.peer_id] for hop in hops]
    extras = [0.0, *(prices.extra_between(*pair) for pair in pairwise(places))]
    return [
        PricedHop(hop, prices.offer(place), extra)
        for hop, place, extra in zip(hops, places, extras, strict=True)
    ]


def is_slow(recent: Sequence[float], expected: float) -> bool:
    """Whether a hop whose last steps took so many seconds each is not what was expected of it."""
    if len(recent) < JUDGED:
        return False
    return median(recent[-JUDGED:]) > _SLOW * expected + _PATIENCE


def better_route(stay: float, go: float, replay: float) -> bool:
    """Whether to leave a route on which the rest takes `stay` seconds for one on which it takes
    `go`, after `replay` seconds in which new hops are told what was. Who could save little stays:
    estimates are rough, others want to move to the same place, and it comes back every turn."""
    return stay - go - replay > max(_LEAST_GAIN, _GAIN * stay)


def find_better(
    hops: Sequence[RouteHop],
    chart: Chart,
    rest: Request,
    held: int,
    book: PeerBook,
    now: float,
    tiebreak: float | None = 0.0,
) -> tuple[RouteHop, ...] | None:
    """Another route than `hops` for the `rest` of a session, if that is worth the move: servers
    that are new to it have to be told `held` tokens first. Raises NoRoute, KeyError."""
    replay = replace(rest, prompt_tokens=rest.prompt_tokens + held)
    found = find_route(chart, replay, book, now, tiebreak=tiebreak)
    holders = chart.holders(rest.model, rest.numerics)
    going_on = Prices(holders, replace(rest, adapter_bytes=0.0), book, now, None)
    stay, go, told = (
        [hop.seconds for hop in _priced(route, prices)]
        for route, prices in (
            (hops, going_on),
            (found, going_on),
            (found, Prices(holders, replay, book, now, None)),
        )
    )
    new = [hop not in hops for hop in found]
    telling = sum(told[i] - go[i] for i in range(len(found)) if new[i])
    return found if better_route(sum(stay), sum(go), telling) else None


def _chart(servers: Sequence[SignedRecord] | Chart) -> Chart:
    return servers if isinstance(servers, Chart) else Chart(servers)


def _gaps(spans: Iterable[tuple[int, int]], blocks: BlockRange) -> list[BlockRange]:
    """What of `blocks` no span covers."""
    gaps: list[BlockRange] = []
    covered = blocks.start
    for start, end in sorted([*spans, (blocks.end, blocks.end)]):
        if min(start, blocks.end) > covered:
            gaps.append(BlockRange(covered, min(start, blocks.end)))
        covered = max(covered, end)
    return gaps


def _explain(
    missing: Sequence[BlockRange],
    holders: Holders,
    request: Request,
    book: PeerBook,
    now: float,
) -> str:
    name = request.model.name
    held = [server.record for server in holders.servers]
    permitted = [record for record in held if request.permits(record.peer_id)]
    if unheld := _gaps(_ends(held), request.blocks):
        return (
            f"blocks {_list(unheld)} of {name} are served by nobody in {request.numerics.dtype}; "
            f"start one with: swarm-server {name} --blocks {unheld[0]} --peers ..."
        )
    if unheld := _gaps(_ends(permitted), request.blocks):
        return (
            f"blocks {_list(unheld)} of {name} are held only by servers that this client may not "
            "use: look at its allowed_servers and blocked_servers"
        )
    having = [held[place] for place in holders.having.get(request.adapter[:8], [])]
    if request.adapter_bytes is None and (unheld := _gaps(_ends(having), request.blocks)):
        return (
            f"nobody who serves blocks {_list(unheld)} of {name} announces adapter "
            f"{request.adapter.hex()[:16]}: start one with --adapters, or load its weights here, "
            "with model.load_adapter"
        )
    waits = [
        book.banned_until(record.peer_id) - now
        for record in permitted
        if any(record.blocks.overlaps(gap) for gap in missing)
    ]
    again = min((wait for wait in waits if wait > 0), default=0.0)
    when = f"in {ceil(again)} s" if again else "when they are free"
    return (
        f"blocks {_list(missing)} of {name} are held only by servers that failed or were busy: "
        f"try again {when}, or start another with: "
        f"swarm-server {name} --blocks {missing[0]} --peers ..."
    )


def _ends(records: Iterable[ServerRecord]) -> Iterator[tuple[int, int]]:
    return ((record.blocks.start, record.blocks.end) for record in records)


def _list(ranges: Sequence[BlockRange]) -> str:
    return ", ".join(map(str, ranges))
