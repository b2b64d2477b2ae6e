"""Warm standbys: for every hop a second server that is fed what entered its blocks, a little later.

What a text loses with a server is then the last few positions, not all of it. It costs a second
cache, and the passes of the second servers (so many positions at once that they are cheap).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm.client.hop import Hop
from swarm.client.text import Text
from swarm.errors import SessionClosed
from swarm.messages import Output, PushFailed
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

_LAG = 8  # positions that a standby may lack: one pass of so many costs little more than of one
_AGAIN = 5.0  # seconds until somebody is looked for again, when there was nobody or they were lost

Find = Callable[[BlockRange, frozenset[str], "Standby"], Awaitable[Hop | None]]
"""Opens an empty session for all of these blocks at one server, but not at these peers."""


class Standby:
    """One second server. It listens to its hop until somebody takes that."""

    def __init__(self, blocks: BlockRange, text: Text) -> None:
        self.hop: Hop | None = None
        self._blocks, self._text = blocks, text
        self._waking = asyncio.Event()
        self._number = -1  # of the step that is not answered yet
        self._task: asyncio.Task[None] | None = None

    def start(self, find: Find, not_at: frozenset[str]) -> None:
        self._task = asyncio.create_task(self._run(find, not_at))

    @property
    def is_over(self) -> bool:
        return self._task is None or self._task.done()

    def nudge(self) -> None:
        """There may be more to feed."""
        hop = self.hop
        if hop is not None and self._text.borders[self._blocks.start].length - hop.trusted >= _LAG:
            self._waking.set()

    def went_back(self, position: int) -> None:
        """What the text has from there on is another one."""
        if self.hop is not None:
            self.hop.trusted = min(self.hop.trusted, position)

    async def end(self) -> Hop | None:
        """Feed it no more; who has it now is to close it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        hop, self.hop = self.hop, None
        return hop

    async def _run(self, find: Find, not_at: frozenset[str]) -> None:
        hop = await find(self._blocks, not_at, self)
        if hop is None:
            return
        hop.trusted, self.hop = 0, hop
        logger.info("%s stands by", hop)
        while hop.alive:
            await self._feed(hop)
            await self._waking.wait()
            self._waking.clear()

    async def _feed(self, hop: Hop) -> None:
        """Up to what is known now, one piece after the other: nobody waits for it."""
        text, border = self._text, self._text.borders[self._blocks.start]
        begin = min(hop.trusted, border.length)
        for low, high in text.cutter.pieces(begin, border.length, [hop]):
            if hop.trusted != low or border.length < high:
                return self._waking.set()  # the text went back meanwhile
            step = text.step(hop, low, high, crop=True)
            self._number, hop.position = step.step, low
            hop.send(step.model_copy(update={"push": False, "quiet": True}))
            while hop.alive and self._number == step.step:
                await self._waking.wait()
                self._waking.clear()
            if not hop.alive:
                return None
            hop.position = high
            if hop.trusted == low:
                hop.trusted = high
        return None

    def on_output(self, hop: Hop, output: Output) -> None:
        if output.step == self._number:
            self._number = -1
            self._waking.set()

    def on_push_failed(self, hop: Hop, message: PushFailed) -> None:
        """It was not to push."""

    def on_leaving(self, hop: Hop) -> None:
        hop.lose(SessionClosed("a standby is leaving"))
        self._waking.set()

    def on_lost(self, hop: Hop) -> None:
        self._waking.set()


class Standbys:
    """Of one session, from `after` positions on; None: never."""

    def __init__(self, text: Text, find: Find, after: int | None) -> None:
        self.is_wanted = True
        self._text, self._find, self._after = text, find, after
        self._held: dict[BlockRange, Standby] = {}
        self._not_before: dict[BlockRange, float] = {}

    def stir(self, position: int, hops: Sequence[Hop]) -> None:
        """A step is done: see that every hop has one, and feed them."""
        if not self.is_wanted or self._after is None or position < self._after:
            return
        now = asyncio.get_running_loop().time()
        for hop in hops:
            standby = self._held.get(hop.blocks)
            if standby is None or standby.is_over:
                if now < self._not_before.get(hop.blocks, now):
                    continue
                self._not_before[hop.blocks] = now + _AGAIN
                self._held[hop.blocks] = standby = Standby(hop.blocks, self._text)
                standby.start(self._find, frozenset({hop.peer_id}))
            standby.nudge()

    @property
    def hops(self) -> list[Hop]:
        """Who stands by; `trusted` tells how many positions they have."""
        return [s.hop for s in self._held.values() if s.hop is not None and s.hop.alive]

    def went_back(self, position: int) -> None:
        for standby in self._held.values():
            standby.went_back(position)

    async def take(self, lost: Hop) -> Hop | None:
        """Whoever stands by for a hop's blocks, and holds something; it is the caller's now."""
        standby = self._held.pop(lost.blocks, None)
        hop = None if standby is None else await standby.end()
        if hop is None or (hop.alive and hop.trusted and hop.peer_id != lost.peer_id):
            return hop
        await hop.close()
        return None

    async def keep(self, hops: Sequence[Hop]) -> None:
        """Only those for the route as it is now."""
        wanted = {hop.blocks: hop.peer_id for hop in hops}
        for blocks, standby in list(self._held.items()):
            at = standby.hop
            if blocks not in wanted or (at is not None and at.peer_id == wanted[blocks]):
                await self._drop(blocks)

    async def close(self) -> None:
        """Let all of them go; others are looked for as soon as a step is done."""
        self._not_before.clear()
        for blocks in list(self._held):
            await self._drop(blocks)

    async def _drop(self, blocks: BlockRange) -> None:
        hop = await self._held.pop(blocks).end()
        if hop is not None:
            await hop.close()
