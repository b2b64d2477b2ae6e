"""Checkpoints on disk for the tests of this house; swarm's own cache is one per test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks in at least three shards, with a word for a tokenizer."""
    folder = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        vocab_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture(scope="session")
def single(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in one file."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copy(sharded / "config.json", folder)
    shards = (load_file(path) for path in sorted(sharded.glob("*.safetensors")))
    save_file({k: v for shard in shards for k, v in shard.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """A copy of `sharded` that a test may spoil."""
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache" / "swarm"))
    return tmp_path / "cache" / "swarm"
