"""Attention over a ragged batch equals attention written out for each session by itself."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from swarm.models.attention import RaggedPass, ragged_attention, ragged_mask
from swarm.models.cache import SpanCache, plan_layers
from swarm.models.pages import PAGE
from swarm.models.passes import SHORT, Segment
from swarm.models.storage import KvStore, LayerShape
from swarm.types import BlockRange

BLOCKS = BlockRange(0, 1)
PLAN = plan_layers(LlamaConfig(num_hidden_layers=1))
LONG = SHORT + 5
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


# Past tokens, new ones and rows: one page and several, read in place or gathered, new and old.
SHAPES = {
    "decode alone": [(9, 1, 1)],
    "decode": [(9, 1, 1), (3, 1, 2), (PAGE - 1, 1, 1), (70, 1, 2), (0, 1, 1), (PAGE, 1, 1)],
    "verify": [(130, 4, 1), (3, 4, 2), (PAGE - 2, 4, 1)],
    "everything": [
        *[(0, 6, 1), (9, 1, 1), (3, 1, 2), (7, 5, 2), (0, 3, 2), (190, 4, 1)],
        *[(0, LONG, 2), (70, LONG, 2), (11, 2 * PAGE, 1), (140, 1, 1)],
    ],
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("softcap", "with_sinks"), [(None, False), (3.0, False), (None, True)], ids=str
)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("budget", [1 << 24, 40 * 2 * 4 * DIM * PAGE * 4], ids=["one", "many"])
def test_every_session_sees_its_own_text(
    window: int | None,
    kv_heads: int,
    softcap: float | None,
    with_sinks: bool,
    shapes: list[tuple[int, int, int]],
    budget: int,
) -> None:
    """In one slab, and in many."""
    draw = random.Random(str((window, kv_heads, softcap, with_sinks)))
    torch.manual_seed(0)
    sinks = torch.randn(4) if with_sinks else None
    shape = LayerShape(kv_heads, DIM, kv_heads, DIM, window)
    store = KvStore({0: shape}, {}, torch.float32, torch.device("cpu"))
    store.budget = budget
    texts: list[Tensor] = []
    caches: list[SpanCache] = []
    segments: list[Segment] = []
    start = 0
    for past, tokens, rows in shapes:
        cache = SpanCache(PLAN, BLOCKS, batch_size=rows, max_length=512, store=store)
        texts.append(torch.randn(2, rows, kv_heads, past + tokens, DIM))
        caches.append(cache)
        for at in range(0, past, 50):  # interleaved with the others' pages
            cache.make_room(min(50, past - at))
            end = min(past, at + 50)
            cache.update(texts[-1][0, :, :, at:end], texts[-1][1, :, :, at:end], 0)
            cache.commit(end - at, None)
        padding = torch.tensor([[draw.random() < 0.7] * tokens for _ in range(rows)])
        padding[:, -1] = True
        mask = cache.whole_mask(padding if draw.random() < 0.5 else None, tokens)
        cache.make_room(tokens)
        segments.append(Segment(cache.tables, past, start, rows, tokens, mask))
        start = segments[-1].end
    query = torch.randn(1, 4, start, DIM)
    visible = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    with RaggedPass(store, segments, gathers=False) as work:
        new = [
            torch.cat(
                [
                    text[which, :, :, -segment.tokens :].transpose(0, 1).flatten(1, 2)
                    for text, segment in zip(texts, segments, strict=True)
                ],
                dim=1,
            )[None]
            for which in (0, 1)
        ]
        key, value = work.update(new[0], new[1], 0)
        mask = ragged_mask(mask_function=visible, local_size=window)
        output = ragged_attention(
            nn.Module(), query, key, value, mask, softcap=softcap, s_aux=sinks
        )[0]
    store.check_integrity()
    for text, segment in zip(texts, segments, strict=True):
        shape = (segment.rows, segment.tokens)
        mine = slice(segment.start, segment.end)
        got = output[0, mine].unflatten(0, shape)
        queries = query[0, :, mine].unflatten(1, shape)
        for row in range(segment.rows):
            expected = written_out(
                queries[:, row],
                text[0, row],
                text[1, row],
                None if segment.mask is None else segment.mask[row],
                window,
                softcap,
                sinks,
            ).transpose(0, 1)
            real = slice(None) if segment.mask is None else segment.mask[row, -segment.tokens :]
            assert torch.allclose(got[row][real], expected[real], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, LONG])
def test_numbers_gone_wrong_stay_with_their_session(tokens: int) -> None:
    """Passes are shared with strangers: their NaN must not reach anybody else."""
    store = KvStore({0: LayerShape(2, DIM, 2, DIM)}, {}, torch.float32, torch.device("cpu"))
    segments: list[Segment] = []
    for past in (3, PAGE + 3, 2):
        cache = SpanCache(PLAN, BLOCKS, batch_size=1, max_length=512, store=store)
        held = torch.randn(2, 1, 2, past, DIM) * (torch.nan if past > PAGE else 1.0)
        cache.update(held[0], held[1], 0)
        cache.commit(past, None)
        cache.make_room(tokens)
        segments.append(Segment(cache.tables, past, len(segments) * tokens, 1, tokens))
    with RaggedPass(store, segments, gathers=False) as work:
        new = torch.randn(2, 1, 2, 3 * tokens, DIM)
        key, value = work.update(new[0], new[1], 0)
        mask = ragged_mask(mask_function=causal_mask_function)
        query = torch.randn(1, 4, 3 * tokens, DIM)
        output = ragged_attention(nn.Module(), query, key, value, mask)[0][0].unflatten(0, (3, -1))
    assert output[1].isnan().all()
    assert output[::2].isfinite().all()


def test_masks_that_a_model_makes_itself_are_not_guessed_at() -> None:
    query = torch.randn(1, 2, 3, DIM)
    store = KvStore({}, {}, torch.float32, torch.device("cpu"))
    work = RaggedPass(store, [], gathers=False)
    with work, pytest.raises(NotImplementedError):
        ragged_mask(mask_function=causal_mask_function, use_vmap=True)
    with pytest.raises(NotImplementedError):
        ragged_mask(mask_function=causal_mask_function)
    with pytest.raises(NotImplementedError):
        ragged_attention(nn.Module(), query, query, query, torch.ones(1, 1, 3, 3))
