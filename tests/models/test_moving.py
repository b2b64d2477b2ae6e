"""What another server sends of a session is what was there, or is refused before it is kept."""

from __future__ import annotations

import pytest
import torch

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.models.cache import SpanCache
from swarm.models.moving import Arrival, Part, kinds_of, read_layer
from tests.models.test_cache import llama_cache, put, store

TOKENS = 70


def part(layer: int = 1, start: int = 0, tokens: int = TOKENS, dim: int = 4) -> Part:
    return Part(layer, start, torch.ones(1, 2, tokens, dim), torch.ones(1, 2, tokens, dim))


def parts_of(cache: SpanCache, most: int) -> list[Part]:
    held = cache._store
    layers = kinds_of(cache, held)
    return [p for layer, kind in layers for p in read_layer(cache, held, layer, kind, most)]


@pytest.mark.parametrize("most", [1, 1000, 1 << 20])
def test_it_arrives_as_it_was_in_parts_of_any_size(most: int) -> None:
    there, memory = llama_cache(rows=2), store()
    put(there, TOKENS)
    here = llama_cache(rows=2, memory=memory)
    arrival = Arrival(here, memory, TOKENS)
    sent = parts_of(there, most)
    for number, piece in enumerate(sent):
        assert not arrival.is_complete, number
        arrival.add(piece)
    assert arrival.is_complete
    arrival.finish(None)
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
        Arrival(cache, memory, TOKENS).add(bad)
    assert refused.value.code is code
    cache.release()
    memory.check_integrity()


@pytest.mark.parametrize(
    "padding",
    [torch.ones(1, TOKENS), torch.ones(1, 3, dtype=torch.bool)],
    ids=["dtype", "shape"],
)
def test_padding_must_be_of_every_token_and_bool(padding: torch.Tensor) -> None:
    memory = store()
    arrival = Arrival(llama_cache(memory=memory), memory, TOKENS)
    for layer in (1, 2):
        arrival.add(part(layer))
    with pytest.raises(RemoteProtocolError, match="padding"):
        arrival.finish(padding)
