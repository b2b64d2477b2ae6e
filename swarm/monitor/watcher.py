"""Looks at the swarm, asks its servers, and tells the feed what became of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from swarm.dht.directory import Directory, ModelListing, list_models
from swarm.dht.memory import Dht
from swarm.dht.records import ServerRecord, ServerState
from swarm.errors import PeerUnavailable
from swarm.loop import in_thread
from swarm.monitor.feed import Feed, Json
from swarm.monitor.history import DAY, History
from swarm.monitor.ledger import Kept, Ledger
from swarm.monitor.picture import Joining, draw, harmless, model_key
from swarm.monitor.pulse import Pulse
from swarm.monitor.roster import Roster, State

logger = logging.getLogger(__name__)

MODELS = 32  # that are watched: anybody may announce some
_LOOK_SECONDS = 3.0  # between two looks into the DHT in a small swarm...
_PER_SERVER = 0.02  # ...and so much more for each server: a record of each is sent, 1 kB at most
_DISCOVER_SECONDS = 10.0  # between two looks for models
_SAVE_SECONDS = 20.0
_DRAW_SECONDS = 1.0  # between two pictures
_REST = 10.0  # times as long as a picture took: strangers decide how large it is
_LATE = 0.5  # of its lifetime: a record that old should have been renewed; its server is asked
_EVENTS = 12  # of each model, that everybody is told


@dataclass(slots=True)
class Watched:
    """One model. `seen` is when anybody last served it, in seconds since 1970."""

    listing: ModelListing
    directory: Directory
    seen: float
    roster: Roster = field(default_factory=Roster)
    history: History = field(default_factory=History)

    @property
    def records(self) -> list[ServerRecord]:
        return [member.record for member in self.roster.members.values()]


class Watcher:
    """Watches what the swarm serves, or of that only the models that are `wanted` by name.

    `pulse` None: servers are not asked, and what they announce is believed. Times are the swarm's.
    """

    def __init__(
        self,
        dht: Dht,
        pulse: Pulse | None,
        ledger: Ledger,
        joining: Joining,
        wanted: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.feed = Feed({"at": 0, "sees": False, "models": {}, "wanted": sorted(wanted)})
        self.watched: dict[str, Watched] = {}
        self.looked: float | None = None  # when the DHT last answered, by `clock`
        self.joining = joining
        self.pulse = pulse
        self.wanted = frozenset(wanted)
        self.clock = clock
        self._dht, self._ledger = dht, ledger
        self._at = 0  # when that was, in seconds since 1970
        for key, kept in ledger.load(dht.now()).items():
            if kept.seen > dht.now() - DAY and self._is_wanted(kept.listing):
                self._watch(key, kept.listing, kept.seen, kept.history)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Inside, it works; its tasks are gone when this ends, and the history is on the disk.

        What they fail with, a defect, cancels whoever is inside, and is raised.
        """
        owner = asyncio.current_task()
        assert owner is not None

        def look_after(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                owner.cancel()

        tasks = [asyncio.create_task(work()) for work in (self._keep_looking, self._keep_telling)]
        for task in tasks:
            task.add_done_callback(look_after)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._ledger.save(self._ledger.changes(self._kept()), self._dht.now())
            self._ledger.close()
            for defect in results:
                if isinstance(defect, Exception):
                    raise defect

    async def discover(self) -> None:
        """See which models there are. Raises PeerUnavailable."""
        for listing in await list_models(self._dht):
            key = model_key(listing.model)
            if key not in self.watched and len(self.watched) < MODELS and self._is_wanted(listing):
                self._watch(key, listing, self._dht.now(), History())

    async def look(self) -> None:
        """Take a new picture of each model. Raises PeerUnavailable if nobody answers."""
        for watched in list(self.watched.values()):  # of which one may be forgotten meanwhile
            await watched.directory.refresh()
            self._take_in(watched, self._dht.now())
        self.looked, self._at = self.clock(), int(self._dht.now())

    async def ask(self) -> None:
        """Ask those whose turn it is how they are."""
        if self.pulse is None:
            return
        now = self._dht.now()
        members = [m for watched in self.watched.values() for m in watched.roster.members.values()]
        late = {m.record.peer_id for m in members if now - m.advanced > _LATE * m.record.lifetime}
        await self.pulse.beat([member.record for member in members], frozenset(late))
        for watched in self.watched.values():
            self._take_in(watched, now)

    def tell(self) -> None:
        """Publish what is known now, of models that somebody served within a day."""
        for key in [k for k, w in self.watched.items() if w.seen < self.now() - DAY]:
            del self.watched[key]
        answers = self.pulse.answers if self.pulse else {}
        models: Json = {}
        for key, watched in self.watched.items():
            members = sorted(
                watched.roster.members.values(),
                key=lambda member: (member.record.blocks, member.record.peer_id),
            )
            listing = watched.listing
            models[key] = draw(listing.model, listing.num_blocks, members, answers, self.joining)
            models[key]["events"] = [
                [int(e.at), str(e.kind), e.peer_id, harmless(e.name), *e.blocks]
                for e in list(watched.history.events)[-_EVENTS:]
            ]
        self.feed.publish(
            {"at": self._at, "sees": self.sees, "models": models, "wanted": sorted(self.wanted)}
        )

    def now(self) -> float:
        """Seconds since 1970 by the swarm's clock."""
        return self._dht.now()

    @property
    def sees(self) -> bool:
        """Whether the DHT has answered lately."""
        patience = 60.0 + 3 * self._period()
        return self.looked is not None and self.clock() - self.looked < patience

    def _watch(self, key: str, listing: ModelListing, seen: float, history: History) -> None:
        directory = Directory(self._dht, listing.model, listing.num_blocks, whole=True)
        self.watched[key] = Watched(listing, directory, seen, history=history)

    def _is_wanted(self, listing: ModelListing) -> bool:
        return not self.wanted or listing.model.name in self.wanted

    def _take_in(self, watched: Watched, now: float) -> None:
        """What the DHT and the servers themselves say, put together."""
        view = watched.directory.view
        answers = self.pulse.answers if self.pulse else {}
        records: list[ServerRecord] = []
        for record in (server.record for server in view.servers):
            answer = answers.get(record.peer_id)
            told = answer.record if answer else None
            if told is not None and told.announced_at > record.announced_at:
                mine = (told.model, told.num_blocks) == (record.model, record.num_blocks)
                record = told if mine else record
            if record.state is not ServerState.OFFLINE:  # its farewell, before the DHT has it
                records.append(record)
        events = watched.roster.update(
            records,
            silent=view.silent,
            unreachable=self.pulse.unreachable if self.pulse else frozenset(),
            now=now,
        )
        watched.history.events.extend(events)

    def note(self) -> None:
        """Put the present into the history."""
        now = self._dht.now()
        for key, watched in self.watched.items():
            model = self.feed.state["models"][key]
            serving = [
                (m.record.peer_id, harmless(m.record.public_name), len(m.record.blocks))
                for m in watched.roster.members.values()
                if m.state is State.ONLINE
            ]
            watched.history.look(now, model["tokens"], model["replicas"], serving)
            watched.seen = now if serving else watched.seen

    def _kept(self) -> dict[str, Kept]:
        return {
            key: Kept(watched.listing, watched.seen, watched.history)
            for key, watched in self.watched.items()
        }

    def _period(self) -> float:
        servers = sum(len(watched.roster.members) for watched in self.watched.values())
        return _LOOK_SECONDS + _PER_SERVER * servers

    async def _keep_looking(self) -> None:
        discovered = float("-inf")
        while True:
            try:
                if self.clock() - discovered >= _DISCOVER_SECONDS:
                    await self.discover()
                    discovered = self.clock()
                await self.look()
            except PeerUnavailable as error:
                logger.warning("cannot see the swarm: %s", error)
            await asyncio.sleep(self._period())

    async def _keep_telling(self) -> None:
        saved = self.clock()
        while True:
            await self.ask()
            begin = self.clock()
            if self.looked is not None:
                self.tell()
                self.note()
            pause = max(_DRAW_SECONDS, _REST * (self.clock() - begin))
            if self.clock() - saved >= _SAVE_SECONDS:
                saved = self.clock()
                save = partial(
                    self._ledger.save, self._ledger.changes(self._kept()), self._dht.now()
                )
                await in_thread(save)
            await asyncio.sleep(pause)
