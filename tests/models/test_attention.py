"""Attention over a ragged batch equals attention written out for each session by itself."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from swarm.models.attention import RaggedPass, Segment, ragged_attention, ragged_mask
from swarm.models.cache import SpanCache, plan_layers
from swarm.types import BlockRange

PLAN = plan_layers(LlamaConfig(num_hidden_layers=1))
DIM = 8


def written_out(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One row: `[heads, tokens, DIM]` queries at the end of `[kv_heads, length, DIM]` keys."""
    heads, tokens, length = query.shape[0], query.shape[1], keys.shape[1]
    output = torch.zeros(heads, tokens, DIM)
    for head in range(heads):
        kv_head = head // (heads // keys.shape[0])
        for token in range(tokens):
            slot = length - tokens + token
            seen = torch.arange(length) <= slot
            if window is not None:
                seen &= torch.arange(length) > slot - window
            if mask is not None:
                seen &= mask
            scores = keys[kv_head] @ query[head, token] * DIM**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() * seen
            rest = 0.0 if sinks is None else sinks[head].exp()
            if seen.any():
                output[head, token] = weights @ values[kv_head] / (weights.sum() + rest)
    return output


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("softcap", "with_sinks"), [(None, False), (3.0, False), (None, True)], ids=str
)
def test_every_session_sees_its_own_text(
    window: int | None, kv_heads: int, softcap: float | None, with_sinks: bool
) -> None:
    draw = random.Random(str((window, kv_heads, softcap, with_sinks)))
    sinks = torch.randn(4) if with_sinks else None
    segments: list[Segment] = []
    start = 0
    for past, tokens, rows in [(0, 6, 1), (9, 1, 1), (3, 1, 2), (7, 5, 2), (0, 3, 2), (11, 4, 1)]:
        cache = SpanCache(
            PLAN, BlockRange(0, 1), batch_size=rows, max_length=32, device=torch.device("cpu")
        )
        held = torch.randn(2, rows, kv_heads, past, DIM)
        cache.update(held[0], held[1], 0)
        cache.commit(past, None)
        padding = torch.tensor([[draw.random() < 0.7] * tokens for _ in range(rows)])
        padding[:, -1] = True
        mask = cache.whole_mask(padding if draw.random() < 0.5 else None, tokens)
        segments.append(Segment(cache, start, rows, tokens, mask))
        start = segments[-1].end
    query = torch.randn(1, 4, start, DIM)
    visible = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    with RaggedPass(segments, gathers=False) as work:
        new = torch.randn(2, 1, kv_heads, start, DIM)
        key, value = work.update(new[0], new[1], 0)
        mask = ragged_mask(mask_function=visible, local_size=window)
        output = ragged_attention(
            nn.Module(), query, key, value, mask, softcap=softcap, s_aux=sinks
        )[0]
    for segment in segments:
        layer, shape = segment.cache.layers[0], (segment.rows, segment.tokens)
        mine = slice(segment.start, segment.end)
        got = output[0, mine].unflatten(0, shape)
        queries = query[0, :, mine].unflatten(1, shape)
        total = segment.cache.length + segment.tokens
        for row in range(segment.rows):
            expected = written_out(
                queries[:, row],
                layer.keys[row, :, :total],
                layer.values[row, :, :total],
                None if segment.mask is None else segment.mask[row],
                window,
                softcap,
                sinks,
            ).transpose(0, 1)
            real = slice(None) if segment.mask is None else segment.mask[row, -segment.tokens :]
            assert torch.allclose(got[row][real], expected[real], atol=1e-5)


def test_masks_that_a_model_makes_itself_are_not_guessed_at() -> None:
    query = torch.randn(1, 2, 3, DIM)
    with RaggedPass([], gathers=False), pytest.raises(NotImplementedError):
        ragged_mask(mask_function=causal_mask_function, use_vmap=True)
    with pytest.raises(NotImplementedError):
        ragged_mask(mask_function=causal_mask_function)
    with pytest.raises(NotImplementedError):
        ragged_attention(nn.Module(), query, query, query, torch.ones(1, 1, 3, 3))
