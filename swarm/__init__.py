"""Run large language models on volunteers' machines as if they were local."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm.client.model import (
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from swarm.local import LocalSwarm

_HOMES = {
    "AutoDistributedModel": "swarm.client.model",
    "AutoDistributedModelForCausalLM": "swarm.client.model",
    "AutoDistributedModelForSequenceClassification": "swarm.client.model",
    "LocalSwarm": "swarm.local",
}

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "LocalSwarm",
]


def __getattr__(name: str) -> object:
    """Imported when first used: `swarm --help` must not wait for torch (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'swarm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
