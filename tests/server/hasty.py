"""`swarm-server --num-blocks 2` in a hurry: dead after 3 s of silence, a look each half second.

`python -m tests.server.hasty MODEL PEERS`
"""

import asyncio
import sys

from swarm.config import ServerLimits
from swarm.loop import run
from swarm.server.choice import ServerConfig
from swarm.server.node import ServerNode


async def main(model: str, *peers: str) -> None:
    limits = ServerLimits(record_lifetime=3, balance_seconds=0.5)
    config = ServerConfig(model, num_blocks=2, peers=peers, host="127.0.0.1", limits=limits)
    async with ServerNode.running(config) as node:
        print(node.ready_line, flush=True)  # noqa: T201
        await node.wait(asyncio.Event())


if __name__ == "__main__":
    run(main(*sys.argv[1:]))
