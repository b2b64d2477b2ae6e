"""What another server sends of a session is what was there, or is refused before it is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.models.cache import SpanCache
from swarm.models.moving import Arrival, Part, kinds_of, read_layer
from tests.models.test_cache import llama_cache, put, store

TOKENS = 70


def part(layer: int = 1, start: int = 0, tokens: int = TOKENS, dim: int = 4) -> Part:
    return Part(layer, start, torch.ones(1, 2, tokens, dim), torch.ones(1, 2, tokens, dim))


def parts_of(cache: SpanCache, most: int, start: int = 0) -> list[Part]:
    held, positions = cache._store, range(start, cache.length)
    layers = kinds_of(cache, held)
    return [
        p for layer, kind in layers for p in read_layer(cache, held, layer, kind, positions, most)
    ]


@pytest.mark.parametrize("most", [1, 1000, 1 << 20])
def test_it_arrives_as_it_was_in_parts_of_any_size(most: int) -> None:
    there, memory = llama_cache(rows=2), store()
    put(there, TOKENS)
    here = llama_cache(rows=2, memory=memory)
    arrival = Arrival(here, memory, 0, TOKENS)
    sent = parts_of(there, most)
    for number, piece in enumerate(sent):
        assert not arrival.is_complete, number
        arrival.add(piece)
    assert arrival.is_complete
    arrival.finish()
    assert here.length == TOKENS
    for old, new in zip(parts_of(there, 1 << 20), parts_of(here, 1 << 20), strict=True):
        assert torch.equal(old.keys, new.keys)
        assert torch.equal(old.values, new.values)
    here.release()
    memory.check_integrity()
    assert memory.used == 0


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (part(layer=9), ErrorCode.BAD_TENSOR),
        (part(dim=5), ErrorCode.BAD_TENSOR),
        (part()._replace(keys=torch.ones(3)), ErrorCode.BAD_TENSOR),
        (part()._replace(keys=torch.ones(1, 2, TOKENS, 4).half()), ErrorCode.BAD_TENSOR),
        (part(start=64, tokens=6), ErrorCode.BAD_TENSOR),
        (part(tokens=TOKENS + 1), ErrorCode.GAP),
        (part(tokens=0), ErrorCode.GAP),
    ],
    ids=["layer", "shape", "rank", "dtype", "lacks what is seen", "too much", "nothing"],
)
def test_what_does_not_fit_is_refused(bad: Part, code: ErrorCode) -> None:
    memory = store()
    cache = llama_cache(memory=memory)
    with pytest.raises(RemoteProtocolError) as refused:
        Arrival(cache, memory, 0, TOKENS).add(bad)
    assert refused.value.code is code
    cache.release()
    memory.check_integrity()


@pytest.mark.parametrize(
    "padding",
    [torch.ones(1, TOKENS), torch.ones(1, 3, dtype=torch.bool)],
    ids=["dtype", "shape"],
)
def test_padding_must_be_of_every_token_and_bool(padding: torch.Tensor) -> None:
    """Before it is kept for all that is yet to come."""
    memory = store()
    with pytest.raises(RemoteProtocolError, match="padding"):
        Arrival(llama_cache(memory=memory), memory, 0, TOKENS, padding)


@given(
    rounds=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 150)), min_size=1, max_size=4),
    most=st.sampled_from([1000, 1 << 20]),
)
def test_what_came_since_is_copied_in_rounds(rounds: list[tuple[int, int]], most: int) -> None:
    """Each round the text goes back to some position and on from there; only that is copied."""
    there, memory = llama_cache(rows=2), store()
    here = llama_cache(rows=2, memory=memory)
    sound = 0
    for back, tokens in rounds:
        there.crop(min(back, there.length))
        sound = min(sound, there.length)
        put(there, tokens)
        arrival = Arrival(here, memory, sound, there.length)
        for piece in parts_of(there, most, sound):
            assert piece.start >= sound
            arrival.add(piece)
        arrival.finish()
        sound = there.length
    for old, new in zip(parts_of(there, 1 << 20), parts_of(here, 1 << 20), strict=True):
        assert torch.equal(old.keys, new.keys)
        assert torch.equal(old.values, new.values)
    here.release()
    memory.check_integrity()
    assert memory.used == 0


def test_an_arrival_that_broke_off_leaves_room_for_the_next() -> None:
    memory = store()
    cache = llama_cache(memory=memory)
    Arrival(cache, memory, 0, TOKENS).add(part(tokens=64))
    arrival = Arrival(cache, memory, 0, TOKENS)
    for layer in (1, 2):
        arrival.add(part(layer))
    arrival.finish()
    assert cache.length == TOKENS
    again = Arrival(cache, memory, 5, 9)
    again.add(part(1, 5, 4))
    assert cache.length == 5, "what was to be replaced is gone"
    cache.release()
    memory.check_integrity()
    assert memory.used == 0


def test_a_text_that_went_back_while_it_was_copied_is_not_sent() -> None:
    cache = llama_cache()
    put(cache, 10)
    ((layer, kind), *_) = kinds_of(cache, cache._store)
    with pytest.raises(LocalProtocolError, match="went back"):
        read_layer(cache, cache._store, layer, kind, range(11), 1 << 20)
