"""Real processes: when one is killed and nobody else has its blocks, a spare one takes them."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm import AutoDistributedModelForCausalLM
from swarm.client.network import SwarmNetwork
from swarm.dht.directory import Directory
from swarm.dht.node import DhtNode
from swarm.identity import Identity
from swarm.loop import run
from swarm.models.checkpoint import Checkpoint
from swarm.types import ModelId

# As `swarm-server --num-blocks 2`, in a hurry: dead after 3 s of silence, a look each half second.
SERVER = """
import asyncio, sys
from swarm.config import ServerLimits
from swarm.loop import run
from swarm.server.choice import ServerConfig
from swarm.server.node import ServerNode

async def main(model, *peers):
    limits = ServerLimits(record_lifetime=3, balance_seconds=0.5)
    config = ServerConfig(model, num_blocks=2, peers=peers, host="127.0.0.1", limits=limits)
    async with ServerNode.running(config) as node:
        print(node.ready_line, flush=True)
        await node.wait(asyncio.Event())

run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def server(model: Path, peers: list[str]) -> AsyncGenerator[Process]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", SERVER, model, *peers, stdout=PIPE, env=env
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ready(process: Process) -> tuple[str, str]:
    """Its blocks and its peer id."""
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    found = re.match(r"ready .* blocks=(\S+) .*/p2p/(\w+)$", line)
    assert found, line
    return found[1], found[2]


async def holders(directory: Directory, blocks: str) -> set[str]:
    """Peer ids. Whoever is silent still counts while nobody else is there."""
    records = [signed.record for signed in (await directory.refresh()).servers]
    return {r.peer_id for r in records if str(r.blocks) == blocks and r.state == "online"}


def test_killing_the_only_holder_of_blocks_moves_a_spare_server(tmp_path: Path) -> None:
    """Two of the three start at the same moment, and share out what is left."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        vocab_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        dtype="float32",
    )
    local: Any = LlamaForCausalLM(config)
    folder = tmp_path / "tiny-llama"
    local.save_pretrained(folder)
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = local.generate(prompt, **options)

    async def scene(dht: DhtNode) -> None:
        peers = list(await dht.visible_addresses())
        model = ModelId("tiny-llama", Checkpoint.open(folder).fingerprint)
        directory = Directory(dht, model, 4)
        async with server(folder, peers) as first:
            held = {first: await ready(first)}
            async with server(folder, peers) as second, server(folder, peers) as third:
                held |= {second: await ready(second), third: await ready(third)}
                spans = [blocks for blocks, _ in held.values()]
                assert sorted(set(spans)) == ["0:2", "2:4"]
                victim = next(p for p in held if spans.count(held[p][0]) == 1)
                alone, dead = held[victim]
                victim.kill()
                while dead in await holders(directory, alone):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                remote: Any = await asyncio.to_thread(
                    AutoDistributedModelForCausalLM.from_pretrained, folder, peers
                )
                got = await asyncio.to_thread(remote.generate, prompt, **options)
                assert got.tolist() == expected.tolist()
                await asyncio.to_thread(SwarmNetwork.leave_all)

    async def main() -> None:
        dht = await DhtNode.create(Identity.ephemeral())
        try:
            async with asyncio.timeout(120):
                await scene(dht)
        finally:
            await dht.close()

    run(main())
