"""Caches grow in place, crop exactly or say that they cannot, and refuse what strangers make up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig

from swarm.errors import CannotRewind, ErrorCode, OutOfPages, RemoteProtocolError
from swarm.models.cache import SpanCache, plan_layers
from swarm.models.pages import PAGE, SLACK
from swarm.models.shrink import shrink
from swarm.models.spans import SpanStep
from swarm.models.storage import KvStore, LayerShape
from swarm.types import BlockRange
from tests.models.splits import close, span

PLAN = plan_layers(LlamaConfig(num_hidden_layers=4))
BLOCKS = BlockRange(1, 3)


PAGE_BYTES = 2 * len(BLOCKS) * 2 * 4 * 4 * PAGE  # keys and values, blocks, heads, dim, float32


def store(pages: int = 1 << 12) -> KvStore:
    layers = {block: LayerShape(2, 4, 2, 4) for block in range(4)}
    held = KvStore(layers, {}, torch.float32, torch.device("cpu"))
    held.budget = pages * PAGE_BYTES
    return held


def llama_cache(
    rows: int = 1, max_length: int = 1 << 12, memory: KvStore | None = None
) -> SpanCache:
    return SpanCache(PLAN, BLOCKS, batch_size=rows, max_length=max_length, store=memory or store())


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
            st.tuples(st.just("put"), st.integers(1, 2 * PAGE)),
            st.tuples(st.just("crop"), st.floats(0, 1)),
            st.tuples(st.just("reorder"), st.lists(st.integers(0, 4), min_size=1, max_size=5)),
        ),
        max_size=12,
    )
)
def test_any_history_leaves_what_concatenation_would(history: list[tuple[str, object]]) -> None:
    cache, naive = llama_cache(rows=2), torch.empty(2, 2, 0, 4)
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


def test_a_budget_is_hard_and_what_does_not_fit_changes_nothing() -> None:
    memory = store(pages=9)
    one, two = (llama_cache(memory=memory) for _ in range(2))
    shown = put(one, 5 * PAGE - 1)
    put(two, 4 * PAGE)
    assert memory.used == memory.taken == memory.budget
    with pytest.raises(OutOfPages, match="in use"):
        two.make_room(1)
    one.make_room(1)
    memory.check_integrity()
    two.release()
    assert memory.used == 5 * PAGE_BYTES
    more = put(one, 4 * PAGE)
    assert torch.equal(more[:, :, : shown.shape[2]], shown)
    one.crop(1)
    assert memory.used == PAGE_BYTES
    one.release()
    assert memory.used == 0
    memory.check_integrity()


def test_a_pass_that_found_no_page_leaves_none_behind() -> None:
    memory = store(pages=4)
    cache = llama_cache(rows=2, memory=memory)
    put(cache, PAGE)
    with pytest.raises(OutOfPages):
        cache.make_room(2 * PAGE)
    assert memory.used == 2 * PAGE_BYTES
    put(cache, PAGE)


def test_room_that_one_kind_of_session_left_serves_another() -> None:
    """Sub-spans have pages of their own; nobody's, when nobody uses them."""
    memory = store(pages=8)
    first = llama_cache(memory=memory)
    put(first, 8 * PAGE)
    other = SpanCache(PLAN, BlockRange(0, 4), batch_size=1, max_length=1 << 12, store=memory)
    with pytest.raises(OutOfPages):
        other.make_room(1)
    first.release()
    other.make_room(4 * PAGE)
    assert memory.used == memory.taken == memory.budget
    memory.check_integrity()


def test_few_tokens_in_many_sub_spans_take_no_more_than_twice_what_they_may_need() -> None:
    """Memory that is taken for one kind of session serves no other, as long as anybody is there."""
    memory = store()
    spans = [BlockRange(start, end) for end in range(1, 5) for start in range(end)]
    spans.remove(BlockRange(0, 4))
    for blocks in spans:
        SpanCache(PLAN, blocks, batch_size=1, max_length=2, store=memory).make_room(1)
    assert memory.taken <= 2 * sum(memory.session_bytes(blocks, 1, 2) for blocks in spans)
    whole = SpanCache(PLAN, BlockRange(0, 4), batch_size=1, max_length=1 << 17, store=memory)
    whole.make_room(PAGE * ((memory.budget - memory.taken) // (2 * PAGE_BYTES)))
    memory.check_integrity()


def test_what_a_former_owner_left_is_wiped() -> None:
    memory = store(pages=1)
    first = llama_cache(memory=memory)
    nan = torch.full((1, 2, PAGE, 4), torch.nan)
    with torch.inference_mode():
        for block in range(BLOCKS.start, BLOCKS.end):
            first.update(nan, nan, block)
    first.release()
    put(llama_cache(memory=memory), 1)
    for kind in memory.kinds(BLOCKS):
        for slab in memory.slabs(kind):
            assert all(part.isfinite().all() for pair in slab.layers.values() for part in pair)


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
    memory = KvStore({}, {}, torch.float32, torch.device("cpu"))
    cache = SpanCache(plan, BlockRange(0, len(plan)), batch_size=1, max_length=64, store=memory)
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
    long = held.open_cache(held.blocks, 1, 1024)
    text = torch.randn(1, 2 * SLACK + 2 * PAGE, held.hidden_size)
    held.run([SpanStep(long, text)])
    with pytest.raises(CannotRewind, match="replay"):
        long.crop(9)
    long.crop(text.shape[1] - SLACK)
    with pytest.raises(CannotRewind):
        long.crop(PAGE)
    long.crop(0)
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
