"""Builds models without their weights: to see what they consist of, or to load them then."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_MADE_UP = (Tensor.normal_, Tensor.uniform_)


class _Sparing(TorchFunctionMode):
    """Leaves out what nobody will read, and has what models compute of positions computed on the
    CPU. These are few numbers; for either on the meta device torch imports its compiler, which
    takes a second and 72 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given: dict[str, Any] = kwargs or {}
        if func in _MADE_UP or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        if func is torch.arange and given.get("device") is None:
            given = {**given, "device": "cpu"}
        try:
            return func(*args, **given)
        except RuntimeError:  # perhaps as some are on the CPU and others not
            return func(*tree_map_only(Tensor, _without_numbers, args), **given)


def _without_numbers(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


@contextmanager
def outlining() -> Generator[None]:
    """Inside, this thread builds models on the meta device, and makes up no weights for them."""
    with torch.device("meta"), _Sparing():
        yield
