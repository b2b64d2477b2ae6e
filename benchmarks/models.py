"""Random models with a fixed seed: issue 3's A and B, and one tiny model of several families."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from swarm.models.demo import DEMO_MODEL
from swarm.models.families import causal_class
from swarm.models.shrink import shrink

BLOCKS = 12
THIRDS = ("0:4", "4:8", "8:12")
LLAMAS: dict[str, dict[str, Any]] = {
    "A": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 8,
        "vocab_size": 1024,
    },
    "B": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "vocab_size": 8192,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "gemma2": {},
    "gpt_oss": {},
    "mixtral": {},
    "bloom": {"n_layer": 4},  # its default has two
}


def make_model(name: str, folder: Path, seed: int) -> Path:
    """Writes the model called A, B or by its family into a new folder of `folder`.

    The one called demo is there: the bundled one.
    """
    if name == "demo":
        return DEMO_MODEL
    config = _llama(name) if name in LLAMAS else _tiny(name)
    # With the usual 0.02 such models write one token for ever, which would hide errors.
    config.initializer_range = 0.1
    # No end: every generate makes as many tokens as it is asked for.
    config.eos_token_id = None
    config.bos_token_id = None
    config.pad_token_id = 0
    torch.manual_seed(seed)
    cls: Any = LlamaForCausalLM if name in LLAMAS else causal_class(config)
    target = folder / name
    cls(config).to(torch.float32).save_pretrained(target)
    return target


def _llama(name: str) -> PreTrainedConfig:
    return LlamaConfig(
        **LLAMAS[name],
        num_hidden_layers=BLOCKS,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def _tiny(family: str) -> PreTrainedConfig:
    return shrink(CONFIG_MAPPING[family](**FAMILIES[family]))


def block_bytes(folder: Path, blocks: range) -> int:
    """Bytes of the weights of some blocks of a Llama, as the files have them."""
    wanted = tuple(f"model.layers.{block}." for block in blocks)
    total = 0
    for file in folder.glob("*.safetensors"):
        for name, (begin, end) in _offsets(file).items():
            total += (end - begin) if name.startswith(wanted) else 0
    return total


def _offsets(file: Path) -> dict[str, tuple[int, int]]:
    """From the header: its length in eight bytes, then JSON (safetensors' README)."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {
        name: tuple(entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
