"""The swarm's picture of one model: who serves which blocks, as far as anybody can know.

Clocks may be an hour wrong, so a record's age proves little. What does: a record that is followed
by newer ones is a living server's; one that is not, for its lifetime, has fallen silent. Silent
servers are shown only for blocks that nobody else holds: trying them is then better than nothing.

In a large swarm the picture is of some servers only, a few hundred, always the same as long as they
will do: each reader has pages of its own (`pages.py`), and turns to more when it misses blocks.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from swarm.dht.memory import Dht
from swarm.dht.pages import MAX_BITS, Shelf, bucket_of, count_buckets
from swarm.dht.records import (
    CLOCK_SLACK,
    REGISTRY,
    ServerState,
    SignedRecord,
    dht_key,
    hide,
    open_record,
)
from swarm.errors import InvalidRecord, PeerUnavailable
from swarm.types import BlockRange, ModelId

logger = logging.getLogger(__name__)

_AT_ONCE = 8  # records that are checked, 0.2 ms each, before others have their turn
_PAGES = 2  # of each bucket, in a look...
_MOST_PAGES = 16  # ...and when blocks are missing
_TURNS = 10  # to other pages, in a look
_FINER = 3  # sizes, of which one is tried in a look
_KEYS = 32  # that are looked up at a time
_REMEMBERED = 3600.0  # seconds for which servers are known that fell silent
_FEW = 64  # servers, up to which all replicas are asked, afterwards one


class Rng(Protocol):
    """A `random.Random`."""

    def randrange(self, stop: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class SwarmView:
    """An immutable picture of who serves `model`, ordered by first block."""

    model: ModelId
    num_blocks: int
    servers: tuple[SignedRecord, ...] = ()
    silent: frozenset[str] = frozenset()  # peer ids of servers that may well be gone

    def holders(self, block: int) -> tuple[SignedRecord, ...]:
        """Servers that take sessions on `block`."""
        return tuple(server for server in self.servers if _serves(server, block))

    def missing_blocks(self) -> tuple[BlockRange, ...]:
        """Blocks that nobody takes sessions on, as ranges."""
        missing: list[BlockRange] = []
        for block in range(self.num_blocks):
            if self.holders(block):
                continue
            if missing and missing[-1].end == block:
                missing[-1] = replace(missing[-1], end=block + 1)
            else:
                missing.append(BlockRange(block, block + 1))
        return tuple(missing)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A server's newest record, when it was first seen (our monotonic clock), after older ones?"""

    signed: SignedRecord
    since: float
    advanced: bool


@dataclass(frozen=True, slots=True)
class ModelListing:
    """A model that the swarm serves."""

    model: ModelId
    num_blocks: int


class Directory:
    """Watches the records of one model. `view` is the last picture taken.

    With `whole` it is of all servers, however many they are: whoever wants that looks more rarely
    in larger swarms.
    """

    def __init__(
        self,
        dht: Dht,
        model: ModelId,
        num_blocks: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        whole: bool = False,
        rng: Rng | None = None,
    ) -> None:
        self.view = SwarmView(model, num_blocks)
        self._dht, self._clock, self._whole = dht, clock, whole
        self._rng = rng or random.SystemRandom()
        buckets = range(count_buckets(num_blocks))
        self._shelves = {bucket: self._new_shelf() for bucket in buckets}
        self._sightings: dict[str, Sighting] = {}
        self._looked = float("-inf")

    async def recent(self, age: float) -> SwarmView:
        """The last picture if it is no more than `age` seconds old, else a new one: a look costs
        all who keep records. Raises as `refresh` does."""
        return self.view if self._clock() - self._looked <= age else await self.refresh()

    async def refresh(self) -> SwarmView:
        """Look again. If the DHT does not answer, what is known grows old instead.

        Raises PeerUnavailable if nothing is known and nobody answers.
        """
        try:
            await self._read()
        except PeerUnavailable as error:
            if not self._sightings:
                raise
            logger.info("keeping the last picture of the swarm: %s", error)
        now = self._dht.now()
        for peer_id, sighting in list(self._sightings.items()):
            expired = sighting.signed.record.expires_at + CLOCK_SLACK < now
            if expired or self._clock() - sighting.since > _REMEMBERED:
                del self._sightings[peer_id]
        self._take_picture()
        self._looked = self._clock()
        return self.view

    def _take_picture(self) -> None:
        self.view = take_picture(self.view, self._sightings, self._dht.now(), self._clock())

    async def _read(self) -> None:
        """Read some pages of each bucket (or all), and more if the picture shows holes then."""
        replicas = None if len(self.view.servers) < _FEW else 1
        counts = dict.fromkeys(self._shelves, None if self._whole else _PAGES)
        todo, read = set(counts), set[str]()
        for _ in range(_TURNS):
            asked = {
                bucket: [
                    key
                    for page in self._shelves[bucket].pages(counts[bucket])
                    if (key := self._key(bucket, page)) not in read
                ]
                for bucket in sorted(todo)
            }
            found = await self._get(list(chain(*asked.values())), replicas)
            read.update(found)
            todo = set[int]()
            for bucket, keys in asked.items():
                claims = [bits for key in keys for bits in await self._see_all(found[key])]
                if keys and self._shelves[bucket].learn(claims, len(keys)):
                    todo.add(bucket)
            todo = todo or self._unread(counts)
            if not todo:
                break
        await self._doubt()

    async def _doubt(self) -> None:
        """Many who say that they cut coarsely would keep us from all others: try a finer page."""
        if rich := [shelf for shelf in self._shelves.items() if shelf[1].rich]:
            bucket, shelf = rich[self._rng.randrange(len(rich))]
            page = shelf.finer_page(2 + 2 * self._rng.randrange(_FINER))
            [values] = (await self._get([self._key(bucket, page)], 1)).values()
            shelf.turn_to(page, len(await self._see_all(values)))

    async def _get(self, keys: Sequence[str], replicas: int | None) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for some in (keys[i : i + _KEYS] for i in range(0, len(keys), _KEYS)):
            found |= await self._dht.get_many(some, replicas)
        return found

    def _unread(self, counts: dict[int, int | None]) -> set[int]:
        """Buckets with more pages, of which one could hold a block that is missing. More will be
        read of those; and the next look begins elsewhere, if that is too few."""
        self._take_picture()
        missing = self.view.missing_blocks()
        if not missing or self._whole:
            return set()
        last = bucket_of(missing[-1].end - 1, self.view.num_blocks)
        more: set[int] = set()
        for bucket, count in counts.items():
            if count is None or bucket > last or count >= 1 << self._shelves[bucket].bits:
                continue
            if count < _MOST_PAGES:
                counts[bucket] = 2 * count
                more.add(bucket)
            else:
                self._shelves[bucket] = self._new_shelf()
        return more

    def _new_shelf(self) -> Shelf:
        return Shelf(self._rng.randrange(1 << MAX_BITS))

    def _key(self, bucket: int, page: str) -> str:
        return dht_key(self.view.model, bucket, page, self._dht.key)

    async def _see_all(self, values: Iterable[bytes]) -> list[int]:
        """How finely the servers of these records cut their buckets, if they are there."""
        claims: list[int] = []
        model, num_blocks, now = self.view.model, self.view.num_blocks, self._dht.now()
        for count, data in enumerate(values, 1):
            for signed in open_all([data], self._dht):
                record = signed.record
                if (record.model, record.num_blocks) == (model, num_blocks):
                    self._see(signed)
                    if record.expires_at > now and record.state is not ServerState.OFFLINE:
                        claims.append(record.page_bits)
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return claims

    async def run(self, period: float) -> None:
        """Look again every `period` seconds, until cancelled."""
        while True:
            await asyncio.sleep(period)
            try:
                await self.refresh()
            except PeerUnavailable as error:
                logger.warning("%s; looking again in %.0f s", error, period)

    def _see(self, signed: SignedRecord) -> None:
        """Newest counts: a server that moved left records elsewhere, and replicas lag behind."""
        known = self._sightings.get(signed.record.peer_id)
        if known is None or known.signed.record.announced_at < signed.record.announced_at:
            self._sightings[signed.record.peer_id] = Sighting(
                signed, self._clock(), known is not None
            )


def take_picture(
    frame: SwarmView, sightings: Mapping[str, Sighting], now: float, clock: float
) -> SwarmView:
    """Who is there at `now` (the swarm's clock) and `clock` (monotonic, as in `sightings`)."""
    heard: list[SignedRecord] = []
    silent: list[SignedRecord] = []
    for sighting in sightings.values():
        if sighting.signed.record.state is not ServerState.OFFLINE:
            (silent if _is_silent(sighting, now, clock) else heard).append(sighting.signed)
    online = (server for server in heard if server.record.state is ServerState.ONLINE)
    covered = set(chain.from_iterable(map(_blocks, online)))
    needed = [server for server in silent if not covered.issuperset(_blocks(server))]
    return replace(
        frame,
        servers=tuple(sorted([*heard, *needed], key=_by_blocks)),
        silent=frozenset(server.record.peer_id for server in needed),
    )


async def list_models(dht: Dht) -> tuple[ModelListing, ...]:
    """The models that the swarm's servers announce, most listed first. Raises PeerUnavailable."""
    registry = hide(REGISTRY, dht.key)
    registered = open_all((await dht.get_many([registry]))[registry], dht)
    count: dict[ModelListing, int] = {}
    for record in (signed.record for signed in registered):
        listing = ModelListing(record.model, record.num_blocks)
        if record.state is not ServerState.OFFLINE:
            count[listing] = count.get(listing, 0) + (record.expires_at > dht.now())
    return tuple(sorted(count, key=lambda listing: -count[listing]))


def open_all(values: Iterable[bytes], dht: Dht) -> list[SignedRecord]:
    """The valid ones; the others are as if they did not exist."""
    records: list[SignedRecord] = []
    for data in values:
        try:
            records.append(SignedRecord(open_record(data, key=dht.key, now=dht.now()), data))
        except InvalidRecord as error:
            logger.info("ignored %s", error)
    return records


def _is_silent(sighting: Sighting, now: float, clock: float) -> bool:
    record = sighting.signed.record
    if clock - sighting.since > record.lifetime:
        return True
    return now > record.expires_at and not sighting.advanced


def _by_blocks(server: SignedRecord) -> tuple[int, int, str]:
    record = server.record
    return record.blocks.start, record.blocks.end, record.peer_id


def _blocks(server: SignedRecord) -> range:
    return range(server.record.blocks.start, server.record.blocks.end)


def _serves(server: SignedRecord, block: int) -> bool:
    return server.record.state is ServerState.ONLINE and block in _blocks(server)
