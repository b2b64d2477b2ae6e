"""Only what is needed is fetched and held, and it is what transformers would have loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from swarm.errors import CheckpointError, UnsupportedModel, UsageError
from swarm.models.checkpoint import Checkpoint
from swarm.models.loading import load_shell, load_span
from swarm.models.selftest import ChainedSpans
from swarm.models.spans import Span
from swarm.types import BlockRange
from tests.models.splits import TOLERANCE, logits, proof, text
from tests.models.tiny import FAMILIES, save_tiny, tiny_model

CPU = torch.device("cpu")


class Watched(Checkpoint):
    """Remembers which weight files were asked for."""

    def fetch(self, files: Collection[str]) -> Mapping[str, Path]:
        vars(self).setdefault("asked", []).append(set(files))
        return super().fetch(files)


def span(
    checkpoint: Checkpoint, family: str, start: int, end: int, dtype: torch.dtype = torch.float32
) -> Span:
    return load_span(
        checkpoint, BlockRange(start, end), dtype=dtype, device=CPU, proof=proof(family)
    )


def chain_logits(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> Tensor:
    spans = [span(checkpoint, family, *cut, dtype) for cut in ((0, 1), (1, 4), (4, 6))]
    chain = ChainedSpans([(part, part.blocks) for part in spans], 32)
    shell = load_shell(checkpoint, AutoModelForCausalLM, chain, dtype=dtype, device=CPU)
    return logits(shell, text(2, 12), past_key_values=chain.open(2), use_cache=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_and_shell_from_a_checkpoint_equal_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    shards = FAMILIES.index(family) % 2  # every other family lies in one file
    model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    got = chain_logits(Checkpoint.open(tmp_path), family, torch.float32)
    assert (got - logits(model, text(2, 12))).abs().max() <= TOLERANCE


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_are_converted_whatever_is_stored(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    model: Any = tiny_model("mixtral")
    model.to(stored).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    expected: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    assert span(checkpoint, "mixtral", 2, 3, wanted).dtype == wanted
    got = chain_logits(checkpoint, "mixtral", wanted)
    assert got.dtype == wanted
    tolerance = TOLERANCE if wanted == torch.float32 else 0.1
    assert (got - logits(expected, text(2, 12))).abs().max() <= tolerance


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "falcon"])
def test_only_files_with_needed_tensors_are_fetched(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    opened = Checkpoint.open(tmp_path)
    checkpoint = Watched(**{name: getattr(opened, name) for name in opened.__dataclass_fields__})
    span(checkpoint, family, 2, 4)
    (asked,) = vars(checkpoint)["asked"]
    needed = {
        file
        for name, file in checkpoint.tensor_files.items()
        if re.search(r"(layers|h)\.[23]\.", name)
    }
    assert asked == needed
    assert len(asked) < len(set(checkpoint.tensor_files.values()))


def test_a_span_holds_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    model: Any = save_tiny("llama", tmp_path)
    part: Any = span(Checkpoint.open(tmp_path), "llama", 1, 3)
    held = sum(parameter.numel() for parameter in part._stack.parameters())
    assert held == sum(p.numel() for layer in model.model.layers[1:3] for p in layer.parameters())
    assert not any(parameter.requires_grad for parameter in part._stack.parameters())


def test_base_model_checkpoints_load_as_well(tmp_path: Path) -> None:
    """GPT-2's own files name their tensors `h.0...`, not `transformer.h.0...`."""
    model: Any = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    got = chain_logits(Checkpoint.open(tmp_path), "gpt2", torch.float32)
    assert (got - logits(model, text(2, 12))).abs().max() <= TOLERANCE


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    span(checkpoint, "llama", 0, 2)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj"):
        span(checkpoint, "llama", 1, 3)


def test_blocks_beyond_the_model_are_a_usage_error(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(UsageError, match="blocks 0:6"):
        span(Checkpoint.open(tmp_path), "llama", 4, 7)


def test_quantized_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="unquantized"):
        span(Checkpoint.open(tmp_path), "llama", 0, 2)


def test_loading_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    before, dtype = dict(os.environ), torch.get_default_dtype()
    config = checkpoint.config.to_dict()
    span(checkpoint, "llama", 0, 2, torch.bfloat16)
    assert dict(os.environ) == before
    assert torch.get_default_dtype() == dtype
    assert checkpoint.config.to_dict() == config
