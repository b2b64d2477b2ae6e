"""Some blocks of a span as a stack of their own, for the model's own forward to run."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn

from swarm.models.families import sliced_config
from swarm.models.fixed import FixedPass
from swarm.types import BlockRange


class _Entry(nn.Module):
    """The first block of a view: what the stack made of its input gives way to what we received."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.block(self.hidden, *args[1:], **kwargs)
        kwargs["hidden_states"] = self.hidden
        return self.block(**kwargs)

    def __getattr__(self, name: str) -> Any:  # stacks read attributes such as `attention_type`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class View:
    """The stack as it looks to sessions on one sub-span."""

    def __init__(self, stack: nn.Module, list_name: str, blocks: BlockRange) -> None:
        layers = list(cast(nn.ModuleList, getattr(stack, list_name)))[blocks.start : blocks.end]
        self.entry = _Entry(layers[0])
        self.stack = copy.copy(stack)
        vars(self.stack)["_modules"] = dict(stack.named_children())
        # A plain list, since models slice it in every forward and module lists are slow at that.
        del vars(self.stack)["_modules"][list_name]
        self.layers = [self.entry, *layers[1:]]
        vars(self.stack)[list_name] = self.layers
        config = cast(Any, stack).config
        vars(self.stack)["config"] = sliced_config(config, blocks.start, blocks.end)

    def run(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        vars(self.entry)["hidden"] = hidden  # a module's own way to set attributes is slow
        kwargs = {"use_cache": True, "return_dict": True} | kwargs
        try:
            return self.stack(inputs_embeds=hidden, **kwargs)[0]
        finally:
            vars(self.entry)["hidden"] = None

    def decode(self, hidden: Tensor, work: FixedPass) -> Tensor:
        """A pass that brings its positions along: nothing else may differ from one to the next."""
        return self.run(hidden, position_ids=work.place[None], past_key_values=work)
