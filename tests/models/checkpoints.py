"""Questions that several tests ask about checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.errors import CheckpointError
from swarm.models.checkpoint import Checkpoint


def shard_of(checkpoint: Checkpoint, block: int) -> str:
    """The weight file that holds this block of a Llama."""
    return checkpoint.tensor_files[f"model.layers.{block}.mlp.up_proj.weight"]


def refused(text: str, name_or_path: str | Path) -> str:
    """Opens what must not open; the message matches `text` and is one sentence on one line."""
    with pytest.raises(CheckpointError, match=text) as caught:
        Checkpoint.open(name_or_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
