"""Server nodes in this process, and what they meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from swarm.dht.directory import Directory, SwarmView
from swarm.dht.node import DhtNode
from swarm.identity import Identity
from swarm.loop import run
from swarm.server.node import ServerNode


def play(coroutine: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(120):
            await coroutine

    run(within())


@asynccontextmanager
async def bystander() -> AsyncGenerator[tuple[DhtNode, tuple[str, ...]]]:
    """Somebody else's DHT node, and the peers to join by."""
    node = await DhtNode.create(Identity.ephemeral())
    try:
        yield node, tuple(await node.visible_addresses())
    finally:
        await node.close()


async def look(dht: DhtNode, server: ServerNode) -> SwarmView:
    record = server.record
    return await Directory(dht, record.model, record.num_blocks).refresh()
