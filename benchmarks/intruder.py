"""Strangers in a process of their own, a few at once: for every line it reads, so many seconds of
the kind of misbehaviour that the line names. Real ones have machines of their own, so that it takes
what others leave of this one.

The first line names the peers; it is answered when the swarm was seen. The others are answered with
how many visits there were, and how many of them got no answer that they were owed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from benchmarks.stranger import visit
from swarm import AutoDistributedModelForCausalLM
from swarm.client.remote import Connection

AT_ONCE = 4


def main() -> None:
    path, seconds = sys.argv[1], float(sys.argv[2])
    os.nice(19)
    peers = sys.stdin.readline().split()
    model = AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=peers)
    connection: Connection = model.remote_blocks.connection  # type: ignore[attr-defined]
    print("ready", flush=True)
    for line in sys.stdin:
        answered = asyncio.run(_intrude(line.strip(), connection, seconds))
        print(len(answered), answered.count(False), flush=True)


async def _intrude(kind: str, connection: Connection, seconds: float) -> list[bool]:
    until = time.monotonic() + seconds
    router: Any = connection.router
    answered: list[bool] = []

    async def one(index: int) -> None:
        servers = router.view.servers
        while time.monotonic() < until:
            index += 1
            server = servers[index % len(servers)]
            answered.append(await visit(kind, server, connection.terms))

    await asyncio.gather(*map(one, range(AT_ONCE)))
    return answered


if __name__ == "__main__":
    main()
