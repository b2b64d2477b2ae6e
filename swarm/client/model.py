"""`from_pretrained` for models whose blocks are elsewhere: real transformers models otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from swarm.client.adapters import find_adapter
from swarm.client.connection import Connection
from swarm.client.generation import distributed_class
from swarm.client.hop import Terms
from swarm.client.network import SwarmNetwork
from swarm.client.remote import RemoteBlocks
from swarm.client.training_prompts import SoftPrompts
from swarm.config import ClientConfig
from swarm.errors import UsageError
from swarm.identity import SwarmKey
from swarm.models.checkpoint import Checkpoint
from swarm.models.families import depends_on_pass, text_config
from swarm.models.loading import load_shell
from swarm.tensors import DTYPE_NAMES, TORCH_DTYPES
from swarm.types import BlockRange, DType, ModelId


class AutoDistributedModel:
    """The model without a head; `from_pretrained` is all there is to it."""

    _auto_class: Any = AutoModel

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        initial_peers: Sequence[str] | None = None,
        *,
        swarm_key: SwarmKey | str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        config: ClientConfig | None = None,
        **source: Any,
    ) -> PreTrainedModel:
        """The family's own class, with embeddings, final norm and head here and blocks elsewhere.

        name_or_path: a folder, a Hugging Face repo id, or None for the bundled demo model.
        initial_peers: multiaddrs of peers of the swarm; None takes them from SWARM_PEERS.
        swarm_key: of a private swarm: a key, its text or its file; None takes it from SWARM_KEY.
        dtype: "auto" takes what the swarm's servers compute in.
        source: `revision`, `token` and `name` (the model's name in the swarm), for the checkpoint;
            `tuning_mode` ("ptune" or "deep_ptune") and `pre_seq_len`, for soft prompts;
            `num_labels` of a new head; `active_adapter`: the name of one that servers announce.
        Raises UsageError (among them CheckpointError) in one sentence, NoRoute.
        """
        if "torch_dtype" in source:  # transformers' older name for it
            dtype = source.pop("torch_dtype")
        mode, length = source.pop("tuning_mode", None), source.pop("pre_seq_len", 0)
        labels, adapter = source.pop("num_labels", None), source.pop("active_adapter", None)
        checkpoint = Checkpoint.open(name_or_path, **source)
        if labels is not None:
            checkpoint.config.num_labels = labels
        sizes = cast(Any, text_config(checkpoint.config))
        model_id = ModelId(checkpoint.name, checkpoint.fingerprint)
        config = config or ClientConfig()
        network = SwarmNetwork.connect(initial_peers, swarm_key)
        router = network.router(model_id, sizes.num_hidden_layers, config)
        numerics = network.numerics(router, _dtype_name(dtype))
        terms = Terms(
            model=model_id,
            numerics=numerics,
            hidden_size=sizes.hidden_size,
            batch_size=1,
            max_length=1,
            whole_steps=depends_on_pass(checkpoint.config),
            codec=config.codec,
        )
        connection = Connection(
            terms, router, network.transport, network.access, config, router.pace
        )
        blocks = RemoteBlocks(connection, BlockRange(0, sizes.num_hidden_layers))
        blocks.announced = find_adapter(network, router, adapter)
        model = load_shell(
            checkpoint,
            cls._auto_class,
            blocks,
            dtype=TORCH_DTYPES[numerics.dtype],
            device=torch.device(device),
        ).eval()
        model.__class__ = distributed_class(type(model))
        cast(Any, model).remote_blocks = blocks
        blocks.prompts = _prompts(model, blocks, mode, length)
        return model


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    """The model with its language-model head: `generate` as transformers has it."""

    _auto_class: Any = AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    """The model with a classification head: the checkpoint's, or a new one, to be trained."""

    _auto_class: Any = AutoModelForSequenceClassification


def _dtype_name(dtype: str | torch.dtype) -> DType | None:
    """None for "auto"."""
    name = DTYPE_NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name == "auto":
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {dtype} is not auto, float32, bfloat16 or float16")
    return name


def _prompts(model: Any, blocks: RemoteBlocks, mode: str | None, length: int) -> SoftPrompts | None:
    if mode is None and not length:
        return None
    if mode is None:
        raise UsageError(f"pre_seq_len={length} goes with tuning_mode='ptune' or 'deep_ptune'")
    return SoftPrompts(mode, length, len(blocks), model.get_input_embeddings().weight)
