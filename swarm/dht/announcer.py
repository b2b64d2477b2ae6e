"""Keeps a server's record in the DHT true and fresh, and takes it back at the end."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from statistics import median_low

from swarm.dht.directory import open_all
from swarm.dht.memory import Dht
from swarm.dht.pages import MAX_BITS, MAX_ON_PAGE, bucket_of, is_ahead, is_thin, next_bits
from swarm.dht.records import (
    REGISTRY,
    ServerRecord,
    ServerState,
    SignedRecord,
    hide,
    keys_of,
    sign_record,
)
from swarm.errors import PeerUnavailable
from swarm.identity import Identity

logger = logging.getLogger(__name__)

REGISTRY_ENTRIES = 8  # how many servers of one model the registry needs to know
_FIRST_RETRY_SECONDS = 1.0
_FAREWELL_SECONDS = 3.0
_SURVEYS = 0.25  # of all announcements: the others go where the last one went
_FINER = (1, 3, 5)  # bits more, of which one is tried in a survey
_REPLICAS = 2  # that are asked in a survey


class Announcer:
    """Publishes what `describe` returns: its `announced_at` is filled in here.

    Run `run` as a task; `changed` has it publish at once; end with `withdraw`.
    """

    def __init__(
        self,
        dht: Dht,
        identity: Identity,
        describe: Callable[[], ServerRecord],
        random: random.Random,
    ) -> None:
        self.signed: SignedRecord | None = None  # the last one published
        self._dht, self._identity, self._describe, self._random = dht, identity, describe, random
        self._changed = asyncio.Event()
        self._announced_at = 0
        self._bucket = -1
        self._bits = 0  # of our page
        self._registered = False
        self._publishing = asyncio.Lock()  # an older state must not overtake a newer one

    def changed(self) -> None:
        """Have the record published soon; for changes that matter to clients."""
        self._changed.set()

    async def run(self) -> None:
        """Publish at each change and three times in a lifetime, until cancelled."""
        retry = _FIRST_RETRY_SECONDS
        while True:
            self._changed.clear()
            period = self._describe().lifetime / 3
            try:
                await self.publish()
                wait, retry = period, _FIRST_RETRY_SECONDS
            except PeerUnavailable as error:
                logger.warning("could not announce this server: %s", error)
                wait, retry = retry, min(2 * retry, period)
            try:
                async with asyncio.timeout(wait * self._random.uniform(0.8, 1.2)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def publish(self) -> SignedRecord:
        """Publish now. Raises PeerUnavailable."""
        async with self._publishing:
            return await self._publish(self._describe())

    async def withdraw(self) -> None:
        """Say farewell, as far as anybody listens."""
        farewell = self._describe().model_copy(update={"state": ServerState.OFFLINE})
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS), self._publishing:
                await self._publish(farewell)
        except (PeerUnavailable, TimeoutError) as error:
            logger.info("could not withdraw this server's record: %s", error or "timeout")

    async def _publish(self, record: ServerRecord) -> SignedRecord:
        bucket = bucket_of(record.blocks.start, record.num_blocks)
        if bucket != self._bucket:
            await self._survey(record, anew=True)
            self._bucket = bucket
        elif record.state is not ServerState.OFFLINE and self._random.random() < _SURVEYS:
            await self._survey(record, anew=False)
        record = record.model_copy(update={"page_bits": self._bits})
        *keys, registry = keys_of(record, self._dht.key)
        page = keys[0]
        if self._registered:
            keys.append(registry)
        if not await self._store(keys, record):
            # Nodes keep the newest; if that is ours, from when our clock was ahead, be newer still.
            on_page = (await self._find([page], True))[page]
            ours = (r.announced_at for r in on_page if r.peer_id == record.peer_id)
            if (newest := max(ours, default=0)) > self._announced_at:
                self._announced_at = newest
                await self._store(keys, record)
            else:  # or they have no room for us
                self._bits = next_bits(self._bits, len(on_page), 0, MAX_ON_PAGE)
        assert self.signed is not None
        return self.signed

    async def _survey(self, record: ServerRecord, *, anew: bool) -> None:
        """See which page is ours, by how full it is, and whether the registry needs us.

        The larger the swarm, the more rarely each of its servers looks at the registry.
        """
        bits = 0 if anew else self._bits
        listing = anew or self._registered or self._random.random() < 2.0**-bits
        page, registry = self._page(record, bits), hide(REGISTRY, self._dht.key)
        found = await self._find([page, registry] if listing else [page], anew)
        if listing:
            self._registered = should_register(record, found[registry], self._dht.now())
        on_page = alive(found[page], self._dht.now())
        if bits == 0 and (said := median_low([r.page_bits for r in on_page] or [0])) > 1:
            bits, page = said, self._page(record, said)
            on_page = alive((await self._find([page], anew))[page], self._dht.now())
        finer = coarser = 0
        if thin := is_thin(len(on_page)):
            coarser = await self._count(record, bits - 1, anew) if bits else 0
        if bits or not thin:
            more = self._random.choice(_FINER)
            finer = await self._count(record, min(MAX_BITS, bits + more), anew)
            if is_ahead(finer):
                bits = min(MAX_BITS, bits + more - 1)
        self._bits = next_bits(bits, len(on_page), finer, coarser)

    async def _count(self, record: ServerRecord, bits: int, anew: bool) -> int:
        page = self._page(record, bits)
        return len(alive((await self._find([page], anew))[page], self._dht.now()))

    def _page(self, record: ServerRecord, bits: int) -> str:
        return keys_of(record.model_copy(update={"page_bits": bits}), self._dht.key)[0]

    async def _store(self, keys: Sequence[str], record: ServerRecord) -> bool:
        self._announced_at = max(int(self._dht.now() * 1000), self._announced_at + 1)
        record = record.model_copy(update={"announced_at": self._announced_at})
        self.signed = sign_record(record, self._identity, self._dht.key)
        return await self._dht.store(keys, self.signed.data, record.kept_until)

    async def _find(self, keys: Sequence[str], thorough: bool) -> dict[str, list[ServerRecord]]:
        found = await self._dht.get_many(keys, None if thorough else _REPLICAS)
        return {key: [signed.record for signed in open_all(found[key], self._dht)] for key in keys}


def alive(records: Sequence[ServerRecord], now: float) -> list[ServerRecord]:
    """Those that neither expired nor said farewell."""
    return [r for r in records if r.expires_at > now and r.state is not ServerState.OFFLINE]


def should_register(record: ServerRecord, registered: Sequence[ServerRecord], now: float) -> bool:
    """Whether `record` belongs in the registry: few of its model's servers are there, or it is and
    not too many others (they came at the same time, so those with the first names stay)."""
    live = [other for other in alive(registered, now) if other.model == record.model]
    if any(other.peer_id == record.peer_id for other in live):
        return sum(other.peer_id < record.peer_id for other in live) < 2 * REGISTRY_ENTRIES
    return len(live) < REGISTRY_ENTRIES
