"""A server node starts, chooses, serves, and leaves without a trace."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from swarm import AutoDistributedModelForCausalLM
from swarm.certificates import check_certificate, fetch_certificate
from swarm.client.network import SwarmNetwork
from swarm.config import ServerLimits
from swarm.dht.directory import SwarmView
from swarm.dht.records import ServerRecord, ServerState, sign_record
from swarm.errors import ErrorCode, InvalidRecord, UsageError
from swarm.identity import Identity
from swarm.messages import PushTarget, Refused
from swarm.models.checkpoint import Checkpoint
from swarm.models.spans import Span
from swarm.server import throughput
from swarm.server.choice import ServerConfig, pick_dtype
from swarm.server.door import Door
from swarm.server.node import ServerNode
from swarm.server.throughput import SHAPES
from swarm.types import BlockRange, ModelId
from swarm.wire import decode
from tests.server.nodes import bystander, look, play


async def refused(config: ServerConfig, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        async with ServerNode.running(config):
            pytest.fail("it runs")
    assert "\n" not in str(caught.value)


def test_a_server_alone_serves_and_says_so(config: ServerConfig) -> None:
    async def scene() -> None:
        async with ServerNode.running(replace(config, blocks=BlockRange(1, 3))) as node:
            assert re.fullmatch(
                r"ready model=tiny-llama blocks=1:3 address=127\.0\.0\.1:\d+ "
                r"peers=/ip4/127\.0\.0\.1/tcp/\d+/p2p/Qm\w+",
                node.ready_line,
            )
            assert node.record.state is ServerState.ONLINE
            assert node.record.throughput > 0
            port = node.record.port
        with pytest.raises(ConnectionRefusedError):  # the port is free again
            socket.create_connection(("127.0.0.1", port), timeout=1)

    play(scene())


def test_speeds_are_measured_once_or_given(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    measured: list[tuple[int, int]] = []
    measure = throughput.measure

    def spied(span: Span, rows: int, tokens: int) -> float:
        measured.append((rows, tokens))
        return measure(span, rows, tokens)

    monkeypatch.setattr(throughput, "measure", spied)

    async def start(**changes: Any) -> ServerRecord:
        """What it announces when all has been measured."""
        measured.clear()
        async with ServerNode.running(replace(config, blocks=BlockRange(0, 2), **changes)) as node:
            await node._balancing
            return node.record

    async def scene() -> None:
        first = await start()
        assert sorted(measured) == sorted(SHAPES.values())
        assert first.batch_throughput > first.throughput > 0
        again = await start()
        assert measured == [
            SHAPES["alone"]
        ]  # as it must compute something before others rely on it
        assert again.batch_throughput == first.batch_throughput
        given = await start(throughput=100.0)
        assert (given.throughput, given.batch_throughput) == (50.0, 50.0)
        await start(throughput="eval")
        assert sorted(measured) == sorted(SHAPES.values())

    play(scene())


def test_servers_without_blocks_share_the_model_and_one_leaves(config: ServerConfig) -> None:
    async def scene() -> None:
        half = replace(config, num_blocks=2)
        async with (
            bystander() as (dht, peers),
            ServerNode.running(replace(half, peers=peers)) as first,
        ):
            async with ServerNode.running(replace(half, peers=peers)) as second:
                assert [str(s.record.blocks) for s in (first, second)] == ["0:2", "2:4"]
                view = await look(dht, first)
                assert not view.missing_blocks()
                await second.drain()
                assert second.record.state is ServerState.DRAINING
            view = await look(dht, first)
            assert view.missing_blocks() == (BlockRange(2, 4),)
            assert [s.record.peer_id for s in view.servers] == [first.record.peer_id]

    play(scene())


def test_without_a_model_it_serves_what_the_swarm_does(config: ServerConfig) -> None:
    async def scene() -> None:
        named = replace(config, model_name="swarm-demo", blocks=BlockRange(0, 2))
        async with bystander() as (_, peers):
            nothing = replace(config, model=None, peers=peers)
            await refused(nothing, "serves no model yet: say which MODEL")
            async with ServerNode.running(replace(named, peers=peers)):
                # The bundled model has that name, but these weights are others.
                await refused(nothing, "has other weights: say which MODEL")

    play(scene())


def test_without_anything_it_starts_a_swarm_that_others_complete() -> None:
    async def scene() -> None:
        bundled = ServerConfig(host="127.0.0.1", device="cpu", num_blocks=2)
        async with (
            ServerNode.running(bundled) as first,
            ServerNode.running(replace(bundled, peers=tuple(first.peers), num_blocks=3)) as second,
        ):
            assert (first.record.model.name, str(first.blocks)) == ("swarm-demo", "0:2")
            assert (second.record.model, str(second.blocks)) == (first.record.model, "2:5")

    play(scene())


def test_alone_on_a_cpu_it_computes_exactly(config: ServerConfig, tmp_path: Path) -> None:
    """Whatever the weights are stored in; on other devices that is what it computes in."""
    half = LlamaForCausalLM.from_pretrained(config.model, dtype=torch.bfloat16)  # type: ignore[arg-type]
    half.save_pretrained(tmp_path / "half")
    checkpoint = Checkpoint.open(tmp_path / "half")
    view = SwarmView(ModelId("half", checkpoint.fingerprint), 4)
    picks = [pick_dtype("auto", checkpoint, view, torch.device(d)) for d in ("cpu", "cuda", "mps")]
    assert picks == ["float32", "bfloat16", "bfloat16"]
    assert pick_dtype("float16", checkpoint, view, torch.device("cpu")) == "float16"


def test_more_than_memory_holds_is_refused(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.server.throughput.free_bytes", lambda device: 50_000)
    play(refused(replace(config, blocks=BlockRange(0, 4)), "4 blocks need .* serve fewer with"))
    play(refused(config, "one block needs .*, or lower --kv-memory"))


def test_clients_take_a_server_with_a_new_certificate_at_once(
    config: ServerConfig, tmp_path: Path
) -> None:
    """Rotated under a client that knows the old record only; then started again on its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = replace(config, blocks=BlockRange(0, 4), identity=tmp_path / "identity", port=port)
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = LlamaForCausalLM.from_pretrained(config.model).generate(prompt, **options)  # type: ignore[arg-type]

    async def scene() -> None:
        async with bystander() as (_, peers):
            async with ServerNode.running(replace(config, peers=peers)) as node:
                model: Any = await asyncio.to_thread(
                    AutoDistributedModelForCausalLM.from_pretrained, config.model, peers
                )
                session = model.inference_session(max_length=16)
                node.rotate(time.time())
                got = await asyncio.to_thread(model.generate, prompt, session=session, **options)
                assert got.tolist() == expected.tolist()
                await asyncio.to_thread(session.rollback, 3)
            async with ServerNode.running(replace(config, peers=peers)):
                got = await asyncio.to_thread(model.generate, prompt, **options)
                assert got.tolist() == expected.tolist()
                await asyncio.to_thread(session.close)
            await asyncio.to_thread(SwarmNetwork.leave_all)

    play(scene())


def test_it_computes_as_the_swarm_does(config: ServerConfig) -> None:
    async def scene() -> None:
        async with ServerNode.running(replace(config, dtype="bfloat16", num_blocks=1)) as first:
            joining = replace(config, peers=tuple(first.peers), num_blocks=1)
            async with ServerNode.running(joining) as second:
                assert second.record.numerics == first.record.numerics

    play(scene())


def test_it_pushes_only_to_servers_of_the_very_same_model(config: ServerConfig) -> None:
    async def scene() -> None:
        async with ServerNode.running(config) as node:
            other = Identity.ephemeral()
            record = node.record.model_copy(
                update={
                    "peer_id": other.peer_id,
                    "port": 4242,
                    "announced_at": int(time.time() * 1000),
                }
            )

            def target(**changes: Any) -> PushTarget:
                signed = sign_record(record.model_copy(update=changes), other, None)
                return PushTarget(record=signed.data, session_id=bytes(16), ticket=bytes(16))

            assert node.resolve(target()).port == 4242
            changed = ModelId("tiny-llama", "0" * 64)
            with pytest.raises(InvalidRecord, match="another model"):
                node.resolve(target(model=changed))
            signed = target()
            other_end = signed.record[:-1] + bytes([signed.record[-1] ^ 1])
            forged = signed.model_copy(update={"record": other_end})
            with pytest.raises(InvalidRecord):
                node.resolve(forged)

    play(scene())


def test_what_cannot_be_is_said_in_one_sentence(config: ServerConfig) -> None:
    async def scene() -> None:
        await refused(replace(config, blocks=BlockRange(0, 99)), r"choose --blocks within 0:4")
        await refused(replace(config, num_blocks=5), "has 4 blocks, not 5: choose --num-blocks up")
        await refused(replace(config, model=Path("/no/such")), "there is no folder /no/such")
        await refused(replace(config, device="cuda:77"), "no device 'cuda:77'")
        await refused(replace(config, public_name="x" * 31), "choose another --name")
        tiny = replace(config, limits=ServerLimits(kv_bytes=1000))
        await refused(tiny, "1000 bytes .* hold not one short text.*: give more --kv-memory")
        peers = (f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.ephemeral().peer_id}",)
        await refused(replace(config, peers=peers), "no peers reachable")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            await refused(replace(config, port=port), "the port is in use")

    play(scene())


def test_whoever_comes_too_early_is_asked_to_wait() -> None:
    async def scene() -> None:
        sent: list[bytes] = []

        class Stream:
            async def send(self, frame: bytes) -> None:
                sent.append(frame)

            async def finish(self) -> None: ...

        door: Any = Door()
        await door.session(Stream())
        for answer in (sent[0], await door.info(b"")):
            message = decode(answer)
            assert isinstance(message, Refused)
            assert message.code is ErrorCode.BUSY

    play(scene())


def test_a_new_certificate_is_announced_and_shown(config: ServerConfig) -> None:
    async def scene() -> None:
        async with ServerNode.running(config) as node:
            before = node.record
            node.rotate(time.time())
            record = node.record
            assert record.certificate_digest != before.certificate_digest
            pem = await fetch_certificate(record.host, record.port, 5.0)
            check_certificate(pem, peer_id=record.peer_id, digest=record.certificate_digest)

    play(scene())
