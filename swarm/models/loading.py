"""Loads a span, or a client's shell, from a checkpoint: only the tensors that it needs.

Which files hold them follows from the tensors' names, before anything is downloaded. Transformers
does the loading itself (it fuses experts and renames on the way), into the family's own class from
which everything else was taken out while it was on the meta device.
"""

from __future__ import annotations

import copy
import ctypes
import os
import sys
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as hf_logging

from swarm.errors import CheckpointError, UnsupportedModel, UsageError
from swarm.models.checkpoint import Checkpoint
from swarm.models.families import causal_class, text_config
from swarm.models.outline import outlining
from swarm.models.selftest import prove_split
from swarm.models.shell import RemoteStack, make_shell
from swarm.models.spans import Span, SplitProof
from swarm.models.stripping import strip
from swarm.types import BlockRange

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def load_span(
    checkpoint: Checkpoint,
    blocks: BlockRange,
    *,
    dtype: torch.dtype,
    device: torch.device,
    proof: SplitProof | None = None,
) -> Span:
    """Load `blocks`, after proving that this family can be cut (skipped when `proof` is given).

    Raises UsageError for blocks the model has not, UnsupportedModel for one that cannot be cut,
    CheckpointError when tensors are missing.
    """
    count = text_config(checkpoint.config).num_hidden_layers
    if blocks.end > count:
        raise UsageError(f"{checkpoint.name} has blocks 0:{count}, so it cannot serve {blocks}")
    proof = proof or prove_split(checkpoint.config)
    cls = causal_class(checkpoint.config)
    model = _load(checkpoint, cls, lambda model: strip(model, blocks), dtype, device)
    span = Span(model, blocks, proof)
    _give_back_memory()
    return span


def fetch_span(checkpoint: Checkpoint, blocks: BlockRange) -> None:
    """Have on disk what `load_span` will read. Raises CheckpointError."""
    cls = _pruned_class(causal_class(checkpoint.config), lambda model: strip(model, blocks))
    _fetch(checkpoint, _needed(cls, checkpoint.config, checkpoint.tensor_files))


def _give_back_memory() -> None:
    """Weights that were converted or packed leave holes, which glibc keeps unless it is asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def load_shell(
    checkpoint: Checkpoint,
    auto_class: Any,
    remote: RemoteStack,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """Load embeddings, final norm and head of the class that `auto_class` (for example
    `AutoModelForCausalLM`) has for this family, around `remote` in place of the blocks."""
    cls = auto_class._model_mapping[type(checkpoint.config)]
    model = _load(checkpoint, cls, lambda model: make_shell(model, remote), dtype, device)
    if model.can_generate() and (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    # PEFT writes into each adapter which model it is for.
    model.name_or_path = model.config.name_or_path = checkpoint.address
    return model


def _load(
    checkpoint: Checkpoint,
    cls: type[PreTrainedModel],
    prune: Callable[[PreTrainedModel], None],
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    config = checkpoint.config
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"the weights of {checkpoint.name} are stored quantized; use an unquantized copy"
        )
    pruned = _pruned_class(cls, prune)
    names = _needed(pruned, config, checkpoint.tensor_files)
    paths = _fetch(checkpoint, names)
    with frugal_loading():
        model, report = cast(Any, pruned).from_pretrained(
            None,
            config=config,
            state_dict=_lazy_tensors(checkpoint.tensor_files, paths, names),
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    head = [name for name in missing if not name.startswith(f"{cls.base_model_prefix}.")]
    if missing and (len(head) < len(missing) or cls.can_generate()):
        some = ", ".join(missing[:3])
        raise CheckpointError(f"{checkpoint.name} lacks tensors that the model needs: {some}")
    model.requires_grad_(False)
    for name in head:  # new, and to be trained: transformers has made it up
        model.get_parameter(name).requires_grad_()
    return model


def _fetch(checkpoint: Checkpoint, names: Collection[str]) -> Mapping[str, Path]:
    return checkpoint.fetch({checkpoint.tensor_files[name] for name in names})


def _pruned_class(
    cls: type[PreTrainedModel], prune: Callable[[PreTrainedModel], None]
) -> type[PreTrainedModel]:
    """`cls` as it is after `prune`; transformers must take it for its own, so its names stay."""

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with outlining():
            cls.__init__(self, config, *args, **kwargs)
        prune(self)

    body = {"__init__": build, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _needed(
    cls: type[PreTrainedModel], config: PreTrainedConfig, names: Collection[str]
) -> list[str]:
    """The checkpoint's tensors that end up in `cls`, by the renaming that loading will apply."""
    model = cls(copy.deepcopy(config))
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    return [
        name
        for name in names
        if name in wanted
        or rename_source_key(name, renamings, converters, prefix, wanted)[0] in wanted
        or rename_source_key(name, [], [], prefix, wanted)[0] in wanted
    ]


def _lazy_tensors(
    tensor_files: Mapping[str, str], paths: Mapping[str, Path], names: Collection[str]
) -> dict[str, Any]:
    """Slices that read when indexed, with `pread`: mapped pages would stay in memory as well."""
    files = {
        file: safe_open(path, framework="pt", device="cpu", backend="pread")
        for file, path in paths.items()
    }
    return {name: files[tensor_files[name]].get_slice(name) for name in names}


@contextmanager
def frugal_loading() -> Generator[None]:
    """Has transformers read tensors one after another (its threads would hold all the parts of a
    fused tensor beside it), without a progress bar, and gives freed memory back to the system."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before
        if bars:
            hf_logging.enable_progress_bar()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
            libc.malloc_trim(0)
