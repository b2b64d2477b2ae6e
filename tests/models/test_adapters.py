"""Adapters in passes that many sessions share: each gets its own, and nothing of others'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.models.adapters import Adapter, BlockAdapter
from swarm.models.spans import Span, SpanStep
from tests.inprocess import span_of
from tests.models.tiny import LAYERS, tiny_model


@pytest.fixture(scope="module")
def span() -> Span:
    return span_of(tiny_model("llama", 3), 0, LAYERS)


def adapter_of(
    span: Span, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.3
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def factor(*size: int) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    rank = 2 + seed % 3
    blocks: dict[int, BlockAdapter] = {}
    for block in range(seed % 2, LAYERS):
        sizes = span.patches.sizes(block)
        paths = ("self_attn.q_proj", "mlp.down_proj" if seed % 3 else "self_attn.v_proj")
        blocks[block] = BlockAdapter(
            {path: (factor(rank, sizes[path][0]), factor(sizes[path][1], rank)) for path in paths}
        )
    return blocks


def step(span: Span, adapter: Adapter | None, seed: int, rows: int = 1) -> SpanStep:
    cache = span.open_cache(span.blocks, rows, 64)
    cache.adapter = adapter
    generator = torch.Generator().manual_seed(seed)
    return SpanStep(cache, torch.randn(rows, 3 + seed % 3, span.hidden_size, generator=generator))


def test_eight_adapters_and_none_share_one_pass(span: Span) -> None:
    adapters = [adapter_of(span, seed) for seed in range(8)]
    adapters.insert(3, {})
    given = [*adapters, adapters[0], None]  # one of them twice
    alone = [
        span.run([step(span, adapter, index, rows=1 + index % 2)])[0]
        for index, adapter in enumerate(given)
    ]
    calls: list[int] = []
    layers: Any = getattr(span._stack, span._list_name)
    hooks = [
        layer.register_forward_hook(lambda *_, place=place: calls.append(place))
        for place, layer in enumerate(layers[:LAYERS])
    ]
    together = span.run(
        [step(span, adapter, index, rows=1 + index % 2) for index, adapter in enumerate(given)]
    )
    for hook in hooks:
        hook.remove()
    assert calls == list(range(LAYERS)), "each block once, for all of them"
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    plain = span.run([step(span, None, 0)])[0]
    assert (alone[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("evil", [False, True])
def test_steps_that_are_alike_are_multiplied_apart(span: Span, evil: bool) -> None:
    """Of one rank and length, some without any, and one adapter that is too large for itself."""
    adapters = [adapter_of(span, seed) for seed in (1, 4, 7)] + [None]
    if evil:
        adapters[0] = adapter_of(span, 1, scale=3e37)
    given = [step(span, adapter, 3 + 3 * index) for index, adapter in enumerate(adapters)]
    more = [torch.randn(1, 1, span.hidden_size) for _ in given]
    again = [SpanStep(first.cache, x) for first, x in zip(given, more, strict=True)]
    together = [span.run(given), span.run(again)]
    for index, (adapter, x) in enumerate(zip(adapters, more, strict=True)):
        alone = step(span, adapter, 3 + 3 * index)
        for shared, one in zip(together, (alone, SpanStep(alone.cache, x)), strict=True):
            expected = span.run([one])[0]
            if evil and index == 0:
                assert not bool(shared[index].isfinite().all())
            else:
                torch.testing.assert_close(shared[index], expected, atol=1e-4, rtol=1e-4)


def test_numbers_that_overflow_stay_their_owner_s(span: Span) -> None:
    """A factor may be finite and what it gives not: nothing times zero may reach others."""
    evil = adapter_of(span, 0, scale=3e37)
    alone = span.run([step(span, adapter_of(span, 1), 1)])[0]
    bad, good, plain = span.run(
        [step(span, evil, 0), step(span, adapter_of(span, 1), 1), step(span, None, 2)]
    )
    assert not bool(bad.isfinite().all())
    torch.testing.assert_close(good, alone, atol=1e-4, rtol=1e-4)
    assert bool(plain.isfinite().all())


def test_factors_are_multiplied_in_their_own_dtype_whoever_else_is_there(span: Span) -> None:
    own = adapter_of(span, 1)
    alone = span.run([step(span, own, 1)])[0]
    half = adapter_of(span, 4, torch.float16)
    _, shared = span.run([step(span, half, 0), step(span, own, 1)])
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_of_adapters_that_are_forgotten(span: Span) -> None:
    span.run([step(span, adapter_of(span, seed), seed) for seed in range(3)])
    assert span.patches.mixed_bytes > 0
    span.patches.forget()
    assert span.patches.mixed_bytes == 0


def test_what_is_kept_of_mixtures_is_bounded(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.models.adapters._MIXED_BYTES", 20_000)
    span.patches.forget()
    for seed in range(0, 12, 3):
        span.run([step(span, adapter_of(span, seed + more), more) for more in range(3)])
        assert 0 < span.patches.mixed_bytes <= 20_000
