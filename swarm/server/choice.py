"""What a new server serves: which model, computed how, and how many blocks of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from swarm.config import ServerLimits
from swarm.dht.directory import SwarmView, list_models
from swarm.dht.memory import Dht
from swarm.errors import UsageError
from swarm.identity import SwarmKey
from swarm.loop import in_thread
from swarm.models.checkpoint import Checkpoint
from swarm.models.families import text_config
from swarm.server import placement, throughput
from swarm.server.compiling import CompileMode
from swarm.tensors import DTYPE_NAMES
from swarm.types import DTYPE_BYTES, BlockRange, DType


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a server is asked to be. Where a choice is None or `auto`, the swarm decides."""

    model: str | Path | None = None
    model_name: str | None = None  # by which others know the model
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    blocks: BlockRange | None = None  # these, always
    adapters: tuple[str, ...] = ()  # folders or repo ids, perhaps after NAME=, to preload
    num_blocks: int | None = None
    peers: tuple[str, ...] = ()
    host: str = "0.0.0.0"  # noqa: S104  # volunteers serve the world
    port: int = 0
    dht_port: int = 0
    announce_host: str | None = None
    public_name: str = ""
    dtype: DType | Literal["auto"] = "auto"
    device: str = "auto"
    compile: CompileMode = "auto"
    throughput: float | Literal["auto", "eval"] = "auto"  # tokens/s that one block would give
    balance_quality: float = 0.75  # as for `placement.consider_move`; 0: never move
    identity: Path | None = None  # None: a new one each time
    metrics_port: int | None = None  # None: nobody is shown any
    metrics_host: str = "127.0.0.1"
    swarm_key: SwarmKey | None = field(default=None, repr=False)
    limits: ServerLimits = field(default_factory=ServerLimits)


def count_blocks(checkpoint: Checkpoint) -> int:
    return text_config(checkpoint.config).num_hidden_layers


async def open_model(config: ServerConfig, model: str | Path | None) -> Checkpoint:
    """Raises UsageError, also if it has fewer blocks than are asked for."""
    checkpoint = await in_thread(
        lambda: Checkpoint.open(
            model, name=config.model_name, revision=config.revision, token=config.token
        )
    )
    name, count = checkpoint.name, count_blocks(checkpoint)
    if config.blocks is not None and config.blocks.end > count:
        raise UsageError(
            f"{name} has blocks 0:{count}, so it cannot serve {config.blocks}: "
            f"choose --blocks within 0:{count}"
        )
    if config.num_blocks is not None and config.num_blocks > count:
        raise UsageError(
            f"{name} has {count} blocks, not {config.num_blocks}: choose --num-blocks up to {count}"
        )
    return checkpoint


async def open_announced_model(config: ServerConfig, dht: Dht) -> Checkpoint:
    """What the swarm serves. Raises UsageError if that is nothing, or cannot be had."""
    models = await list_models(dht)
    if not models:
        raise UsageError("this swarm serves no model yet: say which MODEL to serve")
    wanted = models[0].model
    try:
        checkpoint = await open_model(config, wanted.name)
    except UsageError as error:
        raise UsageError(
            f"this swarm serves {wanted}, which cannot be had by its name ({error}): "
            f"give its folder as MODEL and --model-name {wanted.name}"
        ) from error
    if checkpoint.fingerprint != wanted.fingerprint:
        raise UsageError(
            f"this swarm serves {wanted}, and what is found under that name has other weights: "
            "say which MODEL (and --revision) to serve"
        )
    return checkpoint


def pick_dtype(
    wanted: DType | Literal["auto"], checkpoint: Checkpoint, view: SwarmView, device: torch.device
) -> DType:
    """What others compute this model in, so that routes can be made.

    Else float32 on a CPU, which is exact there and slow in half precision, and elsewhere as stored.
    """
    if wanted != "auto":
        return wanted
    if view.servers:
        common = Counter(server.record.numerics.dtype for server in view.servers)
        return cast(DType, common.most_common(1)[0][0])
    if device.type == "cpu":
        return "float32"
    own = text_config(checkpoint.config).dtype or getattr(checkpoint.config, "dtype", None)
    name = DTYPE_NAMES.get(own, "float32") if isinstance(own, torch.dtype) else "float32"
    return cast(DType, name) if name in get_args(DType) else "float32"


def size_span(
    config: ServerConfig,
    checkpoint: Checkpoint,
    dtype: DType,
    device: torch.device,
    block_parameters: int,
) -> int:
    """How many blocks: as asked, or else as many as fit. Raises UsageError if they do not."""
    block_bytes = block_parameters * DTYPE_BYTES[dtype]
    free_bytes = throughput.free_bytes(device)
    asked = len(config.blocks) if config.blocks else config.num_blocks
    if asked:
        placement.check_fit(asked, block_bytes=block_bytes, free_bytes=free_bytes)
        return asked
    kv_bytes = config.limits.kv_bytes
    return placement.fitting_blocks(
        count_blocks(checkpoint),
        block_bytes=block_bytes,
        cache_bytes=0 if kv_bytes else throughput.cache_bytes(checkpoint.config, dtype),
        free_bytes=free_bytes - (kv_bytes or 0),
    )
