"""The part of a distributed model that is trained, in a file of its own."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from swarm.errors import UsageError

FILE = "model.safetensors"  # where transformers' Trainer looks when it resumes


def save_trained(model: PreTrainedModel, folder: Path) -> None:
    """What has `requires_grad`, by the names that it has in the model, and the config.

    Raises UsageError if that is nothing.
    """
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not tensors:
        raise UsageError(
            "nothing here is trained: let something have requires_grad, or load the model with "
            "tuning_mode='ptune'; its own weights are where it was loaded from"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    model.config.save_pretrained(folder)


def load_trained(model: PreTrainedModel, folder: Path) -> None:
    """What `save_trained` wrote. Raises UsageError, and then has changed nothing."""
    try:
        tensors: dict[str, Tensor] = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {folder / FILE}: {error}") from error
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own = parameters.get(name)
        if own is None or own.shape != tensor.shape:
            shape = "not there" if own is None else list(own.shape)
            raise UsageError(
                f"{folder / FILE} has {name} {list(tensor.shape)}, in this model it is {shape}: "
                "load the model with the same tuning_mode, pre_seq_len and num_labels"
            )
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
