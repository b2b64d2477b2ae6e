"""Caches grow in place, crop exactly or say that they cannot, and refuse what strangers make up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig

from swarm.errors import CannotRewind, ErrorCode, RemoteProtocolError
from swarm.models.cache import FIRST_SLOTS, SpanCache, plan_layers
from swarm.models.shrink import shrink
from swarm.models.spans import SpanStep
from swarm.types import BlockRange
from tests.models.splits import close, span

PLAN = plan_layers(LlamaConfig(num_hidden_layers=4))
BLOCKS = BlockRange(1, 3)


def llama_cache(rows: int = 1, max_length: int = 256) -> SpanCache:
    device = torch.device("cpu")
    return SpanCache(PLAN, BLOCKS, batch_size=rows, max_length=max_length, device=device)


@torch.inference_mode()
def put(cache: SpanCache, tokens: int) -> torch.Tensor:
    """One pass's keys into every block; returns what the first block then shows."""
    new = torch.randn(cache.batch_size, 2, tokens, 4)
    mask = cache.whole_mask(None, tokens)
    shown = [cache.update(new, -new, block)[0] for block in range(BLOCKS.start, BLOCKS.end)]
    cache.commit(tokens, mask)
    return shown[0]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 40)),
            st.tuples(st.just("crop"), st.floats(0, 1)),
            st.tuples(st.just("reorder"), st.lists(st.integers(0, 4), min_size=1, max_size=5)),
        ),
        max_size=12,
    )
)
def test_any_history_leaves_what_concatenation_would(history: list[tuple[str, object]]) -> None:
    cache, naive = llama_cache(rows=2, max_length=512), torch.empty(2, 2, 0, 4)
    for action, value in history:
        if action == "put":
            assert isinstance(value, int)
            shown = put(cache, value)
            naive = torch.cat([naive, shown[:, :, -value:]], dim=2)
            assert torch.equal(shown, naive)
        elif action == "crop":
            assert isinstance(value, float)
            cache.crop(int(cache.length * value))
            naive = naive[:, :, : cache.length]
        else:
            assert isinstance(value, list)
            rows = [row % cache.batch_size for row in value]
            cache.reorder(rows)
            naive = naive[rows]
    assert cache.length == naive.shape[2]
    assert cache.batch_size == naive.shape[0]


def test_room_is_made_in_leaps_and_never_beyond_the_reservation() -> None:
    cache = llama_cache(max_length=200)
    sizes: list[int] = []
    for _ in range(200):
        put(cache, 1)
        sizes.append(cache.nbytes)
    per_token = 2 * len(BLOCKS) * 2 * 4 * 4  # keys and values, blocks, heads, head_dim, float32
    assert sorted(set(sizes)) == [tokens * per_token for tokens in (FIRST_SLOTS, 128, 200)]


@pytest.mark.parametrize("length", [-1, 8])
def test_lengths_that_never_were_are_gaps(length: int) -> None:
    cache = llama_cache()
    put(cache, 7)
    with pytest.raises(RemoteProtocolError) as caught:
        cache.crop(length)
    assert (caught.value.code, caught.value.position) == (ErrorCode.GAP, 7)


@pytest.mark.parametrize("rows", [[], [2], [-1, 0]])
def test_rows_that_do_not_exist_are_refused(rows: list[int]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        llama_cache(rows=2).reorder(rows)
    assert caught.value.code is ErrorCode.BAD_FRAME


def test_recurrent_states_do_not_pretend_to_rewind() -> None:
    plan = plan_layers(shrink(Qwen3NextConfig()))
    cache = SpanCache(
        plan, BlockRange(0, len(plan)), batch_size=1, max_length=64, device=torch.device("cpu")
    )
    cache.commit(9, None)
    with pytest.raises(CannotRewind):
        cache.crop(4)
    assert cache.length == 9
    cache.crop(9)
    cache.crop(0)
    assert cache.length == 0


def test_sliding_windows_rewind_further_than_transformers_can() -> None:
    held = span("mistral")
    hidden = torch.randn(1, 30, held.hidden_size)
    cache, fresh = held.open_cache(held.blocks, 1, 64), held.open_cache(held.blocks, 1, 64)
    held.run([SpanStep(cache, hidden)])
    cache.crop(9)
    held.run([SpanStep(fresh, hidden[:, :9])])
    again = held.run([SpanStep(cache, hidden[:, 20:])])[0]
    assert close(again, held.run([SpanStep(fresh, hidden[:, 20:])])[0])
    theirs = DynamicCache(config=held.config)
    states = torch.randn(1, 2, 30, 12)
    theirs.update(states, states, 0)
    with pytest.raises(RuntimeError):
        theirs.crop(-21)


def test_padding_is_remembered_cropped_and_reordered() -> None:
    cache = llama_cache(rows=2)
    padding = torch.tensor([[0, 0, 1], [1, 1, 1]], dtype=torch.uint8)
    mask = cache.whole_mask(padding, 3)
    cache.commit(3, mask)
    cache.reorder([1, 0, 0])
    cache.crop(2)
    seen = cache.whole_mask(None, 1)
    assert seen is not None
    assert seen.tolist() == [[True, True, True], [False, False, True], [False, False, True]]
