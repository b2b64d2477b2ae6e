"""The client's half of a model: the family's own class, with one stand-in where its blocks were.

Embeddings, final norm and head are real and run by the model's own forward; the stand-in hands the
hidden states, and the mask and positions as the caller gave them, to a `RemoteStack`.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache

from swarm.models.families import TUPLE_BLOCKS, cache_argument, find_stack, text_config

# No attention runs here, so the masks that the stack makes for its blocks need only be there.
REMOTE = "swarm_remote"
AttentionMaskInterface.register(REMOTE, lambda **_: torch.ones(1, 1, 1, 1, dtype=torch.bool))


class RemoteStack(Protocol):
    """All blocks of the model, wherever they are."""

    def __call__(
        self,
        hidden: Tensor,
        *,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        extras: Mapping[str, Tensor],
    ) -> Tensor:
        """`[B, T, H]` in and out; `attention_mask` is the caller's raw mask, `[B, past + T]`."""
        ...


class ShellCache(Cache):
    """What `generate` takes for a cache while the real ones are on servers: only a length."""

    length = 0  # not set in __init__: in subclasses it may be somebody else's

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.length > 0


class _Call(threading.local):
    """The arguments of the stack's forward that is running in this thread."""

    arguments: Mapping[str, Any] = {}


class StandIn(nn.Module):
    """The only block of a shell."""

    def __init__(
        self, stack: nn.Module, first: nn.Module, remote: RemoteStack, *, returns_tuple: bool
    ) -> None:
        super().__init__()
        for name, value in vars(first).items():  # stacks read attributes such as `attention_type`
            if isinstance(value, str | int) and name not in vars(self):
                setattr(self, name, value)
        self.remote = remote
        self.returns_tuple = returns_tuple
        self._call = _Call()
        self._cache_argument = cache_argument(stack.forward)
        self._signature = inspect.signature(stack.forward)
        stack.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._call.arguments = self._signature.bind(*args, **kwargs).arguments if args else kwargs

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        given = self._call.arguments
        output = self.remote(
            hidden_states,
            position_ids=given.get("position_ids"),
            attention_mask=given.get("attention_mask"),
            past_key_values=given.get(self._cache_argument),
            extras={},
        )
        return (output, None) if self.returns_tuple else output


def make_shell(model: PreTrainedModel, remote: RemoteStack) -> None:
    """Replace all blocks of `model`, which may be on the meta device, by `remote`, in place."""
    stack, list_name = find_stack(model)
    returns_tuple = text_config(model.config).model_type in TUPLE_BLOCKS
    stand_in = StandIn(stack, getattr(stack, list_name)[0], remote, returns_tuple=returns_tuple)
    setattr(stack, list_name, nn.ModuleList([stand_in]))
    config = copy.copy(cast(Any, stack).config)  # the model's own stays fit for other models
    config._attn_implementation = REMOTE
    vars(stack)["config"] = config


def stack_of(shell: PreTrainedModel) -> nn.Module:
    """The module whose blocks `make_shell` replaced."""
    for owner in shell.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and isinstance(next(iter(child), None), StandIn):
                return owner
    raise AssertionError("not a shell")
