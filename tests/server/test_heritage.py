"""A session's keys and values, from one server to another: whole, and without many turns for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.messages import Heritage, Inherit
from swarm.models.cache import SpanCache
from swarm.models.moving import kinds_of
from swarm.models.storage import KvStore
from swarm.server import heritage
from swarm.server.heritage import Estate, give
from swarm.tensors import to_frame
from swarm.wire import decode, encode
from tests.models.test_cache import llama_cache, put, store
from tests.models.test_moving import TOKENS, parts_of


class Device:
    """Runs what it is asked to at once, and counts."""

    def __init__(self) -> None:
        self.turns = 0

    async def call(self, job: Callable[[], Any]) -> Any:
        self.turns += 1
        return job()


class Line:
    """A stream whose other end is an heir."""

    def __init__(self, cache: SpanCache, memory: KvStore) -> None:
        self.cache, self.memory, self.device = cache, memory, Device()
        self.estate: Estate | None = None
        self.answer = b""

    async def send(self, frame: bytes) -> None:
        message = decode(frame)
        device: Any = self.device
        if isinstance(message, Inherit):
            self.estate = Estate(message, self.cache, self.memory, device)
            return
        assert isinstance(message, Heritage)
        assert self.estate is not None
        if await self.estate.add(message):
            self.answer = encode(Inherit(length=self.estate.length))

    async def receive(self) -> bytes:
        return self.answer


def hand_over(line: Any, there: SpanCache, positions: range) -> int:
    """The turns that the giver's device had."""
    device: Any = Device()
    asyncio.run(give(line, there, positions, there._store, device, 5.0))
    return device.turns


@pytest.mark.parametrize("most", [1, 1 << 20])
def test_all_arrives_and_what_is_little_has_one_turn_at_each_device(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn waits for the pass before it, which on a busy server is as long as a step."""
    monkeypatch.setattr(heritage, "_PART_BYTES", most)
    there, memory = llama_cache(rows=2), store()
    here = llama_cache(rows=2, memory=memory)
    line = Line(here, memory)
    put(there, TOKENS)
    whole = hand_over(line, there, range(TOKENS))
    put(there, 3)
    rest = hand_over(line, there, range(TOKENS, TOKENS + 3))
    layers = len(kinds_of(there, there._store))
    if most == 1 << 20:
        assert (whole, rest, line.device.turns) == (1, 1, 2)
    else:
        assert (whole, rest) == (layers, layers)
        assert line.device.turns >= 2 * layers
    assert here.length == TOKENS + 3
    for old, new in zip(parts_of(there, 1 << 20), parts_of(here, 1 << 20), strict=True):
        assert torch.equal(old.keys, new.keys)
        assert torch.equal(old.values, new.values)


def test_strangers_cannot_have_it_wait_for_ever_more_parts() -> None:
    memory = store()
    device: Any = Device()
    here = llama_cache(memory=memory)
    estate = Estate(Inherit(length=TOKENS), here, memory, device)
    nothing = to_frame(torch.ones(1, 2, 0, 4))

    async def flood() -> None:
        for _ in range(len(kinds_of(here, memory))):
            await estate.add(Heritage(layer=9, start=0, keys=nothing, values=nothing))

    with pytest.raises(RemoteProtocolError) as caught:
        asyncio.run(flood())
    assert caught.value.code is ErrorCode.BAD_TENSOR
