"""A server process that serves nothing: a real DHT node, record, port and answers, but no model.

    python -m tests.monitor.peer --blocks 0:12 [--identity FILE] [--peers ADDR]

So it is there in a second, to be killed. Prints `ready PEER_ID ADDRESS` when it is announced.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

from swarm.certificates import issue_certificate
from swarm.dht.announcer import Announcer
from swarm.dht.lean import without_torch
from swarm.dht.records import ServerRecord
from swarm.identity import Access, Identity
from swarm.messages import Info, Load
from swarm.rpc import RpcServer
from swarm.transport import Service, Stream
from swarm.types import BlockRange
from swarm.wire import encode
from tests.monitor.simulated import MODEL

with without_torch():
    from swarm.dht.node import DhtNode


async def serve(blocks: BlockRange, name: str, path: Path, peers: list[str]) -> None:
    access = Access(Identity.load_or_create(path), None)
    certificate = issue_certificate(access.identity, time.time())
    started = time.monotonic()

    async def info(_: bytes) -> bytes:
        assert announcer.signed is not None
        counters = {"uptime_seconds": int(time.monotonic() - started), "steps": 7}
        return encode(Info(record=announcer.signed.data, load=Load(), counters=counters))

    async def refuse(stream: Stream) -> None:
        stream.cancel()

    server = RpcServer(Service(refuse, refuse, info), max_streams=16)
    port = await server.start("127.0.0.1", 0, certificate)
    record = ServerRecord(
        peer_id=access.identity.peer_id,
        model=MODEL,
        blocks=blocks,
        num_blocks=24,
        host="127.0.0.1",
        port=port,
        certificate_digest=certificate.digest,
        throughput=50.0,
        public_name=name,
    )
    dht = await DhtNode.create(access.identity, peers)
    announcer = Announcer(dht, access.identity, lambda: record, random.Random())
    await announcer.publish()
    address = (await dht.visible_addresses())[0]
    sys.stdout.write(f"ready {access.identity.peer_id} {address}\n")
    sys.stdout.flush()
    await announcer.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=BlockRange.parse, required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--peers", nargs="*", default=[])
    told = parser.parse_args()
    asyncio.run(serve(told.blocks, told.name, told.identity, told.peers))
