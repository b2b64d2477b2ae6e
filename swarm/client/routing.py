"""Which servers a session should use: the chain that is expected to take the least time.

A shortest path over block borders. A hop may use any part of a server's blocks and its time is
linear in their number, so the border between two hops can be moved, without loss, until it meets
the end of the first server or the start of the second: only those borders need to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from zlib import crc32

from swarm.client.peers import PeerBook
from swarm.dht.records import ServerState, SignedRecord
from swarm.errors import NoRoute
from swarm.types import BlockRange, ModelId, Numerics

# What is not known is taken to be rather slow, so that nobody gains by saying nothing.
_UNKNOWN_RTT = 0.1  # seconds
_UNKNOWN_BLOCK_SECONDS = 0.01
_PREFILL_SPEEDUP = 16  # tokens of a prompt go through a block together, those of an answer do not
_STEPS_PER_PASS = 8  # so many waiting steps cost us one more pass of the server's device
_SPREAD = 0.05  # clients whose best choices differ by less than this choose differently


@dataclass(frozen=True, slots=True)
class Request:
    """What a route is wanted for: a prompt of so many tokens (over all rows), so many new steps."""

    model: ModelId
    blocks: BlockRange
    numerics: Numerics
    prompt_tokens: int
    new_tokens: int  # per row
    exclude: frozenset[str] = frozenset()  # peer ids, for example of servers that were busy


@dataclass(frozen=True, slots=True)
class RouteHop:
    """`blocks` of what this server holds."""

    server: SignedRecord
    blocks: BlockRange


@dataclass(slots=True)
class Offer:
    """What a server could do for a request: `fixed` seconds, and `per_block` for each block.

    The rest is the search's: least seconds to be in it at the present border, and entered where.
    """

    server: SignedRecord
    start: int
    end: int
    fixed: float
    per_block: float
    cost: float = float("inf")
    entry: int = -1


def find_route(
    servers: Sequence[SignedRecord],
    request: Request,
    book: PeerBook,
    now: float,
    *,
    tiebreak: float = 0.0,
) -> tuple[RouteHop, ...]:
    """Hops that cover `request.blocks` in order, without gap or overlap.

    Clients with different `tiebreak` spread over servers that are about as good. Raises NoRoute,
    which names the blocks that are missing.
    """
    holders = [server for server in servers if _serves(server, request)]
    shunned = book.banned(now) | request.exclude
    offers = [
        make_offer(server, request, book, tiebreak)
        for server in holders
        if server.record.peer_id not in shunned
    ]
    missing = _gaps(((offer.start, offer.end) for offer in offers), request.blocks)
    if missing:
        raise NoRoute(_explain(missing, holders, request, book, now))
    return _shortest(offers, request.blocks)


def make_offer(
    server: SignedRecord, request: Request, book: PeerBook, tiebreak: float = 0.0
) -> Offer:
    """The seconds that `request` is expected to spend on a server."""
    record = server.record
    block_seconds = book.block_seconds(record.peer_id)
    if block_seconds is None:
        speed = record.throughput * len(record.blocks)  # blocks per second, in decode steps
        block_seconds = 1 / speed if speed > 0 else _UNKNOWN_BLOCK_SECONDS
    rtt = book.rtt(record.peer_id)
    wait = record.queue / _STEPS_PER_PASS * block_seconds * len(record.blocks)
    steps = request.new_tokens + 1  # and one for the prompt
    tokens = request.new_tokens + request.prompt_tokens / _PREFILL_SPEEDUP
    lot = crc32(f"{record.peer_id}{tiebreak}".encode()) / (1 << 32)
    doubt = (1 + book.failures(record.peer_id)) * (1 + _SPREAD * lot)
    return Offer(
        server,
        max(record.blocks.start, request.blocks.start),
        min(record.blocks.end, request.blocks.end),
        doubt * steps * ((_UNKNOWN_RTT if rtt is None else rtt) + wait),
        doubt * tokens * block_seconds,
    )


def _serves(server: SignedRecord, request: Request) -> bool:
    record = server.record
    return (
        record.state is ServerState.ONLINE
        and record.model == request.model
        and record.numerics == request.numerics
        and record.blocks.overlaps(request.blocks)
    )


def _shortest(offers: Sequence[Offer], blocks: BlockRange) -> tuple[RouteHop, ...]:
    """Sweeps once over the borders; every block must be on offer."""
    starting: dict[int, list[Offer]] = {}
    for offer in offers:
        starting.setdefault(offer.start, []).append(offer)
    borders = sorted({*starting, *(offer.end for offer in offers)})
    came_by: dict[int, tuple[Offer, int]] = {}  # border: the hop that ends there best, its start
    active: list[Offer] = []
    previous = blocks.start
    for border in borders:
        best = 0.0 if border == blocks.start else float("inf")
        for offer in active:
            offer.cost += offer.per_block * (border - previous)
            if offer.cost < best:
                best = offer.cost
                came_by[border] = offer, offer.entry
        active = [offer for offer in active if offer.end > border]
        active += starting.get(border, ())
        for offer in active:
            if best + offer.fixed < offer.cost:
                offer.cost = best + offer.fixed
                offer.entry = border
        previous = border
    hops: list[RouteHop] = []
    border = blocks.end
    while border > blocks.start:
        offer, entry = came_by[border]
        hops.append(RouteHop(offer.server, BlockRange(entry, border)))
        border = entry
    return tuple(reversed(hops))


def _gaps(spans: Iterable[tuple[int, int]], blocks: BlockRange) -> list[BlockRange]:
    """What of `blocks` no span covers."""
    gaps: list[BlockRange] = []
    covered = blocks.start
    for start, end in sorted([*spans, (blocks.end, blocks.end)]):
        if start > covered:
            gaps.append(BlockRange(covered, min(start, blocks.end)))
        covered = max(covered, end)
    return gaps


def _explain(
    missing: Sequence[BlockRange],
    holders: Sequence[SignedRecord],
    request: Request,
    book: PeerBook,
    now: float,
) -> str:
    name = request.model.name
    spans = ((server.record.blocks.start, server.record.blocks.end) for server in holders)
    unheld = _gaps(spans, request.blocks)
    if unheld:
        return (
            f"blocks {_list(unheld)} of {name} are served by nobody in {request.numerics.dtype}; "
            f"start one with: swarm-server {name} --blocks {unheld[0]} --peers ..."
        )
    waits = [
        book.banned_until(server.record.peer_id) - now
        for server in holders
        if any(server.record.blocks.overlaps(gap) for gap in missing)
    ]
    again = min((wait for wait in waits if wait > 0), default=0.0)
    when = f"in {ceil(again)} s" if again else "when they are free"
    return (
        f"blocks {_list(missing)} of {name} are held only by servers that failed or were busy: "
        f"try again {when}, or start another with: "
        f"swarm-server {name} --blocks {missing[0]} --peers ..."
    )


def _list(ranges: Sequence[BlockRange]) -> str:
    return ", ".join(map(str, ranges))
