"""What this machine can carry: free memory, the size of a block, tokens per second."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from statistics import median
from typing import cast

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from swarm.errors import UsageError
from swarm.models.families import causal_class, find_stack, text_config
from swarm.models.spans import Span, SpanStep
from swarm.types import DTYPE_BYTES, DType

_MEASURE_SECONDS = 0.2
_MEASURE_STEPS = 16
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
    with torch.device("meta"):
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


def tokens_per_second(span: Span) -> float:
    """Decode steps of one token that the span computes in a second, for a session alone."""
    cache = span.open_cache(span.blocks, 1, _MEASURE_STEPS + 1)
    hidden = torch.zeros(1, 1, span.hidden_size, dtype=span.dtype, device=span.device)
    seconds: list[float] = []
    end = time.perf_counter() + _MEASURE_SECONDS
    for _ in range(_MEASURE_STEPS):
        begin = time.perf_counter()
        span.run([SpanStep(cache, hidden)])[0].to("cpu")  # the copy waits for the device
        seconds.append(time.perf_counter() - begin)
        if begin > end and len(seconds) > 2:
            break
    cache.release()
    return 1 / median(seconds)
