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
from swarm.coordinates import unpack_all
from swarm.dht.records import ServerState, SignedRecord, peer_tag
from swarm.types import BlockRange, ModelId, Numerics

# What is not known is taken to be rather slow, so that nobody gains by saying nothing.
_UNKNOWN_RTT = 0.1  # seconds, while fewer than `_MEASURED` are known
_UNKNOWN_BYTE_SECONDS = 1e-7  # 80 Mbit/s
_UNKNOWN_BLOCK_SECONDS = 0.01
_SLOWEST = 100.0  # seconds per block that anybody may claim: sums must be finite, to be compared
_ESTIMATED = 1.1  # times what coordinates tell, as they may be wrong
_ROWS = 1024  # of servers whose distances to all others are kept
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
    adapter: bytes = b""  # its hash
    adapter_bytes: float | None = 0.0  # of it in a block, for who lacks it; None: it must be there

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
        self.place_of = {name: place for place, name in enumerate(self.ids)}
        self.start = np.array([record.blocks.start for record in records], np.int64)
        self.end = np.array([record.blocks.end for record in records], np.int64)
        self.count = self.end - self.start
        self.queue = np.array([float(record.queue) for record in records])
        self.free = np.array([float(record.free_tokens) for record in records])
        self.seeds = np.array([crc32(name.encode()) for name in self.ids], np.uint64)
        speed = np.array([record.throughput for record in records])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            claimed = np.fmin(1 / (speed * self.count), _SLOWEST)
            self.claimed = np.where(speed > 0, claimed, np.nan)  # s per block
            batch = np.array([record.batch_throughput for record in records])
            share = (_BATCH * speed / batch - 1) / (_BATCH - 1)
        known = (batch > 0) & (speed > 0)
        self.row_share = np.where(known, np.clip(share, _LEAST_SHARE, 1.0), _ROW_SHARE)
        self.usual_row_share = float(np.median(self.row_share)) if records else _ROW_SHARE
        self.usual_count = float(np.median(self.count)) if records else 1.0
        self.borders: list[int] = np.unique(np.concatenate([self.start, self.end])).tolist()
        self._of_block: dict[int, Places] = {}
        uplink = np.array([1024.0 * record.uplink for record in records])
        usual = np.median(uplink[uplink > 0]) if uplink.any() else np.inf
        self.sending = 1 / np.where(uplink > 0, uplink, usual)  # seconds per byte
        self.places = unpack_all([record.coordinates for record in records])
        self.having: dict[bytes, list[int]] = {}  # places, by what of an adapter's hash they tell
        for place, record in enumerate(records):
            for adapter in record.adapters:
                self.having.setdefault(adapter.id, []).append(place)
        self.ways = Ways(self)

    def of_block(self, block: int) -> Places:
        """Who holds it."""
        if block not in self._of_block:
            self._of_block[block] = np.flatnonzero((self.start <= block) & (block < self.end))
        return self._of_block[block]


class Ways:
    """How far servers are from each other, in seconds there and back: by what they announce to have
    measured, else by their coordinates, else inf. Rows are worked out when they are asked for."""

    def __init__(self, holders: Holders) -> None:
        self._servers = holders.servers
        self._tags = {peer_tag(name): place for place, name in enumerate(holders.ids)}
        count = len(holders.ids)
        self.complete = not np.isnan(holders.places).any()
        self._points, self._heights = holders.places[:, :3], holders.places[:, 3]
        self._squares = (self._points * self._points).sum(1)
        self._row = np.full(count, -1)  # of `_table`
        self._table = np.empty((min(count, _ROWS), count), np.float32)
        self._filled = 0

    def between(self, sources: Places, targets: Places) -> NDArray[np.float32]:
        """[sources, targets], the caller's own; not more than `_ROWS` sources."""
        rows = self._row.take(sources)
        if rows.min() < 0:
            missing = sources[rows < 0]
            if self._filled + len(missing) > len(self._table):
                self._row[:], self._filled, missing = -1, 0, sources
            self._fill(missing)
            rows = self._row.take(sources)
        return self._table.take(rows, 0).take(targets, 1)

    def _fill(self, sources: Places) -> None:
        begin, self._filled = self._filled, self._filled + len(sources)
        self._row[sources] = np.arange(begin, self._filled)
        points = self._points[sources]
        squares = self._squares[sources][:, None] + self._squares - 2 * points @ self._points.T
        told = np.sqrt(np.maximum(squares, 0.0)) + self._heights[sources][:, None] + self._heights
        self._table[begin : self._filled] = np.where(np.isnan(told), np.inf, told)
        for row, source in enumerate(sources.tolist(), begin):
            for tag, milliseconds in self._servers[source].record.next_rtts.items():
                if tag in self._tags:
                    self._table[row, self._tags[tag]] = milliseconds / 1e3


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
    `extras` correct that where more is known. Every `tiebreak` believes other strangers, and
    prefers others among those about as good; None believes and prefers nobody.
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
        self._steps = request.steps
        self._recall(request, book, now)
        self._distances(book)
        known = self.own[~np.isnan(self.own)]
        if len(known) < _MEASURED:
            known = np.where(np.isnan(self.own), holders.claimed, self.own)
            known = known[~np.isnan(known)]
        self.usual = float(np.median(known)) if len(known) else _UNKNOWN_BLOCK_SECONDS
        lots = _lots(holders.seeds, tiebreak)
        believing = (lots >> np.uint64(32)) % np.uint64(_BELIEVERS) == 0
        self._seconds(request, believing)
        self._sums(request, (lots & np.uint64(0xFFFF)) / 0xFFFF, believing)

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
        self.lacks = np.full(count, bool(request.adapter))
        self.lacks[holders.having.get(request.adapter[:8], [])] = False
        if request.adapter_bytes is None:
            self.usable &= ~self.lacks
        if request.exclude or request.allowed or request.blocked:
            for place, name in enumerate(holders.ids):
                if name in request.exclude or not request.permits(name):
                    self.usable[place] = False

    def _distances(self, book: PeerBook) -> None:
        """RTTs that were measured, else as coordinates tell, else rather long."""
        self.rtt_known = ~np.isnan(self.rtt)
        rtts = np.sort(self.rtt[self.rtt_known])
        if book.coordinates is not None:
            away = self.holders.places[:, :3] - np.array(book.coordinates[:3])
            told = np.sqrt((away * away).sum(1)) + self.holders.places[:, 3] + book.coordinates[3]
            self.rtt = np.where(self.rtt_known, self.rtt, _ESTIMATED * told)
        unknown = np.isnan(self.rtt)
        self._half = (self._steps / 2 * self.rtt).astype(np.float32)  # nan: not known
        self._all_known = self.holders.ways.complete and not unknown.any()
        usual = rtts[int(_QUANTILE * len(rtts))] if len(rtts) >= _MEASURED else _UNKNOWN_RTT
        self.rtt[unknown] = usual

    def _seconds(self, request: Request, believing: NDArray[np.bool_]) -> None:
        """Of a decode step and of a position of a prompt, in one block."""
        holders = self.holders
        bound = np.where(believing, 1 / _BELIEVED, 1.0)
        silent = max(_UNKNOWN_BLOCK_SECONDS, self.usual)
        claim = np.fmax(holders.claimed, bound * self.usual)
        share = np.fmax(holders.row_share, bound * holders.usual_row_share)
        crowd = 1 + share * (holders.queue + request.rows - 1)
        # What we measured ourselves was in the company of others already.
        claim = np.where(np.isnan(holders.claimed), silent, claim) * crowd
        self.block_seconds = np.where(np.isnan(self.own), claim, self.own)
        guess = self.block_seconds * share
        self.token_seconds = np.where(np.isnan(self.token_seconds), guess, self.token_seconds)

    def _sums(self, request: Request, lots: Floats, believing: NDArray[np.bool_]) -> None:
        holders = self.holders
        # What we measured ourselves has the waiting in it, and our own steps may be the queue.
        busy = (holders.queue > 0) & np.isnan(self.own)
        self.wait = np.where(busy, 0.5 * self.block_seconds * holders.count, 0.0)
        needed = request.prompt_tokens + request.rows * request.new_tokens
        fits = holders.free // max(1, needed)
        self.has_room = fits > 0
        bytes_ = request.prompt_tokens * request.position_bytes
        byte_seconds = np.where(
            np.isnan(self.byte_seconds), _UNKNOWN_BYTE_SECONDS, self.byte_seconds
        )
        carrying = bytes_ * byte_seconds
        # Each step goes onwards by a line that others use too.
        sent = request.steps * request.rows * request.position_bytes * holders.sending
        carrying += np.where(np.isnan(self.own), sent, 0.0)
        luck = 1 - lots ** (1 / np.clip(fits, 1, _TICKETS))
        doubt = (1 + self.failures) * (1 + _SPREAD * luck)
        fixed = request.steps * (self.rtt + self.wait) + carrying + ~self.has_room * _NO_ROOM
        work = request.new_tokens * self.block_seconds + request.prompt_tokens * self.token_seconds
        work += self.lacks * byte_seconds * (request.adapter_bytes or 0.0)
        # Whoever claims more blocks than usual would spare us hops: those are charged all the same.
        spared = np.fmax(0.0, 1 / holders.usual_count - 1 / holders.count)
        work += request.steps * self.rtt * np.where(believing | ~np.isnan(self.own), 0.0, spared)
        self.fixed = doubt * fixed
        self.per_block = doubt * work

    def extras(self, sources: Places, targets: Places) -> NDArray[np.float32]:
        """[sources, targets]: seconds for coming from one to the other otherwise than by way of the
        client. No RTT is less than the difference of our own to the two."""
        here, there = self._half.take(sources)[:, None], self._half.take(targets)
        extras = self.holders.ways.between(sources, targets)
        extras *= self._steps / 2
        extras -= here + there
        np.maximum(extras, -2 * np.minimum(here, there), out=extras)  # |here - there|, of the same
        if not self._all_known:
            extras[~np.isfinite(extras)] = 0.0
        return extras

    def cover(self, blocks: BlockRange) -> bool:
        """Whether each block is held by somebody usable."""
        starts, ends = self.holders.start[self.usable], self.holders.end[self.usable]
        depth = np.zeros(len(blocks) + 1, np.int64)
        for places, change in ((starts, 1), (ends, -1)):
            inside = np.clip(places - blocks.start, 0, len(blocks))
            depth += change * np.bincount(inside, minlength=len(depth))
        return bool((np.cumsum(depth)[:-1] > 0).all())

    def extra_between(self, source: int, target: int) -> float:
        return float(self.extras(np.array([source]), np.array([target]))[0, 0])

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
