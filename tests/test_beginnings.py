"""How swarms of real processes begin, and who is kept apart in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swarm import AutoDistributedModelForCausalLM, LocalSwarm
from swarm.client.network import SwarmNetwork
from swarm.config import ClientConfig, ClientTimeouts, ServerLimits
from swarm.errors import NoRoute, UsageError
from swarm.identity import SwarmKey
from swarm.models.demo import DEMO_MODEL
from tests.hub import serve as serve_hub
from tests.models.tiny import save_tiny
from tests.nursery import Program, QuickSwarm

IDS = torch.tensor([[17, 5, 301, 44, 8, 90]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`swarm-server`, which is expected to end by itself."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with Program(["swarm", "server", *arguments], **pipes) as process:
        output = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, *output)


@contextmanager
def serving(*arguments: str) -> Generator[None]:
    """`swarm-server`, ready, until the block ends."""
    with Program(["swarm", "server", *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("ready ")
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0


def test_two_people_start_a_swarm_and_one_is_in_a_hurry() -> None:
    """`swarm-server --blocks 0:20` as it stands, another completes it; Ctrl-C twice ends."""
    command = [sys.executable, "-m", "swarm", "server", "--blocks=0:20", "--host=127.0.0.1"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout is not None
        assert first.stderr is not None
        peers = first.stdout.readline().strip().partition("peers=")[2].split(",")
        assert peers[0].startswith("/ip4/127.0.0.1/")
        with serving("--blocks=20:24", "--host=127.0.0.1", "--peers", *peers):
            model: Any = AutoDistributedModelForCausalLM.from_pretrained(None, initial_peers=peers)
            with model.inference_session(max_length=64) as session:
                model.generate(IDS, max_new_tokens=2, do_sample=False)
                assert [str(hop.blocks) for hop in session.hops] == ["0:20", "20:24"]
                first.send_signal(signal.SIGINT)
                assert any("leaving; 1 sessions are open" in line for line in first.stderr)
                first.send_signal(signal.SIGINT)
                began = time.monotonic()
                assert first.wait(30) == 130
                assert time.monotonic() - began < ServerLimits().stop_timeout / 2
            SwarmNetwork.leave_all()


_CLIENT = """
import sys, torch
from swarm import AutoDistributedModelForCausalLM
model = AutoDistributedModelForCausalLM.from_pretrained("org/tiny", initial_peers=sys.argv[1:])
ids = torch.tensor([[5, 6, 7]])
print(model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist())
"""


def test_a_repo_is_fetched_by_each_as_far_as_needed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "repo").save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())

    def shards(*blocks: int) -> set[str]:
        """Those with these blocks, or with what is no block."""
        names = tuple(f"model.layers.{block}." for block in blocks)
        return {
            file
            for tensor, file in index["weight_map"].items()
            if (tensor.startswith(names) if names else "layers" not in tensor)
        }

    with serve_hub({"org/tiny": tmp_path / "sharded"}) as hub:

        def fetched() -> set[str]:
            files = {name for name in hub.fetched() if name.endswith(".safetensors")}
            hub.requests.clear()
            return files

        env = hub.environment(tmp_path / "servers")
        with LocalSwarm("org/tiny", spans=["0:2"], env=env) as swarm:
            assert fetched() == shards(0, 1)
            swarm.add("2:6")
            assert fetched() == shards(2, 3, 4, 5) - shards(0, 1)
            client = subprocess.run(
                [sys.executable, "-c", _CLIENT, *swarm.peers],
                env=os.environ | hub.environment(tmp_path / "client"),
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
        assert client.stdout.strip() == str(model.generate(ids, **options)[0].tolist()), client
        assert fetched() == shards()
        assert not shards() >= shards(1, 2), "the test would show nothing"


def test_servers_with_other_weights_are_never_chained(tmp_path: Path) -> None:
    """Not even when their blocks do not overlap and one tensor of one block differs."""
    save_tiny("llama", tmp_path / "one" / "tiny")
    shutil.copytree(tmp_path / "one" / "tiny", tmp_path / "other" / "tiny")
    weights = tmp_path / "other" / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    with QuickSwarm(tmp_path / "one" / "tiny", spans=["0:3"]) as swarm:
        other = tmp_path / "other" / "tiny"
        with serving(str(other), "--blocks=3:6", "--peers", *swarm.peers):
            for folder, missing in ((tmp_path / "one" / "tiny", "3:6"), (other, "0:3")):
                model: Any = AutoDistributedModelForCausalLM.from_pretrained(
                    folder,
                    initial_peers=swarm.peers,
                    config=ClientConfig(timeouts=ClientTimeouts(recovery=0.5)),
                )
                with pytest.raises(NoRoute, match=f"blocks {missing} of tiny"):
                    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
        SwarmNetwork.leave_all()


def test_a_private_swarm_keeps_strangers_out() -> None:
    key = SwarmKey.generate()
    with QuickSwarm(spans=["0:24"], dtype="float32", swarm_key=key) as swarm:
        for wrong in (None, SwarmKey.generate()):
            with pytest.raises(UsageError, match="swarm key") as caught:
                AutoDistributedModelForCausalLM.from_pretrained(
                    None, initial_peers=swarm.peers, swarm_key=wrong
                )
            assert "\n" not in str(caught.value)
        ended = serve("--blocks=0:8", "--peers", *swarm.peers)
        assert ended.returncode == 2
        assert "swarm key" in ended.stderr
        assert ended.stderr.count("\n") == 1
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            None, initial_peers=swarm.peers, swarm_key=key
        )
        local: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
        expected = local.generate(IDS, **GREEDY)
        assert model.generate(IDS, **GREEDY).tolist() == expected.tolist()
        SwarmNetwork.leave_all()
