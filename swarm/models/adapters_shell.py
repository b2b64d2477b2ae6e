"""Linear layers without weights in a shell, in place of those that servers have: PEFT makes
adapters for them, which are named and saved as those of the whole model."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from swarm.models.adapters import linear_sizes
from swarm.models.families import TUPLE_BLOCKS, causal_class, find_stack, text_config
from swarm.models.shell import StandIn, stack_of


class Phantom(nn.Linear):
    """A linear layer that is elsewhere. What looks like its weights is a single number."""

    def __init__(self, size: tuple[int, int], like: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = size
        number = torch.zeros((), dtype=like.dtype, device=like.device)
        vars(self)["weight"] = number.expand(size[1], size[0])
        vars(self)["bias"] = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as the base class names it
        raise AssertionError("its servers compute it")


class PhantomBlock(nn.Module):
    """A block behind the first one, whose work the stand-in for all has done."""

    def __init__(self, stand_in: StandIn, *, returns_tuple: bool) -> None:
        super().__init__()
        for name, value in vars(stand_in).items():  # stacks read attributes of blocks
            if isinstance(value, str | int) and name not in vars(self):
                setattr(self, name, value)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if self.returns_tuple else hidden_states


def furnish(shell: PreTrainedModel) -> frozenset[str]:
    """Put a phantom where a block has a linear layer, in all blocks. Once for a shell.

    Returns the names of parameters that blocks have, wherever they are.
    """
    stack = stack_of(shell)
    name, blocks = next(
        (name, child)
        for name, child in stack.named_children()
        if isinstance(child, nn.ModuleList) and isinstance(next(iter(child), None), StandIn)
    )
    stand_in = cast(StandIn, blocks[0])
    config = text_config(shell.config)
    with torch.device("meta"):
        model = cast(Any, AutoModel).from_config(config)
    whole, list_name = find_stack(model)
    like = cast(Any, shell).get_input_embeddings().weight
    returns_tuple = config.model_type in TUPLE_BLOCKS
    parameters = set[str]()
    for index, block in enumerate(getattr(whole, list_name)):
        parameters |= {name for name, _ in block.named_parameters()}
        own = stand_in if index == 0 else PhantomBlock(stand_in, returns_tuple=returns_tuple)
        for path, size in linear_sizes(block).items():
            *parents, leaf = path.split(".")
            owner: nn.Module = own
            for parent in parents:
                if not hasattr(owner, parent):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.add_module(leaf, Phantom(size, like))
        if index:
            blocks.append(own)
    assert getattr(stack, name) is blocks
    return frozenset(parameters)


def blocks_of(shell: PreTrainedModel) -> list[nn.Module]:
    """Where the phantoms are, block by block."""
    (blocks,) = (
        child
        for child in stack_of(shell).children()
        if isinstance(child, nn.ModuleList) and isinstance(next(iter(child), None), StandIn)
    )
    return list(blocks)


def phantom_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this config that has no weights: a phantom for each linear layer of its blocks,
    as a shell has them once it is furnished."""
    with torch.device("meta"):
        model = cast(Any, causal_class(config))(copy.deepcopy(config))
    like = torch.zeros((), dtype=dtype)
    for block in phantoms_of(model):
        for path, size in linear_sizes(block).items():
            block.set_submodule(path, Phantom(size, like))
    model.hf_device_map = {"": torch.device("cpu")}  # where what is loaded goes
    return model


def phantoms_of(model: PreTrainedModel) -> list[nn.Module]:
    """Where the phantoms are, block by block."""
    stack, list_name = find_stack(model)
    return list(getattr(stack, list_name))
