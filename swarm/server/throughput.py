"""What this machine can carry: free memory, the size of a block, tokens per second.

Speeds are measured once for a span of some length, and remembered on disk.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from math import inf
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from swarm.errors import UsageError
from swarm.models.families import causal_class, find_stack, text_config
from swarm.models.manifest import note_path, write_note
from swarm.models.outline import outlining
from swarm.models.spans import Span, SpanStep
from swarm.types import DTYPE_BYTES, DType

_MEASURE_SECONDS = 0.05  # for one shape of pass
_MEASURE_PASSES = 16
_LEAST_PASSES = 2
_ROOMY_TOKENS = 1 << 16
_CACHE_SHARE = 0.7  # of what is free beside the weights; the rest is for activations
_CPU_CACHE_SHARE = 0.25  # other programs live there, too


def pick_device(name: str) -> torch.device:
    """`auto`, or one of torch's names. Raises UsageError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # torch's `meta` has no numbers
    # RuntimeError: no such device; AssertionError: a torch that was built without it
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch finds no device '{name}' here: choose another --device, such as cpu"
        ) from error
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that weights and caches could take now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS tells no more


def cache_budget(device: torch.device) -> int:
    """Bytes for keys and values when nobody says how many; ask when the weights are loaded."""
    share = _CPU_CACHE_SHARE if device.type == "cpu" else _CACHE_SHARE
    return int(free_bytes(device) * share)


def block_parameters(config: PreTrainedConfig) -> int:
    """Numbers in the largest block's weights. Raises UnsupportedModel."""
    with outlining():
        model = causal_class(config)(copy.deepcopy(config))
    stack, list_name = find_stack(model)
    blocks = cast(nn.ModuleList, getattr(stack, list_name))
    return max(sum(p.numel() for p in block.parameters()) for block in blocks)


def cache_bytes(config: PreTrainedConfig, dtype: DType) -> int:
    """Bytes of one block's keys and values for as many tokens as a server should have room for."""
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(heads) * int(size) * _ROOMY_TOKENS * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens/s that go through a whole span, 0 where that is not known: decode steps of one
    session, of 4 and of 16 together, and a prompt."""

    alone: float = 0.0
    of_16: float = 0.0
    of_4: float = 0.0
    prompt: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.alone:.0f} tokens/s for one session, {self.of_4:.0f} for 4 and "
            f"{self.of_16:.0f} for 16 together, {self.prompt:.0f} of prompts"
        )


SHAPES = {"alone": (1, 1), "of_16": (16, 1), "of_4": (4, 1), "prompt": (1, 128)}
"""Rows, and tokens per row, of the passes that tell a span's `Speeds`; most useful first."""


@torch.inference_mode()
def measure(span: Span, rows: int, tokens: int) -> float:
    """Tokens/s of such passes; for whoever owns the device. Raises OutOfPages."""
    passes = _MEASURE_PASSES if tokens == 1 else _LEAST_PASSES
    hidden = torch.zeros(rows, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
    cache = span.open_cache(span.blocks, rows, tokens * passes)
    seconds: list[float] = []
    end = time.perf_counter() + _MEASURE_SECONDS
    try:
        while len(seconds) < passes and (len(seconds) < _LEAST_PASSES or time.perf_counter() < end):
            begin = time.perf_counter()
            cache.make_room(tokens)
            span.run([SpanStep(cache, hidden)])[0].to("cpu")  # the copy waits for the device
            seconds.append(time.perf_counter() - begin)
    finally:
        cache.release()
    # The first one of a shape is slower, and others on this machine can only take time away.
    return rows * tokens / min(seconds[1:])


def remembered(key: str) -> Speeds:
    """What was measured for `key` before (see `speeds_key`)."""
    with suppress(OSError, ValueError, TypeError):
        found = Speeds(**json.loads(note_path("speeds", key).read_bytes()))
        if all(isinstance(value, float) and 0 <= value < inf for value in astuple(found)):
            return found
    return Speeds()


def remember(key: str, speeds: Speeds) -> None:
    write_note(note_path("speeds", key), json.dumps(asdict(speeds)).encode())


def speeds_key(fingerprint: str, blocks: int, dtype: DType, device: torch.device) -> str:
    """What speeds depend on: they are measured anew when any of it is another."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = f"{platform.node()}\n{device.type}\n{where}\n{torch.get_num_threads()}"
    return f"{fingerprint}\n{blocks}\n{dtype}\n{machine}\n{torch.__version__}"
