"""The two ends of a model that stay here: token ids to hidden states, hidden states to logits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarm.client.remote import RemoteCache
from swarm.models.shell import StandIn, stack_of

_PROBE_TOKENS = 3
_PROBE_STARTS = (0, 5)  # learnt positions, and what follows the length, differ there
_TRIES = 3


class Ends:
    """Embeddings, final norm and head of a shell.

    The model's own forward can do all of it, one half at a time. Where plain calls of its
    embedding, final norm and head give the very same bits on random input, they are made instead:
    the forward costs about a millisecond of Python, they a tenth of it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._stack = stack_of(model)
        self._norm: Callable[[Tensor], Tensor] | None = None  # None: no short way
        self._short_embedding = False
        self._hooks = _hooks(self._model, self._stack)
        self.seconds = 0.0  # for one position through both, at best
        with torch.no_grad():
            self._find_short_ways()

    @property
    def _weight(self) -> Tensor:
        """What tells device and dtype; the model's own properties for them are slow."""
        return self._model.get_input_embeddings().weight

    @property
    def as_made(self) -> bool:
        """Nobody has hooked into the forward since, or trains: the short ways are the same."""
        same = self._hooks == _hooks(self._model, self._stack)
        return same and not self._model.training

    def embed(self, ids: Tensor, starts: Sequence[int]) -> Tensor:
        """Ids [B, T] whose rows begin at the positions `starts` to hidden states [B, T, H]."""
        ids = ids.to(self._weight.device)
        if self._short_embedding:
            return self._model.get_input_embeddings()(ids)
        rows = zip(ids.unbind(), starts, strict=True)
        return torch.cat([self._embed_row(row[None], start) for row, start in rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, H] behind the last block to logits [B, T, V]."""
        hidden = hidden.to(self._weight.device, self._weight.dtype)
        if self._norm is not None:
            return self._model.get_output_embeddings()(self._norm(hidden))
        return self._head(hidden)

    def _embed_row(self, ids: Tensor, start: int) -> Tensor:
        half = _Half(start)
        try:
            self._model(ids, past_key_values=RemoteCache(cast(Any, half)), use_cache=True)
        except _Embedded as embedded:
            return embedded.hidden
        raise AssertionError("a forward that did not come to the blocks")

    def _head(self, hidden: Tensor) -> Tensor:
        cache = RemoteCache(cast(Any, _Half(0, hidden)))
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return self._model(ids, past_key_values=cache, use_cache=True).logits

    def _find_short_ways(self) -> None:
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        size = self._weight.shape[0]
        random = torch.Generator().manual_seed(0)  # the caller's random state is left alone
        ids = torch.randint(size, (1, _PROBE_TOKENS), generator=random).to(self._weight.device)
        probes = [self._embed_row(ids, start) for start in _PROBE_STARTS]
        self._short_embedding = all(_same(embedding(ids), probe) for probe in probes)
        hidden = torch.randn(probes[0].shape, generator=random).to(probes[0])
        with _Watch(self._stack) as watch:
            logits = self._head(hidden)
        norm = _chain(watch.called)
        if head is not None and _same(head(norm(hidden)), logits):
            self._norm = norm
        for _ in range(_TRIES):
            begun = time.perf_counter()
            self.embed(self.logits(hidden[:, :1])[:, -1:].argmax(-1), [0])
            taken = time.perf_counter() - begun
            self.seconds = min(taken, self.seconds or taken)


class _Embedded(Exception):
    """Thrown through the model's forward: the rest of it is not wanted."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Half:
    """A session that stops a forward at the blocks, or that gives what is to go on with."""

    prefix = 0  # soft prompts are between the ends

    def __init__(self, position: int, output: Tensor | None = None) -> None:
        self.position = position
        self._output = output

    def step(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if self._output is None:
            raise _Embedded(hidden_states)
        return self._output


class _Watch:
    """Notes which parts of the stack are called after the blocks, in this thread."""

    def __init__(self, stack: nn.Module) -> None:
        self.called: list[nn.Module] = []
        self._stack = stack
        self._thread = threading.get_ident()
        self._hooks = ExitStack()
        self._behind = False

    def __enter__(self) -> _Watch:
        for child in self._stack.modules():
            if child is not self._stack and (
                isinstance(child, StandIn) or not list(child.children())
            ):
                self._hooks.callback(child.register_forward_hook(self._note).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _note(self, module: nn.Module, *_: object) -> None:
        if threading.get_ident() == self._thread:
            if isinstance(module, StandIn):
                self._behind = True
            elif self._behind:
                self.called.append(module)


def _chain(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        for module in modules:
            hidden = module(hidden)
        return hidden

    return run


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _hooks(*modules: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks")
    return [len(vars(module)[name]) for module in modules for name in names]
