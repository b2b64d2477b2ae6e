"""LoRA adapters of PEFT, as what travels: their factors, and their bytes; from a model without
weights, a client's shell or one that is made just to read them."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from swarm.errors import UsageError
from swarm.models.adapters import BlockAdapter, Factors
from swarm.models.adapters_shell import Phantom, phantom_model, phantoms_of
from swarm.models.bundles import MAX_RANK, Bundles, to_bundle
from swarm.models.checkpoint import locate
from swarm.models.loading import frugal_loading
from swarm.models.manifest import ADAPTER_CONFIG_FILE

_WEIGHTS = "adapter_model.safetensors"
_CHANGE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of what is adapted, at first

Live = Mapping[int, BlockAdapter]
"""Factors by block, through which gradients find back to the parameters of PEFT."""


class ShellAdapters:
    """What PEFT has put around the phantoms of these blocks of a model, as far as it is active.

    `parameters` are the names of all that blocks have, so that nothing is changed here in vain.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], parameters: Collection[str] = ()
    ) -> None:
        self._model = weakref.ref(model)  # which has us
        self._blocks = blocks
        self._parameters = sorted(parameters)
        modules = (pair for block in blocks for pair in block.named_modules())
        self._places = {path for path, module in modules if isinstance(module, Phantom)}

    def live(self) -> Live:
        """Raises UsageError for what servers cannot do."""
        for name, config in getattr(self._model(), "peft_config", {}).items():
            self._check(name, config)
        found: dict[int, BlockAdapter] = {}
        for index, block in enumerate(self._blocks):
            factors = {path: _factors(path, layer) for path, layer in _layers(block)}
            active = {path: pair for path, pair in factors.items() if pair is not None}
            if active:
                found[index] = BlockAdapter(active)
        return found

    def check(self, lost: Collection[str] = ()) -> None:
        """Raises UsageError as `live`, and if tensors that found no place are of blocks."""
        with torch.no_grad():
            self.live()
        owners = {path.rpartition(".")[0] for path in self._parameters}
        if ours := [name for name in lost if any(f".{owner}." in name for owner in owners)]:
            raise UsageError(
                f"this adapter changes {min(ours)}, and {len(ours)} tensors in all, for which this "
                "model's remote blocks have no place: they take LoRA in linear layers only"
            )

    def _check(self, name: str, config: Any) -> None:
        """PEFT itself would leave out what is not here, and say nothing. Raises UsageError."""
        if config.peft_type != "LORA":
            raise UsageError(
                f"adapter '{name}' is {config.peft_type.value}: servers know LoRA only"
            )
        if str(config.init_lora_weights).startswith(_CHANGE_WEIGHTS):
            raise UsageError(
                f"adapter '{name}' begins with other weights than servers have "
                f"(init_lora_weights='{config.init_lora_weights}'): convert it to plain LoRA with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT"
            )
        saved, targets = config.modules_to_save or (), config.target_modules
        sought = [*(() if isinstance(targets, str) else targets), *(config.target_parameters or ())]
        for path in self._parameters:
            owner = path.rpartition(".")[0]
            is_sought = owner not in self._places and any(
                f".{each}".endswith(f".{name}") for name in sought for each in (owner, path)
            )
            is_saved = any(owner.endswith(name) for name in saved)
            if is_saved or is_sought or (config.bias != "none" and path.endswith("bias")):
                raise UsageError(
                    f"adapter '{name}' changes {path} of blocks, which servers keep as it is: they "
                    "take LoRA in linear layers (target_modules) only"
                )


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
        if "ignore_mismatched_sizes" in why:  # which is nothing that our users could set
            why = "its tensors have other shapes (see the report above)"
        raise UsageError(f"the adapter in {folder} does not fit this model: {why}") from error
    try:
        with torch.no_grad():
            live = ShellAdapters(model, phantoms_of(model)).live()
            bundles = bundles_of(live)
    except UsageError as error:
        raise UsageError(f"the adapter in {folder} cannot be used: {error}") from error
    if report.missing_keys or count != sum(len(block.tensors) for block in live.values()):
        raise UsageError(
            f"the adapter in {folder} is more than LoRA in linear layers of this model's blocks: "
            "servers can preload no such ones"
        )
    return bundles


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
