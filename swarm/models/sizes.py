"""How large a model's parts are, by its config alone: no weights are read or made."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from swarm.models.cache import ProbeCache, plan_layers
from swarm.models.families import cache_argument, causal_class, find_stack, text_config
from swarm.types import BlockRange

# Experts of which a token visits a few. Shared ones are visited by all.
_EXPERTS = re.compile(r"(^|\.)experts\.")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_VISITED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True, slots=True)
class BlockSize:
    """One block: numbers in its weights, and in those that one token meets; numbers that it keeps
    of every token, of the last `window` tokens only (None: of all), and besides of every row."""

    weights: int
    active: int
    kept: int
    window: int | None = None
    fixed: int = 0


@dataclass(frozen=True, slots=True)
class ModelSize:
    """`ends` are numbers in the weights of a client: embeddings, final norm and head."""

    blocks: tuple[BlockSize, ...]
    ends: int
    hidden_size: int


def measure_sizes(config: PreTrainedConfig) -> ModelSize:
    """Takes a second or two. Raises UnsupportedModel."""
    with torch.device("meta"):
        model: Any = causal_class(config)(copy.deepcopy(config))
        model.to(torch.bfloat16)
    stack, name = find_stack(model)
    layers = cast(Sequence[nn.Module], getattr(stack, name))
    text = text_config(config)
    share = _visited_share(text)
    weights = [_count(layer, share) for layer in layers]
    ends = sum(p.numel() for p in model.parameters()) - sum(whole for whole, _ in weights)
    kept = _kept(model, len(layers))
    blocks = (BlockSize(*w, *k) for w, k in zip(weights, kept, strict=True))
    return ModelSize(tuple(blocks), ends, int(text.hidden_size))


def _count(layer: nn.Module, share: float) -> tuple[int, int]:
    """Numbers in a block, and those that a token meets."""
    routed = {name for name, _ in layer.named_parameters() if _EXPERTS.search(name)}
    sizes = {name: p.numel() for name, p in layer.named_parameters()}
    many = sum(sizes[name] for name in routed)
    whole = sum(sizes.values())
    return whole, whole - many + round(many * share)


def _visited_share(config: PreTrainedConfig) -> float:
    """Of its routed experts, that one token visits."""
    count = next((getattr(config, n) for n in _COUNTS if getattr(config, n, None)), None)
    visited = next((getattr(config, n) for n in _VISITED if getattr(config, n, None)), None)
    return min(1.0, visited / count) if count and visited else 1.0


@torch.inference_mode()
def _kept(model: PreTrainedModel, count: int) -> list[tuple[int, int | None, int]]:
    """For every block: numbers per token, the window, and numbers per row. A first token shows
    them, without being computed."""
    stack, _ = find_stack(model)
    probe = ProbeCache(plan_layers(text_config(model.config)), BlockRange(0, count))
    hidden = torch.zeros(
        1, 1, text_config(model.config).hidden_size, dtype=torch.bfloat16, device="meta"
    )
    cast(Any, stack)(inputs_embeds=hidden, use_cache=True, **{cache_argument(stack.forward): probe})
    paged, others = probe.shapes()
    found: list[tuple[int, int | None, int]] = []
    for index in range(count):
        if (shape := paged.get(index)) is not None:
            found.append((shape.numbers, shape.window, 0))
        else:
            state = others.get(index)
            # Bytes, of numbers that have two each here.
            found.append((state.per_token // 2, None, state.fixed // 2) if state else (0, None, 0))
    return found
