"""Looks now and then whether this server would be of more use with other blocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from swarm.dht.directory import Directory, SwarmView
from swarm.dht.records import ServerState
from swarm.errors import PeerUnavailable, UsageError
from swarm.server.placement import Holder, believe, consider_move, settle
from swarm.types import BlockRange, Numerics

logger = logging.getLogger(__name__)

_COMING = (ServerState.JOINING, ServerState.ONLINE)
_SECONDS_PER_SERVER = 0.1  # between looks: a record each, so no more than 10 kB/s


class Rng(Protocol):
    """A `random.Random`."""

    def random(self) -> float: ...


class Movable(Protocol):
    """What the balancer must know of the server, and can have it do."""

    @property
    def holder(self) -> Holder: ...

    @property
    def move_seconds(self) -> float:
        """What a move would cost, as `consider_move` wants to know it."""
        ...

    async def fetch(self, blocks: BlockRange) -> None:
        """Have the weights of these blocks on this machine. Raises UsageError."""
        ...

    async def claim(self, blocks: BlockRange) -> None:
        """Announce that it will serve these blocks instead."""
        ...

    async def stay(self) -> None:
        """Take the claim back."""
        ...

    async def move(self, blocks: BlockRange) -> None:
        """Serve them. Raises UsageError if that cannot be; then it is as it was before."""
        ...


class Balancer:
    """`quality` is that of `consider_move`; it falls to 0, so that nothing moves, after a failure.

    Whoever has moved lately stays; a new server counts as one that has.
    """

    def __init__(
        self,
        directory: Directory,
        numerics: Numerics,
        server: Movable,
        quality: float,
        rng: Rng,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quality = quality
        self._directory, self._numerics, self._server = directory, numerics, server
        self._rng, self._clock = rng, clock
        self._moved_at = clock()

    async def run(self, period: float) -> None:
        """Look every `period` seconds, in large swarms less often, until cancelled."""
        while self.quality > 0:
            servers = len(self._directory.view.servers)
            await asyncio.sleep(next_look(period, servers, self._rng.random()))
            await self.look(next_look(period, servers, 0.0))

    async def look(self, age: float = 0.0) -> bool:
        """Look at a picture of at most that age, in seconds; whether that led to a move."""
        me = self._server.holder
        try:
            blocks = self._consider(await self._directory.recent(age), me, self._rng.random())
            if blocks is None:
                return False
            await self._server.fetch(blocks)  # while the others are still being served
            if self._consider(await self._directory.refresh(), me, 0.0) != blocks:
                return False
            await self._server.claim(blocks)
            # Whoever had the same thought has announced it, or will see what we announced.
            if self._consider(await self._directory.refresh(), me, 0.0) != blocks:
                await self._server.stay()
                return False
            await self._server.move(blocks)
        except PeerUnavailable as error:
            logger.info("cannot see who serves what: %s", error)
            return False
        except UsageError as error:
            logger.warning("could not move, and stay for good: %s", error)
            self.quality = 0.0
            return False
        self._moved_at = self._clock()
        return True

    def _consider(self, view: SwarmView, me: Holder, now_random: float) -> BlockRange | None:
        holders = believe([*others_in(view, self._numerics, me.peer_id), me])
        return consider_move(
            view.num_blocks,
            holders,
            holders[-1],
            quality=self.quality,
            move_seconds=self._server.move_seconds,
            since_move=self._clock() - self._moved_at,
            now_random=now_random,
        )


def next_look(period: float, servers: int, now_random: float) -> float:
    """Seconds until then: never all at once, and no more traffic in a swarm of ten thousand."""
    return max(period, servers * _SECONDS_PER_SERVER) * (0.5 + now_random)


def others_in(view: SwarmView, numerics: Numerics, peer_id: str) -> list[Holder]:
    """Who holds what, or will soon, of those that can share a route with `peer_id`."""
    return [
        Holder(
            record.peer_id,
            record.blocks,
            max(record.throughput, record.batch_throughput) * len(record.blocks),
        )
        for record in (server.record for server in view.servers)
        if record.state in _COMING
        and record.numerics == numerics
        and record.peer_id not in view.silent
        and record.peer_id != peer_id
    ]


async def look_again(
    directory: Directory, before: SwarmView, numerics: Numerics, me: Holder
) -> BlockRange:
    """Where to go, once `me` is announced, if others chose at the same time. Awaits the DHT."""
    try:
        view = await directory.refresh()
    except PeerUnavailable as error:
        logger.info("cannot see who serves what: %s", error)
        return me.blocks
    known = {(server.record.peer_id, server.record.blocks) for server in before.servers}
    rivals = {
        record.peer_id
        for record in (server.record for server in view.servers)
        if record.state is ServerState.JOINING and (record.peer_id, record.blocks) not in known
    }
    others = others_in(view, numerics, me.peer_id)
    if not any(other.peer_id in rivals for other in others):
        return me.blocks
    return settle(view.num_blocks, believe([*others, me]), me, rivals)
