"""What a server leaves of a model: its blocks, and what the stack around them calls.

Everything else with weights gives way to stand-ins that the stack may call as it always does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarm.models.families import find_stack, text_config
from swarm.types import BlockRange


class _Nothing(nn.Module):
    """In place of embeddings: the stack adds or looks up something that no one will read."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        zeros = torch.zeros(1, 1, hidden_size, device="cpu")  # also while all else is `outlining`
        self.register_buffer("zeros", zeros, persistent=False)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return cast(Tensor, self.zeros)


class _Same(nn.Module):
    """In place of norms and projections around the blocks, which belong to the client."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def strip(model: PreTrainedModel, blocks: BlockRange) -> None:
    """Take everything with weights but `blocks` out of `model`, leaving what its forward calls."""
    stack, list_name = find_stack(model)
    layers = cast(nn.ModuleList, getattr(stack, list_name))
    for index in range(len(layers)):
        if not blocks.start <= index < blocks.end:
            layers[index] = nn.Module()
    size = text_config(model.config).hidden_size
    kept = {layers, *(module for module in model.modules() if stack in module.modules())}
    for owner in kept - {layers}:
        for name, child in owner.named_children():
            if child not in kept and _is_clients(child):
                setattr(owner, name, _Nothing(size) if isinstance(child, nn.Embedding) else _Same())
    model.all_tied_weights_keys = {}


def _is_clients(child: nn.Module) -> bool:
    """Whatever has weights, and norms that have none; what is left computes positions."""
    return any(True for _ in child.parameters()) or "norm" in type(child).__name__.lower()
