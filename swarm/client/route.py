"""The hops of one session: who serves which blocks now, and how the gaps are closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Sequence
from itertools import pairwise
from typing import Protocol

from swarm.client.hop import Hop, Listener, Terms
from swarm.client.recoveries import Recoveries
from swarm.config import ClientTimeouts
from swarm.dht.records import SignedRecord
from swarm.errors import (
    AdapterRefused,
    ErrorCode,
    NoRoute,
    PeerSilent,
    PeerUnavailable,
    RemoteProtocolError,
    SessionClosed,
    SwarmError,
    afresh,
)
from swarm.identity import Access
from swarm.messages import HandOver, PushTarget
from swarm.transport import Endpoint, Transport
from swarm.types import BlockRange

# To take over from a server that leaves: those that died in the last minute and a half, of whom
# there may be some, are still announced.
_CANDIDATES = 8
_COPIES = 2  # ahead of a hand-over: what came to it during the first one takes the second
_FEW = 32  # positions that may be left for the pause
_OPENING = 1.0  # seconds for a server to open a session, besides ten round trips
# Refusals that say nothing bad about a server, if once in a step: open anew there, and replay.
_INNOCENT = {ErrorCode.CANNOT_REWIND, ErrorCode.GAP}


Leg = tuple[SignedRecord, BlockRange]
"""A server, and which of its blocks are used."""


class Router(Protocol):
    """Who serves what, and who has disappointed."""

    def route(
        self,
        blocks: BlockRange,
        terms: Terms,
        prompt: int | None = None,
        exclude: frozenset[str] = frozenset(),
    ) -> Sequence[Leg]:
        """Servers that cover `blocks` without a gap, and are none of these peers, for `prompt`
        positions at once and as many steps as a session may come to. Raises NoRoute."""
        ...

    def better(
        self, hops: Sequence[tuple[str, BlockRange]], terms: Terms, position: int
    ) -> Sequence[Leg] | None:
        """A route that is worth moving to from the one with these peers, which hold so many
        positions."""
        ...

    def step_seconds(
        self, hops: Sequence[tuple[str, BlockRange]], terms: Terms
    ) -> Sequence[float] | None:
        """What a step of one position should take at each hop; None: nobody knows."""
        ...

    def rtt(self, peer_id: str) -> float | None:
        """Seconds there and back, if that was measured."""
        ...

    async def refresh(self) -> None:
        """Look into the swarm again."""
        ...

    def failed(self, endpoint: Endpoint, error: SwarmError) -> None: ...

    def worked(
        self, peer_id: str, tokens: int, seconds: float, blocks: int, elapsed: float
    ) -> None:
        """`tokens` positions of all rows went through so many blocks in so many seconds, as it
        says; we saw its answer `elapsed` seconds after that of the hop before it (0: unknown)."""
        ...

    def measured(self, peer_id: str, rtt: float) -> None:
        """A question was answered after `rtt` seconds."""
        ...


Take = Callable[[Hop], Awaitable[Hop | None]]
"""Who stands by for a hop that was lost."""


class Interrupted(Exception):
    """Something happened to the route in the middle of a step: look at it, mend it, go on."""


class Silent(Interrupted):
    """Nothing came for so long that somebody must be to blame."""


class Route:
    """Covers `blocks` whenever `mend` has returned."""

    def __init__(
        self,
        blocks: BlockRange,
        router: Router,
        transport: Transport,
        access: Access,
        timeouts: ClientTimeouts,
    ) -> None:
        self.hops: list[Hop] = []
        self.recoveries = Recoveries()
        self._blocks = blocks
        self._router = router
        self._transport = transport
        self._access = access
        self._timeouts = timeouts
        self._begun = False
        self._vain = 0  # openings in a row of which one failed
        self._refused: dict[str, AdapterRefused] = {}  # our adapter, by whom

    @property
    def legs(self) -> list[tuple[str, BlockRange]]:
        """Whose blocks are used."""
        return [(hop.peer_id, hop.blocks) for hop in self.hops]

    async def mend(
        self,
        epoch: int,
        newborn: int,
        prompt: int,
        terms: Terms,
        listener: Listener,
        patience: float,
        take: Take,
    ) -> bool:
        """Learn who lives and where they stand, replace the others, tell all whom to push to.

        Who does not answer within `patience` seconds counts as dead. Who stands by for them is
        taken first; other new hops need not know of steps up to number `newborn`, but of `prompt`
        positions. Returns whether somebody had to be replaced. Raises NoRoute, Interrupted,
        AdapterRefused.
        """
        lost, asked = list[Hop](), list(self.hops)
        while asked:  # who stands by may be dead as well
            gone = [hop for hop in asked if not hop.alive]
            spares = [hop for hop in await asyncio.gather(*map(take, gone)) if hop is not None]
            for hop in spares:
                hop.listener = listener
            lost += gone
            self.hops = sorted([*self.hops, *spares], key=lambda hop: hop.blocks.start)
            asked = [*(hop for hop in asked if hop.alive), *spares]
            self._link()
            await asyncio.gather(*(hop.sync(epoch, patience) for hop in asked))
            asked = [hop for hop in asked if not hop.alive]
        for hop in lost:
            self._blame(hop)
        self.recoveries.lost(lost)
        self.hops = self._closed_gaps(terms, newborn, prompt)
        targets = [hop.target for hop in self.hops[1:]] + [None]
        await asyncio.gather(
            *(hop.close() for hop in lost),
            *(
                self._open(hop, target, epoch, listener)
                for hop, target in zip(self.hops, targets, strict=True)
            ),
        )
        for hop in self.hops:
            if not hop.alive:
                self._blame(hop)
                self._vain += 1
                raise Interrupted(f"could not open {hop}: {hop.failure}")
        self._begun, self._vain = True, 0
        return bool(lost)

    async def change(
        self, legs: Sequence[Leg], newborn: int, terms: Terms, listener: Listener
    ) -> bool:
        """Leave for this route, of which the present hops may be a part. Then `mend`.

        False: it could not be opened, and nothing has changed. Between steps only.
        """
        held = {(hop.peer_id, hop.blocks): hop for hop in self.hops if hop.alive}
        hops = [
            held.get((server.record.peer_id, blocks)) or Hop(server, blocks, terms)
            for server, blocks in legs
        ]
        new = [hop for hop in hops if not hop.alive]
        targets = [hop.target for hop in hops[1:]] + [None]
        try:
            await asyncio.gather(
                *(
                    self._open(hop, target, 0, listener)
                    for hop, target in zip(hops, targets, strict=True)
                    if not hop.alive
                )
            )
        except asyncio.CancelledError:
            await asyncio.gather(*(hop.close() for hop in new))
            raise
        if not all(hop.alive for hop in new):
            for hop in new:
                self._blame(hop)
            await asyncio.gather(*(hop.close() for hop in new))
            return False
        for hop in new:
            hop.last_step = newborn
        old, self.hops = [hop for hop in self.hops if hop not in hops], hops
        await asyncio.gather(*(hop.close() for hop in old))
        return True

    async def prepare(self, leaving: Hop, terms: Terms, listener: Listener) -> Hop | None:
        """Another server for all blocks of a hop, opened and empty; None if none alone has them."""
        why = RemoteProtocolError(ErrorCode.DRAINING, "it is leaving")
        self._router.failed(leaving.endpoint, why)
        return await self.second(leaving.blocks, frozenset(), terms, listener)

    async def second(
        self, blocks: BlockRange, not_at: frozenset[str], terms: Terms, listener: Listener
    ) -> Hop | None:
        """An empty session for just these blocks, at none of these peers, beside the one that is in
        use; None if no server alone can."""
        following = (hop.target for hop in self.hops if hop.blocks.start == blocks.end)
        target = next(following, None)  # none: it is the last, and answers what is kept only
        for _ in range(_CANDIDATES):
            try:
                unfit = not_at | self._refused.keys()
                (server, held), *more = self._router.route(blocks, terms, exclude=unfit)
            except NoRoute:  # somebody may have come to take its place
                await self._router.refresh()
                continue
            if more:
                return None
            hop = Hop(server, held, terms)
            await self._open(hop, target, 0, listener)
            if hop.alive:
                self._acquaint(hop)
                return hop
            self._blame(hop)
        return None

    def _acquaint(self, hop: Hop) -> None:
        """Have those dial each other who will, once `hop` is in the route."""
        for pusher in self.hops:
            if pusher.blocks.end == hop.blocks.start and pusher.hands_over:
                pusher.send(HandOver(next=hop.target, stage="dial"))
            elif pusher.blocks.start == hop.blocks.end and hop.hands_over:
                hop.send(HandOver(next=pusher.target, stage="dial"))

    async def copy(self, leaving: Hop, hop: Hop) -> None:
        """`leaving` gives `hop`, which is prepared, most of what it holds, while steps go on.

        Raises SwarmError.
        """
        for _ in range(_COPIES):
            held = await leaving.hand_over(hop.target, "ahead", self._timeouts.connect)
            if leaving.position - held <= _FEW:
                return

    async def replace(self, leaving: Hop, hop: Hop, epoch: int) -> None:
        """`leaving` gives `hop` the rest of what it holds, and `hop` takes its place.

        Between steps only. Raises SwarmError: the route is as it was.
        """
        held = await leaving.hand_over(hop.target, "rest", self._timeouts.connect)
        if held != leaving.position:
            raise PeerUnavailable(f"{leaving} handed over {held} of {leaving.position} positions")
        hop.last_step = leaving.last_step
        hop.point_to(leaving.pushes_to)
        at, patience = self.hops.index(leaving), self._timeouts.sync
        before = self.hops[max(0, at - 1) : at]
        for pusher in before:
            pusher.point_to(hop.target)
        await asyncio.gather(*(each.sync(epoch, patience) for each in (hop, *before)))
        if not hop.alive or hop.position != leaving.position:
            for pusher in before:
                await pusher.redirect(leaving.target, epoch, patience)
            why = f": {hop.failure}" if hop.failure else ""
            raise PeerUnavailable(f"{hop} did not inherit everything{why}")
        self.hops[at] = hop
        await leaving.close()

    def suspect(self, owing: Container[Hop], flowing: bool, silence: Silent) -> None:
        """Of hops that owe the oldest answer the first is at fault, or, if steps flow from hop to
        hop, the one before it that claims to have pushed."""
        before: Hop | None = None
        for hop in self.hops:
            if hop in owing:
                break
            before = hop
        else:
            return
        if flowing and before is not None and before.pushes_to is not None:
            before.cannot_push_to = before.pushes_to
        else:
            hop.lose(PeerSilent(f"{hop}: {silence}"))

    async def close(self) -> None:
        """Free the sessions on all servers."""
        await asyncio.gather(*(hop.close() for hop in self.hops))
        self.hops = []

    def _link(self) -> None:
        """Those who live push to who follows, if somebody does already: told with the next sync."""
        living = [hop for hop in self.hops if hop.alive]
        for hop, following in pairwise(living):
            if hop.blocks.end == following.blocks.start:
                hop.point_to(following.target)

    def _closed_gaps(self, terms: Terms, newborn: int, prompt: int) -> list[Hop]:
        """The hops that live, and new ones between them. Raises NoRoute, AdapterRefused."""
        route: list[Hop] = []
        start = self._blocks.start
        for hop in [*(hop for hop in self.hops if hop.alive), None]:
            gap_end = hop.blocks.start if hop is not None else self._blocks.end
            if start < gap_end:
                for server, blocks in self._willing(BlockRange(start, gap_end), terms, prompt):
                    route.append(Hop(server, blocks, terms))
                    route[-1].last_step = newborn
            if hop is not None:
                route.append(hop)
                start = hop.blocks.end
        return route

    def _willing(self, blocks: BlockRange, terms: Terms, prompt: int) -> Sequence[Leg]:
        """A route by those who take our adapter. Raises NoRoute; AdapterRefused: it would be there
        but for that, so that waiting is of no use."""
        try:
            return self._router.route(blocks, terms, prompt, frozenset(self._refused))
        except NoRoute:
            if self._refused:
                legs = self._router.route(blocks, terms, prompt)
                for refused in (self._refused.get(server.record.peer_id) for server, _ in legs):
                    if refused is not None:
                        raise afresh(refused) from None
            raise

    async def _open(
        self, hop: Hop, target: PushTarget | None, epoch: int, listener: Listener
    ) -> None:
        if hop.alive:
            await hop.redirect(target, epoch, self._timeouts.sync)
        else:
            timeout = self._patience(hop)
            await hop.open(self._transport, self._access, target, listener, timeout)
            if hop.rtt is not None:
                self._router.measured(hop.peer_id, hop.rtt)

    def _patience(self, hop: Hop) -> float:
        """Seconds in which a server must have opened its session. In the middle of a text that is
        little, as others may be quicker, but twice as much after each time that it was in vain."""
        rtt, longest = self._router.rtt(hop.peer_id), self._timeouts.connect
        if rtt is None or not self._begun:
            return longest
        return min(longest, (_OPENING + 10 * rtt) * 2.0 ** min(self._vain, 10))

    def _blame(self, hop: Hop) -> None:
        failure = hop.failure
        if isinstance(failure, AdapterRefused):
            self._refused[hop.peer_id] = failure
        innocent = isinstance(failure, SessionClosed | AdapterRefused) or (
            isinstance(failure, RemoteProtocolError)
            and failure.code in _INNOCENT
            and not self.recoveries.repeats(hop)
        )
        if failure is not None and not innocent and not hop.blamed:
            self._router.failed(hop.endpoint, failure)
        hop.blamed = True
