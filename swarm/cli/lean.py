"""Lets commands import torch and transformers without two parts that nobody here uses: torch's
compiler, and tensors that lie in several processes.

Together that saves 72 MB and a third of the time. Neither saves much alone, as each imports what is
large in the other (sympy, for one).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, cast

_COMPILER = "torch._dynamo"

_Function = Callable[..., Any]


class _Compiler(ModuleType):
    """torch's compiler, whose code runs when anything is asked of it but to mark functions.

    transformers marks some while it is imported, for the case that something will be compiled.
    """

    _marks: list[tuple[str, _Function]]

    def disable(self, function: Any = None, recursive: bool = True, **told: Any) -> _Function:
        from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]

        if "wrapping" in told:  # by which torch's own way to put that off does it in the end
            return self.__getattr__("disable")(function, recursive, **told)
        return _disable_dynamo(function, recursive)

    def allow_in_graph(self, function: _Function) -> _Function:
        self._marks.append(("allow_in_graph", function))
        return function

    def assume_constant_result(self, function: _Function) -> _Function:
        self._marks.append(("assume_constant_result", function))
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # by which its modules are found
            raise AttributeError(name)
        itself = cast(Any, self)
        itself.__class__ = ModuleType
        itself.__path__ = itself.__spec__.submodule_search_locations
        itself.__spec__.loader.exec_module(self)
        vars(sys.modules["torch"])["_dynamo"] = self
        for mark, function in self._marks:
            getattr(self, mark)(function)
        return getattr(self, name)


def defer_compiler() -> None:
    """Imports the rest of torch."""
    if _COMPILER in sys.modules or (spec := find_spec(_COMPILER)) is None:
        return
    module = sys.modules[_COMPILER] = module_from_spec(spec)
    cast(Any, module).__class__ = _Compiler
    vars(module)["_marks"] = []
    try:  # transformers' masks are made with this one, which needs no other
        import_module("torch._dynamo._trace_wrapped_higher_order_op")
    except ImportError:  # of another torch than we know: then as everybody else does
        del sys.modules[_COMPILER]
    else:
        del vars(module)["__path__"]


def forgo_distributed() -> None:
    """Before transformers' models are imported. It asks torch once whether it can do that."""
    import torch.distributed
    from transformers.utils.import_utils import is_torch_distributed_available

    there = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()
    finally:
        torch.distributed.is_available = there
