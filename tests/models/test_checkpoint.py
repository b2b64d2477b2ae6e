"""Checkpoints in folders: one fingerprint per model, and nothing read that is not trusted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from swarm.errors import CheckpointError
from swarm.models import manifest
from swarm.models.checkpoint import Checkpoint
from tests.models.checkpoints import refused, shard_of

# One fingerprint per model


@pytest.mark.parametrize("block", range(4))
def test_one_changed_tensor_anywhere_changes_it(sharded: Path, copy: Path, block: int) -> None:
    before = Checkpoint.open(sharded)
    path = copy / shard_of(before, block)
    tensors = load_file(path)
    tensors[f"model.layers.{block}.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert Checkpoint.open(copy).fingerprint != before.fingerprint


def test_the_config_is_part_of_it_and_the_name_is_not(sharded: Path, copy: Path) -> None:
    before = Checkpoint.open(sharded).fingerprint
    assert Checkpoint.open(copy, name="other").fingerprint == before
    config = json.loads((copy / "config.json").read_text()) | {"rope_theta": 5.0}
    (copy / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(copy).fingerprint != before


def test_it_changes_in_place_too(copy: Path) -> None:
    before = Checkpoint.open(copy).fingerprint
    path = copy / shard_of(Checkpoint.open(copy), 0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # same length, same clock tick
    path.write_bytes(data)
    assert Checkpoint.open(copy).fingerprint != before


def test_unchanged_files_are_hashed_once(
    copy: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    for path in copy.iterdir():
        os.utime(path, (1e9, 1e9))
    before = Checkpoint.open(copy).fingerprint
    hashed: list[Path] = []
    monkeypatch.setattr(manifest, "_hash", lambda path, bar: hashed.append(path) or "0" * 64)
    assert Checkpoint.open(copy).fingerprint == before
    assert not hashed
    for note in (own_cache / "digests").iterdir():
        note.write_bytes(b"\xffgarbage")
    assert Checkpoint.open(copy).fingerprint != before, "a damaged cache is computed again"


# What is not trusted


def test_a_folder_that_changes_under_us_is_noticed(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    shard = shard_of(checkpoint, 1)
    data = (copy / shard).read_bytes()
    (copy / shard).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed after"):
        checkpoint.fetch([shard])
    assert (copy / shard).exists(), "people's own files are never deleted"


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ({"weight_map": {"a": "../../.ssh/id_rsa.safetensors"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "x.safetensors\n"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": 7}}, "no safetensors file beside it"),
        ({"weight_map": {"a": {"b": []}}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "model-9.safetensors"}}, r"not there \(model-9.safetensors\)"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_a_hostile_index(copy: Path, index: object, text: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(text, copy)


def test_an_index_too_deep_too_long_or_no_json(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = copy / "model.safetensors.index.json"
    index.write_text("[" * 100_000)
    refused("is not JSON", copy)
    index.write_bytes(b"\xff\xfe")
    refused("is not JSON", copy)
    monkeypatch.setattr(manifest, "MAX_INDEX_BYTES", 1000)
    index.write_text(" " * 1001)
    refused("more than the 1000 allowed", copy)


def test_an_index_that_promises_what_a_shard_lacks(copy: Path) -> None:
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.extra.weight"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model\.extra\.weight"):
        Checkpoint.open(copy).fetch([shard])


def test_truncated_weights(copy: Path, single: Path, tmp_path: Path) -> None:
    shard = shard_of(Checkpoint.open(copy), 0)
    data = (copy / shard).read_bytes()
    (copy / shard).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(copy).fetch([shard])
    (copy / shard).write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(copy).fetch([shard])
    alone = Path(shutil.copytree(single, tmp_path / "alone"))
    os.truncate(alone / "model.safetensors", 9000)
    refused("truncated", alone)


# What people read


def test_a_folder_without_a_model(copy: Path, tmp_path: Path) -> None:
    refused("there is no folder .*check the path", str(tmp_path / "nowhere"))
    refused("there is no folder", "./nowhere")
    refused("is a file: give the folder", copy / "config.json")
    refused("neither a folder nor a model's name", "what is this")
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    refused("neither model.safetensors nor", copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused("pickled weights only.*safetensors", copy)
    (copy / "config.json").unlink()
    refused("'copy' has no config.json", copy)


def test_a_config_that_needs_the_models_own_code(copy: Path) -> None:
    config = {"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('this must not run')")
    refused("without running the model's own code", copy)
    (copy / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    refused("is no config that transformers reads", copy)
    (copy / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    refused("names its own weight files", copy)
