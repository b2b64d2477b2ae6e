"""LoRA adapters of PEFT, as what travels: their factors, and their bytes; from a model without
weights, a client's shell or one that is made just to read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from swarm.errors import UsageError
from swarm.models.adapters import BlockAdapter, Factors
from swarm.models.adapters_shell import phantom_model, phantoms_of
from swarm.models.bundles import MAX_RANK, Bundles, to_bundle
from swarm.models.checkpoint import locate
from swarm.models.loading import frugal_loading
from swarm.models.manifest import ADAPTER_CONFIG_FILE

_WEIGHTS = "adapter_model.safetensors"

Live = Mapping[int, BlockAdapter]
"""Factors by block, through which gradients find back to the parameters of PEFT."""


class ShellAdapters:
    """What PEFT has put around the phantoms of these blocks, as far as it is active."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks

    def live(self) -> Live:
        """Raises UsageError for what servers cannot do."""
        found: dict[int, BlockAdapter] = {}
        for index, block in enumerate(self._blocks):
            factors = {path: _factors(path, layer) for path, layer in _layers(block)}
            active = {path: pair for path, pair in factors.items() if pair is not None}
            if active:
                found[index] = BlockAdapter(active)
        return found


def bundles_of(live: Live) -> Bundles:
    """The bytes of that, made anew each time: optimizers that are fused change weights without a
    trace. Raises UsageError for numbers that are not finite."""
    return Bundles.of({block: _bytes(block, own) for block, own in live.items()})


def find_adapter(source: str, token: str | None = None) -> tuple[str, Path]:
    """Its name, and the folder with its files, from a folder or the Hub. Raises UsageError."""
    name, files = locate(source, None, token)
    for file in (ADAPTER_CONFIG_FILE, _WEIGHTS):
        if file not in files.files:
            raise UsageError(f"{source} has no {file}: give what PEFT's save_pretrained wrote")
        files.path(file)
    return name.rpartition("/")[2], files.path(_WEIGHTS).parent


def read_adapter(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> Bundles:
    """An adapter as PEFT loads it into a model whose weights are of this dtype. Raises UsageError
    unless it is LoRA in linear layers of blocks, and nothing else."""
    model = phantom_model(config, dtype)
    try:
        with frugal_loading(), safe_open(folder / _WEIGHTS, framework="pt") as file:
            count = len(file.keys())
            report = model.load_adapter(str(folder))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        why = str(error).partition("\n")[0][:200]
        raise UsageError(f"the adapter in {folder} does not fit this model: {why}") from error
    with torch.no_grad():
        adapters = ShellAdapters(phantoms_of(model))
        live = adapters.live()
        if report.missing_keys or count != sum(len(block.tensors) for block in live.values()):
            raise UsageError(
                f"the adapter in {folder} is more than LoRA in linear layers of this model's "
                "blocks: servers can preload no such ones"
            )
        return bundles_of(live)


def _layers(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers, known by what they have: importing PEFT takes long."""
    for path, module in block.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            yield path, module


def _factors(path: str, layer: Any) -> Factors | None:
    """Of all active adapters together."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    if layer.disable_adapters:
        return None
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if layer.lora_variant.get(name) is not None or layer.lora_bias.get(name):
            raise UsageError(f"{path}: servers know plain LoRA only, no DoRA, no lora_bias")
        if layer.training and isinstance(layer.lora_dropout[name], nn.Dropout):
            raise UsageError(f"{path}: there is no dropout in remote blocks: set lora_dropout=0")
        downs.append(layer.lora_A[name].weight)
        scale, up = layer.scaling[name], layer.lora_B[name].weight
        ups.append(up if scale == 1 else up * scale)
    if not downs:
        return None
    many = len(downs) > 1
    down, up = (torch.cat(downs), torch.cat(ups, 1)) if many else (downs[0], ups[0])
    if down.shape[0] > MAX_RANK:
        raise UsageError(f"{path}: a rank of {down.shape[0]}; servers take at most {MAX_RANK}")
    return down, up


def _bytes(block: int, adapter: BlockAdapter) -> bytes:
    tensors = {
        path: (down.detach().cpu(), up.detach().cpu())
        for path, (down, up) in adapter.factors.items()
    }
    prompts = None if adapter.prompts is None else adapter.prompts.detach().cpu()
    parts = [part for pair in tensors.values() for part in pair]
    if not all(bool(p.isfinite().all()) for p in (*parts, *([] if prompts is None else [prompts]))):
        raise UsageError(f"the adapter of block {block} has numbers that are not finite")
    return to_bundle(BlockAdapter(tensors, prompts))
