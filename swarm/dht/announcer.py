"""Keeps a server's record in the DHT true and fresh, and takes it back at the end."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from swarm.dht.directory import open_all
from swarm.dht.memory import Dht
from swarm.dht.records import ServerRecord, ServerState, SignedRecord, keys_of, sign_record
from swarm.errors import PeerUnavailable
from swarm.identity import Identity

logger = logging.getLogger(__name__)

REGISTRY_ENTRIES = 8  # how many servers of one model the registry needs to know
_FIRST_RETRY_SECONDS = 1.0
_FAREWELL_SECONDS = 3.0


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
        key, registry = keys_of(record, self._dht.key)
        keys = [key]
        if should_register(record, await self._find(registry), self._dht.now()):
            keys.append(registry)
        if not await self._store(keys, record):
            # Nodes keep the newest; if that is ours, from when our clock was ahead, be newer still.
            ours = (r.announced_at for r in await self._find(key) if r.peer_id == record.peer_id)
            if (newest := max(ours, default=0)) > self._announced_at:
                self._announced_at = newest
                await self._store(keys, record)
        assert self.signed is not None
        return self.signed

    async def _store(self, keys: Sequence[str], record: ServerRecord) -> bool:
        self._announced_at = max(int(self._dht.now() * 1000), self._announced_at + 1)
        record = record.model_copy(update={"announced_at": self._announced_at})
        self.signed = sign_record(record, self._identity, self._dht.key)
        return await self._dht.store(keys, self.signed.data, record.kept_until)

    async def _find(self, key: str) -> list[ServerRecord]:
        found = await self._dht.get_many([key])
        return [signed.record for signed in open_all(found[key], self._dht)]


def should_register(record: ServerRecord, registered: Sequence[ServerRecord], now: float) -> bool:
    """Whether `record` belongs in the registry: it is there, or few of its model's servers are."""
    if any(other.peer_id == record.peer_id for other in registered):
        return True
    live = [
        other
        for other in registered
        if other.model == record.model
        and other.expires_at > now
        and other.state is not ServerState.OFFLINE
    ]
    return len(live) < REGISTRY_ENTRIES
