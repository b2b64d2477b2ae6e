"""Passes that are run as recorded give what the plain forward gives, or way to it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swarm.models import packing, traced
from swarm.models.adapters import BlockAdapter
from swarm.models.pages import PAGE
from swarm.models.spans import Span, SpanCache, SpanStep
from swarm.server.compiling import try_recording
from swarm.types import BlockRange
from tests.models.splits import close, span
from tests.models.test_replay import chat
from tests.models.tiny import FAMILIES

# Falcon and Bloom have masks that sessions cannot share, and DeepSeek expands what it keeps.
PLAIN = {"falcon", "bloom", "deepseek_v3"}


@contextmanager
def counted(held: Span) -> Generator[list[int]]:
    """How many tokens each pass had that was run as recorded."""
    runs: list[int] = []
    run = held.traces.run

    def watched(*arguments: Any) -> Tensor | None:
        output = run(*arguments)
        if output is not None:
            runs.append(output.shape[1])
        return output

    held.traces.run = watched  # type: ignore[method-assign]
    yield runs
    held.traces.run = run  # type: ignore[method-assign]


def compare(held: Span, plain: Span, hidden: Tensor, adapter: Any = None, **given: Any) -> bool:
    """One session's pass on both."""
    outputs: list[Tensor] = []
    for side in (held, plain):
        cache = side.open_cache(side.blocks, hidden.shape[0], 4 * PAGE)
        cache.adapter = adapter
        outputs += side.run([SpanStep(cache, hidden, **given)])
        cache.release()
    return close(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_passes_are_exact(family: str) -> None:
    """Of several sessions, which join, leave and rewind, alone and beside prompts."""
    held = span(family, 0, 3)
    assert try_recording(held) == (family not in PLAIN)
    if held.proof.can_batch:
        with counted(held) as runs:
            chat(held, span(family, 0, 3), 5)
        assert bool(runs) == (family not in PLAIN)


@pytest.mark.parametrize("large", [1, 1 << 40], ids=["large", "small"])
def test_packed_weights_are_recorded_for_one_row_and_for_many(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_WORTHWHILE", {torch.float32: 1})
    monkeypatch.setattr(packing, "_LARGE", large)
    held, plain = span("llama", 0, 2), span("llama", 0, 2)
    assert packing.packed_weights(held._view(held.blocks).layers)
    assert try_recording(held)
    with counted(held) as runs:
        for tokens in (1, 2, 5, 1):
            assert compare(held, plain, torch.randn(1, tokens, held.hidden_size))
    assert runs == [1, 2, 5, 1]


def test_padding_positions_and_prompts_are_recorded_too() -> None:
    held, plain = span("gemma3_text", 3, 6), span("gemma3_text", 3, 6)
    assert try_recording(held)
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with counted(held) as runs:
        for given in ({}, {"padding": padding}, {"position_ids": torch.arange(7, 12).repeat(2, 1)}):
            assert compare(held, plain, torch.randn(2, 5, held.hidden_size), **given)
        assert compare(held, plain, torch.randn(1, 3 * PAGE, held.hidden_size))
    assert runs == [10, 10, 10, 3 * PAGE]


def test_adapters_are_left_to_the_plain_forward() -> None:
    held, plain = span("llama"), span("llama")
    assert try_recording(held)
    torch.manual_seed(0)
    factors = torch.randn(2, held.hidden_size), torch.randn(48, 2)
    adapter = {1: BlockAdapter({"self_attn.q_proj": factors})}
    hidden = torch.randn(1, 4, held.hidden_size)
    with counted(held) as runs:
        assert compare(held, plain, hidden, adapter)
        assert runs == []
        assert compare(held, plain, hidden)
    assert runs == [4]


def test_parts_of_a_span_are_recorded_once_they_are_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a pass; sessions of several sub-spans share it then."""
    monkeypatch.setattr(traced, "_WORTH", 3)
    held, plain = span("llama"), span("llama")
    assert try_recording(held)
    cuts = [BlockRange(0, 6), BlockRange(1, 4)]
    caches = {id(side): [side.open_cache(cut, 1, PAGE) for cut in cuts] for side in (held, plain)}
    with counted(held) as runs:
        for _ in range(5):
            hidden = [torch.randn(1, 1, held.hidden_size) for _ in cuts]
            outputs = [
                side.run([SpanStep(*step) for step in zip(caches[id(side)], hidden, strict=True)])
                for side in (held, plain)
            ]
            assert all(close(a, b) for a, b in zip(*outputs, strict=True))
    assert len(runs) == 3 * 3  # three parts, from the third pass on


def test_what_was_recorded_keeps_no_weights_of_a_span_that_is_left() -> None:
    held = span("llama", 0, 2)
    assert try_recording(held)
    constants = [
        node.t("value")
        for recording in _recordings(held)
        for node in recording._run.graph.nodes()
        if node.kind() == "prim::Constant" and "value" in node.attributeNames()
        if node.kindOf("value") == "t"
    ]
    assert sum(constant.numel() for constant in constants) < held.hidden_size
    weights = [weakref.ref(weight) for weight in held.weights()]
    del held, constants
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def _recordings(held: Span) -> list[Any]:
    """That for all passes, and that for single rows."""
    (trace,) = held.traces._made.values()
    assert trace is not None
    assert trace._row is not None
    return [trace._any, trace._row]


class Asking(nn.Module):
    """Computes something else for other tensors, as experts may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_what_asks_a_tensor_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="swarm")
    held = span("llama", 0, 1)
    block: Any = held._view(held.blocks).entry.block
    block.mlp = Asking(block.mlp)
    assert not try_recording(held)
    assert "its forward asks a tensor something (test_traced.py, line" in caplog.text
    assert not held.traces.on
    assert held.store.used == 0


def test_what_fails_later_costs_nobody_a_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the first layers have kept their keys and values."""
    held = span("llama", 0, 2)
    assert try_recording(held)
    trace: Any = held.traces._made[held._view(held.blocks)]
    passes = iter(range(1, 100))

    def fail(*given: Tensor) -> Tensor:
        output = recorded(*given)
        if next(passes) == 3:
            raise RuntimeError("an illegal instruction")
        return output

    recorded = trace._any
    monkeypatch.setattr(trace, "_any", fail)
    chat(held, span("llama", 0, 2), 4)
    assert next(passes) == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "an illegal instruction" in caplog.text
    assert not held.traces.on


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_single_row_is_exact_wherever_its_pages_lie(family: str) -> None:
    """From one page to many, before and after windows slide and others' pages come between."""
    held, plain = span(family, 3, 6), span(family, 3, 6)
    assert try_recording(held)
    sides = (held, plain)
    mine = [side.open_cache(side.blocks, 1, 8 * PAGE) for side in sides]
    others = [side.open_cache(side.blocks, 1, PAGE) for side in sides]

    def step(caches: list[SpanCache], tokens: int) -> bool:
        hidden = torch.randn(1, tokens, held.hidden_size)
        outputs = [
            side.run([SpanStep(cache, hidden)])[0]
            for side, cache in zip(sides, caches, strict=True)
        ]
        return close(*outputs)

    for length in (3, PAGE - 2, 2 * PAGE - 2, 5 * PAGE - 1):
        assert step(mine, length - mine[0].length)
        assert all(step(mine, 1) for _ in range(4))
        assert step(others, 1) if length < PAGE else True
