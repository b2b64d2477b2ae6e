"""When nobody has some blocks any more, a spare server takes them, and is the same server."""

from __future__ import annotations

import asyncio
import re
import threading
import weakref
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from swarm import AutoDistributedModelForCausalLM
from swarm.client.network import SwarmNetwork
from swarm.config import ServerLimits
from swarm.dht.directory import Directory
from swarm.dht.node import DhtNode
from swarm.dht.records import ServerState
from swarm.errors import UsageError
from swarm.loop import WORK_THREAD
from swarm.models.checkpoint import Checkpoint
from swarm.models.spans import Span
from swarm.server import throughput
from swarm.server.choice import ServerConfig
from swarm.server.node import ServerNode
from swarm.server.serving import Source
from swarm.types import BlockRange, ModelId
from tests.nursery import Program
from tests.server.nodes import bystander, look, play


@contextmanager
def server(model: Path, peers: list[str]) -> Generator[Program]:
    with Program(["tests.server.hasty", str(model), *peers], stdout=PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


async def ready(process: Program) -> tuple[str, str]:
    """Its blocks and its peer id."""
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    found = re.match(r"ready .* blocks=(\S+) .*/p2p/(\w+)$", line)
    assert found, line
    return found[1], found[2]


async def holders(directory: Directory, blocks: str) -> set[str]:
    """Peer ids. Whoever is silent still counts while nobody else is there."""
    records = [signed.record for signed in (await directory.refresh()).servers]
    return {r.peer_id for r in records if str(r.blocks) == blocks and r.state == "online"}


def test_killing_the_only_holder_of_blocks_moves_a_spare_server(model: Path) -> None:
    """Two of the three start at the same moment, and share out what is left."""
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = LlamaForCausalLM.from_pretrained(model).generate(prompt, **options)  # type: ignore[arg-type]

    async def scene() -> None:
        async with bystander() as (dht, joined_by):
            await kill_one(dht, list(joined_by))

    async def kill_one(dht: DhtNode, peers: list[str]) -> None:
        directory = Directory(dht, ModelId("tiny-llama", Checkpoint.open(model).fingerprint), 4)
        with server(model, peers) as first:
            held = {first: await ready(first)}
            with server(model, peers) as second, server(model, peers) as third:
                held |= {second: await ready(second), third: await ready(third)}
                spans = [blocks for blocks, _ in held.values()]
                assert sorted(set(spans)) == ["0:2", "2:4"]
                victim = next(p for p in held if spans.count(held[p][0]) == 1)
                alone, dead = held[victim]
                victim.kill()
                while dead in await holders(directory, alone):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                remote: Any = await asyncio.to_thread(
                    AutoDistributedModelForCausalLM.from_pretrained, model, peers
                )
                got = await asyncio.to_thread(remote.generate, prompt, **options)
                assert got.tolist() == expected.tolist()
                await asyncio.to_thread(SwarmNetwork.leave_all)

    play(scene())


def test_a_spare_server_moves_to_where_one_left_and_is_the_same_server(
    config: ServerConfig,
) -> None:
    """The session that was open on it goes on elsewhere, and comes out right."""
    config = replace(config, limits=ServerLimits(balance_seconds=0.2, stop_timeout=0.3))
    prompt = torch.tensor([[1, 2, 3]])
    four = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    eight = four | {"max_new_tokens": 8, "min_new_tokens": 8}
    expected = LlamaForCausalLM.from_pretrained(config.model).generate(prompt, **eight)  # type: ignore[arg-type]

    async def scene() -> None:
        async with bystander() as (dht, peers), AsyncExitStack() as stack:

            async def add(**changes: Any) -> ServerNode:
                return await stack.enter_async_context(
                    ServerNode.running(replace(config, peers=peers, **changes))
                )

            ending = ServerNode.running(replace(config, blocks=BlockRange(2, 4), peers=peers))
            async with ending:
                await add(blocks=BlockRange(0, 2), throughput=1.0)
                spare = await add(num_blocks=2, throughput=1e6)
                before = spare.record
                assert str(before.blocks) == "0:2"
                model: Any = await asyncio.to_thread(
                    AutoDistributedModelForCausalLM.from_pretrained, config.model, peers
                )
                session = model.inference_session(max_length=16)
                await asyncio.to_thread(model.generate, prompt, session=session, **four)
                assert session.hops[0].peer_id == before.peer_id
                weights = weakref.ref(spare._serving._held.span)  # type: ignore[union-attr]
            async with asyncio.timeout(20):
                while (str(spare.blocks), spare.record.state) != ("2:4", ServerState.ONLINE):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            got = await asyncio.to_thread(model.generate, None, session=session, **four)
            assert got[0].tolist() == expected[0, -4:].tolist()
            assert [str(hop.blocks) for hop in session.hops] == ["0:2", "2:4"]
            assert session.hops[1].peer_id == before.peer_id
            assert spare.record.port == before.port
            assert weights() is None  # their memory is free
            assert not (await look(dht, spare)).missing_blocks()
            await asyncio.to_thread(session.close)
            await asyncio.to_thread(SwarmNetwork.leave_all)

    play(scene())


@pytest.mark.parametrize("roomy", [True, False])
def test_a_server_that_cannot_load_other_blocks_serves_its_own_again(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, roomy: bool
) -> None:
    load = Source.load

    def only_ours(source: Source, blocks: BlockRange) -> Span:
        if str(blocks) != "0:2":
            raise UsageError("the disk is full")
        return load(source, blocks)

    async def scene() -> None:
        limits = ServerLimits(kv_bytes=1 << 20)
        async with ServerNode.running(replace(config, num_blocks=2, limits=limits)) as node:
            monkeypatch.setattr(Source, "load", only_ours)
            if not roomy:
                monkeypatch.setattr(throughput, "free_bytes", lambda device: 0)
            before = node._door.handler
            await node.claim(BlockRange(2, 4))
            with pytest.raises(UsageError, match="the disk is full"):
                await node.move(BlockRange(2, 4))
            assert (str(node.blocks), node.record.state) == ("0:2", ServerState.ONLINE)
            assert node._door.handler is not None
            assert (node._door.handler is before) == roomy
            assert not node._door.handler.draining

    play(scene())


def test_it_leaves_politely_also_in_the_middle_of_a_move(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loading, leaving = Source.load, threading.Event(), threading.Event()

    def slow(source: Source, blocks: BlockRange) -> Span:
        loading.set()
        leaving.wait(20)
        return load(source, blocks)

    async def scene() -> None:
        async with ServerNode.running(replace(config, blocks=BlockRange(0, 2))) as node:
            await node._balancing  # to measure
            monkeypatch.setattr(Source, "load", slow)
            monkeypatch.setattr(throughput, "free_bytes", lambda device: 0)
            await node.claim(BlockRange(2, 4))
            node._balancing = asyncio.create_task(node.move(BlockRange(2, 4)))
            await asyncio.to_thread(loading.wait, 20)
            await node.drain()
            assert node.record.state is ServerState.DRAINING
            assert node._door.handler is None
            leaving.set()

    play(scene())
    for thread in threading.enumerate():  # torch must not be in there when the process ends
        if thread.name == WORK_THREAD:
            thread.join()
