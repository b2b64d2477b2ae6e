"""A monitor over simulated servers, with its web app, for tests of what is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from swarm.dht.directory import Directory, ModelListing
from swarm.dht.memory import MemoryDht
from swarm.dht.records import ServerRecord
from swarm.listening import running
from swarm.loop import BackgroundLoop
from swarm.monitor.app import make_app
from swarm.monitor.history import History, Minute, squeeze
from swarm.monitor.ledger import Ledger
from swarm.monitor.picture import Joining, model_key
from swarm.monitor.roster import Event, Kind
from swarm.monitor.watcher import Watcher
from swarm.types import ModelId
from tests.monitor.simulated import MODEL, Records

T = TypeVar("T")
PEER = "/ip4/192.0.2.1/tcp/31330/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


class Monitor:
    """`show` what is served, as often as it changes; then look at `url`."""

    def __init__(self) -> None:
        self.url = ""
        self.dht = MemoryDht("me")
        self.dht.time = time.time()
        self.watcher = Watcher(self.dht, None, Ledger(None), Joining((PEER,)))
        self.shown: dict[ModelId, Records] = {}

    def show(
        self,
        records: Sequence[ServerRecord],
        num_blocks: int = 24,
        *,
        model: ModelId = MODEL,
        silent: frozenset[str] = frozenset(),
    ) -> None:
        """From now on these servers are there, and readers are told."""
        if model not in self.shown:
            self.shown[model] = stand_in = Records(model=model, num_blocks=num_blocks)
            watcher = self.watcher
            watcher._watch(
                model_key(model), ModelListing(model, num_blocks), self.dht.time, History()
            )
            watcher.watched[model_key(model)].directory = cast(Directory, stand_in)
        self.dht.time = max(time.time(), self.dht.time + 0.002)
        stamp = {"announced_at": int(1000 * self.dht.time)}
        self.shown[model].records = [record.model_copy(update=stamp) for record in records]
        self.shown[model].silent = silent
        self.on_loop(self._look)

    async def _look(self) -> None:
        await self.watcher.look()
        self.watcher.tell()
        self.watcher.note()

    def remember_a_day(self, model: ModelId = MODEL) -> None:
        """As if it had been watched since yesterday: fair weather with two holes and a gap."""
        watched = self.watcher.watched[model_key(model)]
        num_blocks, now = watched.listing.num_blocks, int(self.dht.time) // 60 * 60
        members = list(watched.roster.members.values())
        history, late = History(), list(watched.history.minutes)
        for back in range(1439, 0, -1):
            if 900 < back < 960:
                continue
            low = [3] * num_blocks
            if 400 < back < 430 or 700 < back < 730:
                low[: num_blocks // 4] = [back % 2] * (num_blocks // 4)
            tokens = 0.0 if 0 in low else 200.0 + 3 * (back % 37)
            minute = Minute(now - 60 * back, tokens, len(members), squeeze(low))
            history.minutes.append(minute)
        for back, kind in ((43_000, Kind.LOST), (25_000, Kind.JOINED), (600, Kind.MOVED)):
            record = members[back % len(members)].record
            blocks = record.blocks.start, record.blocks.end
            history.events.append(
                Event(now - back, kind, record.peer_id, record.public_name, blocks)
            )
        history.minutes.extend(late)
        history.served = watched.history.served
        for index, served in enumerate(history.served.values()):
            served.block_seconds = 1e6 / (index + 1)
        watched.history = history
        self.on_loop(self._look)

    def on_loop(self, work: Callable[[], Awaitable[T]]) -> T:
        async def call() -> T:
            return await work()

        return BackgroundLoop.shared().call(call(), timeout=30)


@contextmanager
def monitor() -> Generator[Monitor]:
    """One that listens on loopback, in the background loop."""
    it, up, end = Monitor(), asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        async with running(make_app(it.watcher), "127.0.0.1", 0) as it.url:
            up.set()
            await end.wait()

    serving = BackgroundLoop.shared().start(serve())
    it.on_loop(up.wait)

    async def stop() -> Any:
        end.set()

    try:
        yield it
    finally:
        it.on_loop(stop)
        serving.result(30)
