"""What a session does about its route while nothing is wrong: moves, and second servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from weakref import WeakSet

from swarm.client.hop import Hop, Listener
from swarm.client.route import Route, Router
from swarm.client.standby import Standby, Standbys
from swarm.client.text import Text
from swarm.client.watch import Watch
from swarm.errors import SessionClosed, SwarmError
from swarm.types import BlockRange

logger = logging.getLogger(__name__)


class Tending:
    """Of one session. `between` is held while a step is under way; `is_well` tells, between two of
    them, whether the route is whole."""

    def __init__(
        self,
        route: Route,
        router: Router,
        text: Text,
        between: asyncio.Lock,
        is_well: Callable[[], bool],
        standby_after: int | None,
    ) -> None:
        self.moves = 0  # away from servers that had not failed
        self._route, self._router, self._text = route, router, text
        self._between, self._is_well = between, is_well
        self._standbys = Standbys(text, self._second, standby_after)
        self._watch, self._doubtful = Watch(), False
        self._leaving: set[asyncio.Task[None]] = set()
        self._told = WeakSet[Hop]()  # by these

    # Called between two steps, or at the begin or the end of one --------------------------------

    async def look_around(self, position: int, tokens: int, listener: Listener) -> bool:
        """Before a step of so many tokens: whether the route is to be mended, since it is a better
        one now. That is looked for between two turns, and since a hop became slow."""
        turn = position > 0 and tokens > 1
        if not (turn or self._doubtful) or not self._is_well():
            return False
        self._doubtful, text = False, self._text
        better = self._router.better(self._route.legs, text.terms, position)
        if better is None:
            return False
        changed = await self._route.change(better, next(text.numbers), text.terms, listener)
        self.moves += changed
        return changed

    async def settle_in(self) -> None:
        """The route is another one."""
        hops = self._route.hops
        expected = self._router.step_seconds(self._route.legs, self._text.terms)
        self._watch.expect(hops, expected)
        await self._standbys.keep(hops)

    def observe(self, hop: Hop, seconds: float) -> None:
        """A step of one position took so long at a hop, the way there included."""
        self._watch.observe(hop, seconds)

    def step_done(self, position: int) -> None:
        self._standbys.stir(position, self._route.hops)
        self._doubtful = self._watch.doubts(asyncio.get_running_loop().time())

    # Second servers ------------------------------------------------------------------------------

    @property
    def standbys(self) -> list[Hop]:
        return self._standbys.hops

    async def take(self, lost: Hop) -> Hop | None:
        """Who stands by for a hop."""
        return await self._standbys.take(lost)

    def went_back(self, position: int) -> None:
        """The text is another one from there on, also at servers that outlive a recovery."""
        for hop in self._route.hops:
            hop.trusted = min(hop.trusted, position)
        self._standbys.went_back(position)

    async def dismiss(self, *, for_good: bool = False) -> None:
        """Let all second servers go; others come once a step is done, or not at all."""
        self._standbys.is_wanted = not for_good
        await self._standbys.close()

    async def _second(
        self, blocks: BlockRange, not_at: frozenset[str], listener: Standby
    ) -> Hop | None:
        return await self._route.second(blocks, not_at, self._text.terms, listener)

    # Servers that leave --------------------------------------------------------------------------

    def leave(self, hop: Hop, listener: Listener) -> None:
        """Its server said that it ends soon. Who says so again has been heard: each time we would
        ask others for a session."""
        if hop in self._told:
            return
        self._told.add(hop)
        self._leaving.add(task := asyncio.create_task(self._move(hop, listener)))
        task.add_done_callback(self._leaving.discard)

    async def _move(self, leaving: Hop, listener: Listener) -> None:
        """To another server, which inherits what this one holds; else it ends, and we replay."""
        hop = await self._route.prepare(leaving, self._text.terms, listener)
        if hop is None:
            return
        try:
            await self._route.copy(leaving, hop)
        except SwarmError as error:
            logger.info("%s copied nothing to %s ahead: %s", leaving, hop, error)
        async with self._between:
            try:
                if not self._is_well() or leaving not in self._route.hops:
                    raise SessionClosed("there is nothing to move any more")
                self._text.epoch += 1
                await self._route.replace(leaving, hop, self._text.epoch)
                self.moves += 1
                await self.settle_in()
            except SwarmError as error:
                logger.info("%s did not take over from %s: %s", hop, leaving, error)
                await hop.close()

    async def end(self) -> None:
        """Once the route is closed, so that whoever waits for its servers has been told."""
        await self._standbys.close()
        if self._leaving:
            await asyncio.wait(self._leaving)
