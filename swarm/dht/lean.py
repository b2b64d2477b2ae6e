"""Lets a process use the DHT without torch, which hivemind imports for its trainers alone.

That saves 125 MB and some seconds: for a monitor, a bootstrap node, a command that only looks.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

_MODULES = ("torch", "torch.nn", "torch.nn.functional")


class _Anything(type):
    """A class that has every attribute, and is what comes of calling it: also `@torch.jit.script`
    and `torch.finfo(torch.float16).min / 2`, which modules do while they are imported."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_: object, **__: object) -> object:
        return cls

    def __truediv__(cls, _: object) -> object:
        return cls

    __floordiv__ = __mul__ = __sub__ = __truediv__


class _Nothing(metaclass=_Anything):
    pass


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> object:
        return getattr(_Nothing, name)


@contextmanager
def without_torch() -> Generator[None]:
    """Around the first import of `swarm.dht.node`; afterwards `import torch` brings the real one.

    If torch is there already, nothing is different.
    """
    if "torch" in sys.modules:
        yield
        return
    import_module("multiprocessing.connection")  # which hivemind has by way of torch
    ours = {name: _StandIn(name) for name in _MODULES}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name, module in ours.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
