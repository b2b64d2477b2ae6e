"""Drafts are verified in one pass through the chain; rejected ones cost no further round trip."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from swarm.fakes import Fate
from swarm.messages import Output, Step
from swarm.wire import decode
from tests.client.pairs import GREEDY, Pair, prompt
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    pair = Pair("llama", seed=1)
    with pair.swarm:
        yield pair


def drafts(noise: float) -> Any:
    assistant = tiny_model("llama", seed=1)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * noise)
    return assistant


@pytest.mark.parametrize("noise", [0.0, 0.05, 10.0], ids=["right", "often right", "wrong"])
def test_one_step_for_a_draft_and_no_word_besides(llama: Pair, noise: float) -> None:
    sent: Counter[str] = Counter()
    rolled_back = 0

    async def watch(source: str, destination: str, method: str, frame: bytes) -> Fate:
        nonlocal rolled_back
        if source == "client 99":
            message = decode(frame)
            sent[message.kind] += 1
            rolled_back += isinstance(message, Step) and message.crop_to is not None
        return Fate.DELIVER

    calls: list[int] = []
    hook = llama.model.register_forward_hook(lambda *_: calls.append(1))
    llama.swarm.network.before_frame = watch
    try:
        llama.same(prompt(), assistant_model=drafts(noise), max_new_tokens=20)
    finally:
        hook.remove()
        llama.swarm.no_trap()
    assert sent.keys() == {"open", "step"}
    assert len(calls) <= sent["step"] <= len(calls) + 1  # a prompt with a draft may take two frames
    assert rolled_back > 0 if noise else len(calls) < 20


def test_rollbacks_do_not_wait_for_copies() -> None:
    """Copies of the first hop's outputs come after the last token, and serve a replay then."""
    pair = Pair("llama", seed=1, replicas=2)
    gate = asyncio.Event()
    first = pair.swarm.servers[0].peer_id

    async def hold(source: str, destination: str, method: str, frame: bytes) -> Fate:
        if (source, method) == (first, "session") and isinstance(decode(frame), Output):
            await gate.wait()
        return Fate.DELIVER

    with pair.swarm, pair.model.inference_session(max_length=64) as session:
        whole = pair.local.generate(prompt(), **GREEDY | {"max_new_tokens": 16}).tolist()
        pair.swarm.network.before_frame = hold
        got = pair.model.generate(
            prompt(), assistant_model=drafts(0.05), **GREEDY | {"max_new_tokens": 10}
        )
        assert not gate.is_set()
        pair.swarm.on_loop(gate.set)
        pair.swarm.no_trap()
        assert session.recoveries == 0
        pair.swarm.cut(pair.swarm.serving(session, pair.cuts[1][0]))
        rest = pair.model.generate(None, **GREEDY | {"max_new_tokens": 6})
        assert session.recoveries == 1
    assert got.tolist()[0] + rest.tolist()[0] == whole[0]
