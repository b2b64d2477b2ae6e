"""What a request is expected to cost on every server, in seconds: measured, announced, or feared.

Over all servers at once, in vectors whose places are those of `Holders.servers`. docs/routing.md
gives the formulas, and the reasons for the prices of what is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from swarm.client.peers import PeerBook
from swarm.dht.records import ServerState, SignedRecord, peer_tag
from swarm.types import BlockRange, ModelId, Numerics

# What is not known is taken to be rather slow, so that nobody gains by saying nothing.
_UNKNOWN_RTT = 0.1  # seconds, while fewer than `_MEASURED` are known
_UNKNOWN_BYTE_SECONDS = 1e-7  # 80 Mbit/s
_UNKNOWN_BLOCK_SECONDS = 0.01
_QUANTILE = 0.9  # of the RTTs that are known, for one that is not
_ROW_SHARE = 1 / 16  # of the time of a pass with one row, for each further row or position
_BATCH = 16  # rows, of which records tell the throughput
_LEAST_SHARE = 1 / 64  # of a lone row's time, for a row of a batch, whatever anybody claims
_NO_ROOM = 3.0  # seconds that an opening waits for memory before it is refused
_MEASURED = 3  # servers that we must have measured before others' words about the usual are nothing
_BELIEVED = 4.0  # times faster than usual, that a stranger may be...
_BELIEVERS = 4  # ...for one client in so many: to the others it is as fast as usual
_SPREAD = 0.05  # clients whose best choices differ by less than this choose differently
_TICKETS = 8  # who has room for several such requests is drawn more often among equals

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Request:
    """What a route is wanted for: a prompt of so many tokens (over all rows), so many new steps."""

    model: ModelId
    blocks: BlockRange
    numerics: Numerics
    prompt_tokens: int
    new_tokens: int  # per row
    exclude: frozenset[str] = frozenset()  # peer ids, for example of servers that were busy
    rows: int = 1
    position_bytes: int = 0  # of one position of one row on a link
    allowed: frozenset[str] = frozenset()  # peer ids; empty: all
    blocked: frozenset[str] = frozenset()

    @property
    def steps(self) -> int:
        """Passes through the whole route: one for the prompt, one for each new token."""
        return self.new_tokens + 1

    def permits(self, peer_id: str) -> bool:
        return peer_id not in self.blocked and (not self.allowed or peer_id in self.allowed)


class Holders:
    """Servers of one model and numerics that take sessions, and what they say, as vectors."""

    def __init__(self, servers: Sequence[SignedRecord]) -> None:
        records = [server.record for server in servers]
        self.servers = servers
        self.ids = [record.peer_id for record in records]
        self.start = np.array([record.blocks.start for record in records], np.int64)
        self.end = np.array([record.blocks.end for record in records], np.int64)
        self.count = self.end - self.start
        self.queue = np.array([float(record.queue) for record in records])
        self.free = np.array([float(record.free_tokens) for record in records])
        self.seeds = np.array([crc32(name.encode()) for name in self.ids], np.uint64)
        speed = np.array([record.throughput for record in records])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            self.claimed = np.where(speed > 0, 1 / (speed * self.count), np.nan)  # s per block
            batch = np.array([record.batch_throughput for record in records])
            share = (_BATCH * speed / batch - 1) / (_BATCH - 1)
        known = (batch > 0) & (speed > 0)
        self.row_share = np.where(known, np.clip(share, _LEAST_SHARE, 1.0), _ROW_SHARE)
        self.borders: list[int] = np.unique(np.concatenate([self.start, self.end])).tolist()
        self.starting = {b: np.flatnonzero(self.start == b) for b in self.borders}
        self.ending = {b: np.flatnonzero(self.end == b) for b in self.borders}
        self.links = Links(self)


class Links:
    """Which servers say how far others are, and the borders where one may follow the other."""

    def __init__(self, holders: Holders) -> None:
        places = {peer_tag(name): place for place, name in enumerate(holders.ids)}
        found = [
            (place, places[tag], milliseconds / 1e3)
            for place, server in enumerate(holders.servers)
            for tag, milliseconds in server.record.next_rtts.items()
            if tag in places
        ]
        table = np.array(found, np.float64).reshape(-1, 3)
        self.source, self.target = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        self.rtt = table[:, 2]
        first = np.maximum(holders.start[self.source] + 1, holders.start[self.target])
        last = np.minimum(holders.end[self.source], holders.end[self.target] - 1)
        times = np.maximum(last - first + 1, 0)
        self.link = np.repeat(np.arange(len(times)), times)  # one for each border between the two
        border = np.arange(len(self.link)) - np.repeat(np.cumsum(times) - times - first, times)
        order = np.argsort(border, kind="stable")
        self.link, border = self.link[order], border[order]
        self.sources, self.targets = self.source[self.link], self.target[self.link]
        everybody = np.arange(len(holders.ids) + 1)
        self._firsts = np.searchsorted(self.source, everybody).tolist()
        self._by_target = np.argsort(self.target, kind="stable")
        self._firsts_to = np.searchsorted(self.target[self._by_target], everybody).tolist()
        self._bounds = {b: slice(*np.searchsorted(border, [b, b + 1])) for b in holders.borders}

    def leaving(self, source: int) -> slice:
        """The links that a server announces."""
        return slice(self._firsts[source], self._firsts[source + 1])

    def leading_to(self, target: int) -> Places:
        """The links that others announce to a server."""
        return self._by_target[self._firsts_to[target] : self._firsts_to[target + 1]]

    def at(self, border: int) -> slice:
        """Which of `link`, `sources` and `targets` may be crossed at a border."""
        return self._bounds.get(border, slice(0))


class Chart:
    """A picture of the swarm, made ready for any number of routes."""

    def __init__(self, servers: Sequence[SignedRecord]) -> None:
        self.servers = servers
        self._holders: dict[tuple[ModelId, Numerics], Holders] = {}

    def holders(self, model: ModelId, numerics: Numerics) -> Holders:
        key = model, numerics
        if key not in self._holders:
            self._holders[key] = Holders(
                [
                    server
                    for server in self.servers
                    if server.record.state is ServerState.ONLINE
                    and (server.record.model, server.record.numerics) == key
                ]
            )
        return self._holders[key]


@dataclass(frozen=True, slots=True)
class Offer:
    """What one server would take for a request: `fixed` seconds, and `per_block` for each block.

    The rest is what that comes from, in seconds.
    """

    server: SignedRecord
    fixed: float
    per_block: float
    rtt: float  # to and from the client
    rtt_known: bool
    block_seconds: float  # of one decode step through one block, among those who wait there
    source: str  # of that: measured, announced, doubted or assumed
    wait: float  # each time, for the pass that is under way
    has_room: bool


class Prices:
    """What a request would cost everywhere: `fixed` seconds and `per_block` for each block.

    Servers are taken to be connected by way of the client, half of their RTT on either side;
    `extra` seconds correct that for each of `holders.links`. Every `tiebreak` believes other
    strangers, and prefers others among those about as good; None believes and prefers nobody.
    """

    def __init__(
        self,
        holders: Holders,
        request: Request,
        book: PeerBook,
        now: float,
        tiebreak: float | None,
    ) -> None:
        self.holders = holders
        self._recall(request, book, now)
        known = self.own[~np.isnan(self.own)]
        if len(known) < _MEASURED:
            known = np.where(np.isnan(self.own), holders.claimed, self.own)
            known = known[~np.isnan(known)]
        self.usual = float(np.median(known)) if len(known) else _UNKNOWN_BLOCK_SECONDS
        lots = _lots(holders.seeds, tiebreak)
        believing = (lots >> np.uint64(32)) % np.uint64(_BELIEVERS) == 0
        self._seconds(request, believing)
        self._sums(request, (lots & np.uint64(0xFFFF)) / 0xFFFF, believing)
        self._links(request)

    def _recall(self, request: Request, book: PeerBook, now: float) -> None:
        """What this client knows by itself; nan: nothing."""
        holders, count = self.holders, len(self.holders.ids)
        self.own, self.token_seconds = np.full(count, np.nan), np.full(count, np.nan)
        self.rtt, self.byte_seconds = np.full(count, np.nan), np.full(count, np.nan)
        self.failures = np.zeros(count)
        self.usable = np.array((holders.start < request.blocks.end), bool)
        self.usable &= holders.end > request.blocks.start
        pace = book.pace
        for place, peer in book.recall(holders.ids):
            if peer.rtt is not None:
                self.rtt[place] = peer.rtt
            if (seconds := peer.decode_seconds(now)) is not None:
                self.own[place] = seconds
            if peer.failures:
                self.failures[place] = peer.failures
            if now < peer.banned_until:
                self.usable[place] = False
            if (each := pace.token_seconds(holders.ids[place])) is not None:
                self.token_seconds[place] = each
            if (each := pace.byte_seconds(holders.ids[place])) is not None:
                self.byte_seconds[place] = each
        if request.exclude or request.allowed or request.blocked:
            for place, name in enumerate(holders.ids):
                if name in request.exclude or not request.permits(name):
                    self.usable[place] = False

    def _seconds(self, request: Request, believing: NDArray[np.bool_]) -> None:
        """Of a decode step and of a position of a prompt, in one block."""
        holders = self.holders
        bound = np.where(believing, 1 / _BELIEVED, 1.0)
        silent = max(_UNKNOWN_BLOCK_SECONDS, self.usual)
        claim = np.fmax(holders.claimed, bound * self.usual)
        share = np.fmax(holders.row_share, bound * np.median(holders.row_share))
        crowd = 1 + share * (holders.queue + request.rows - 1)
        # What we measured ourselves was in the company of others already.
        claim = np.where(np.isnan(holders.claimed), silent, claim) * crowd
        self.block_seconds = np.where(np.isnan(self.own), claim, self.own)
        guess = self.block_seconds * share
        self.token_seconds = np.where(np.isnan(self.token_seconds), guess, self.token_seconds)

    def _sums(self, request: Request, lots: Floats, believing: NDArray[np.bool_]) -> None:
        holders = self.holders
        self.rtt_known = ~np.isnan(self.rtt)
        rtts = np.sort(self.rtt[self.rtt_known])
        usual = rtts[int(_QUANTILE * len(rtts))] if len(rtts) >= _MEASURED else _UNKNOWN_RTT
        self.rtt = np.where(self.rtt_known, self.rtt, usual)
        # What we measured ourselves has the waiting in it, and our own steps may be the queue.
        busy = (holders.queue > 0) & np.isnan(self.own)
        self.wait = np.where(busy, 0.5 * self.block_seconds * holders.count, 0.0)
        needed = request.prompt_tokens + request.rows * request.new_tokens
        fits = holders.free // max(1, needed)
        self.has_room = fits > 0
        bytes_ = request.prompt_tokens * request.position_bytes
        carrying = bytes_ * np.where(
            np.isnan(self.byte_seconds), _UNKNOWN_BYTE_SECONDS, self.byte_seconds
        )
        luck = 1 - lots ** (1 / np.clip(fits, 1, _TICKETS))
        doubt = (1 + self.failures) * (1 + _SPREAD * luck)
        fixed = request.steps * (self.rtt + self.wait) + carrying + ~self.has_room * _NO_ROOM
        work = request.new_tokens * self.block_seconds + request.prompt_tokens * self.token_seconds
        # Whoever claims more blocks than usual would spare us hops: those are charged all the same.
        spared = np.fmax(0.0, 1 / np.median(holders.count) - 1 / holders.count)
        work += request.steps * self.rtt * np.where(believing | ~np.isnan(self.own), 0.0, spared)
        self.fixed = doubt * fixed
        self.per_block = doubt * work

    def _links(self, request: Request) -> None:
        """What a server announces of its RTT to another counts between two that we have measured
        ourselves, and no RTT is less than the difference of our own to the two."""
        links = self.holders.links
        here, there = self.rtt[links.source], self.rtt[links.target]
        rtt = np.maximum(links.rtt, np.abs(here - there))
        known = self.rtt_known[links.source] & self.rtt_known[links.target]
        self.extra = np.where(known, request.steps * (rtt - here - there) / 2, np.inf)

    def cover(self, blocks: BlockRange) -> bool:
        """Whether each block is held by somebody usable."""
        starts, ends = self.holders.start[self.usable], self.holders.end[self.usable]
        depth = np.zeros(len(blocks) + 1, np.int64)
        for places, change in ((starts, 1), (ends, -1)):
            inside = np.clip(places - blocks.start, 0, len(blocks))
            depth += change * np.bincount(inside, minlength=len(depth))
        return bool((np.cumsum(depth)[:-1] > 0).all())

    def extra_between(self, source: int, target: int) -> float:
        """For coming from one server to another otherwise than by way of the client."""
        links = self.holders.links
        leaving = links.leaving(source)
        known = self.extra[leaving][links.target[leaving] == target]
        return float(known[0]) if len(known) and np.isfinite(known[0]) else 0.0

    def offer(self, place: int) -> Offer:
        claimed = float(self.holders.claimed[place])
        source = "announced"
        if not np.isnan(self.own[place]):
            source = "measured"
        elif np.isnan(claimed):
            source = "assumed"
        elif claimed < self.usual:
            source = "doubted"
        return Offer(
            self.holders.servers[place],
            float(self.fixed[place]),
            float(self.per_block[place]),
            float(self.rtt[place]),
            bool(self.rtt_known[place]),
            float(self.block_seconds[place]),
            source,
            float(self.wait[place]),
            bool(self.has_room[place]),
        )


def _lots(seeds: NDArray[np.uint64], tiebreak: float | None) -> NDArray[np.uint64]:
    """Random bits for every server (the finalizer of MurmurHash3)."""
    if tiebreak is None:
        return np.full(len(seeds), (1 << 64) - 1, np.uint64)
    bits = seeds ^ np.uint64(crc32(str(tiebreak).encode()) << 32)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(33))
