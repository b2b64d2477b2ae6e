"""Graphs that are kept on the way forward save time on the way back, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.models.spans import Span
from swarm.models.training import Batch, Kept, SpanTraining, Units
from tests.models import splits
from tests.models.test_adapters import adapter_of

WIDE = 1 << 20


@pytest.fixture(scope="module")
def span() -> Span:
    return splits.span("llama")


@pytest.fixture
def batch(span: Span) -> Batch:
    """Four texts, padded, with an adapter and deep prompts."""
    generator = torch.Generator().manual_seed(1)
    padding = torch.ones(4, 24, dtype=torch.bool)
    padding[1, :5] = False
    return Batch(
        span.blocks,
        torch.randn(4, 24, span.hidden_size, generator=generator),
        padding=padding,
        prompts=torch.randn(len(span.blocks), 3, span.hidden_size, generator=generator),
        adapter=adapter_of(span, 4),
    )


def result(units: Units, watch: Callable[[], None] = lambda: None) -> Any:
    while True:
        try:
            next(units)
        except StopIteration as end:
            return end.value
        watch()


class Counting(SpanTraining):
    """Knows how many graphs it has made."""

    graphs = 0

    def _graph(self, part: Any, index: int, hidden: torch.Tensor) -> Any:
        self.graphs += 1
        return super()._graph(part, index, hidden)


def there_and_back(
    work: SpanTraining, batch: Batch, room: int, forth: int = WIDE, back: int = WIDE
) -> tuple[Any, Any, Kept]:
    """With slices of so many tokens."""
    kept = Kept(room)

    def within() -> None:
        assert kept.nbytes <= room

    hidden = result(work.run(batch, lambda: forth, kept), within)["hidden"]
    gradient = hidden.sin()
    found = result(work.run(replace(batch, gradient=gradient), lambda: back, kept), within)
    assert kept.nbytes == 0
    assert not kept.climbs
    return hidden, found, kept


@pytest.mark.parametrize("room", [0, 300_000, 1_500_000, 1 << 30])
@pytest.mark.parametrize("forth", [24, 48, WIDE])
def test_what_is_kept_changes_no_gradient(span: Span, batch: Batch, room: int, forth: int) -> None:
    """All graphs of a batch, those of some blocks, those of some rows, and none."""
    hidden, expected, _ = there_and_back(SpanTraining(span, 1 << 30), batch, 0)
    work = Counting(span, 1 << 30)
    got, found, _ = there_and_back(work, batch, room, forth)
    torch.testing.assert_close(got, hidden, atol=1e-5, rtol=1e-4)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm()
    slices = max(1, 4 * 24 // forth)
    if room == 1 << 30:  # none of them was made twice
        assert work.graphs == slices * len(span.blocks)


def test_wide_slices_are_not_gone_back_through_while_somebody_decodes(
    span: Span, batch: Batch
) -> None:
    """They would keep the device too long at a time; narrow ones are as good as ever."""
    blocks = len(span.blocks)
    for forth, back, graphs in ((WIDE, 1, 1 + 4), (1, WIDE, 4), (1, 1, 4)):
        work = Counting(span, 1 << 30)
        _, expected, _ = there_and_back(work, batch, 0)
        work.graphs = 0
        _, found, _ = there_and_back(work, batch, 1 << 30, forth, back)
        torch.testing.assert_close(found["gradient"], expected["gradient"], atol=1e-5, rtol=1e-4)
        assert work.graphs == graphs * blocks


def test_as_much_is_asked_for_as_is_kept(span: Span, batch: Batch) -> None:
    work = SpanTraining(span, 1 << 30)
    there_and_back(work, batch, 0)  # so that it knows how large graphs are
    kept = Kept(work.keeping(batch) - batch.nbytes)
    result(work.run(batch, lambda: WIDE, kept))
    (climb,) = kept.climbs
    assert not any(isinstance(step, torch.Tensor) for step in climb.steps)
    assert kept.nbytes > 0.7 * kept.room
