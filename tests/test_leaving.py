"""Real servers that are asked to stop: their sessions move, idle or in the middle of a text."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from swarm import AutoDistributedModelForCausalLM, LocalSwarm
from swarm.client.network import SwarmNetwork
from swarm.client.remote import InferenceSession
from swarm.models.demo import DEMO_MODEL
from tests.nursery import QuickSwarm

SPANS = ("0:12", "12:24", "12:24")
PROMPT = torch.tensor([[17, 5, 301, 44, 8, 90]])
MORE = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}


class At:
    """A streamer that acts once, after so many tokens."""

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        self._left, self._act = count, act

    def put(self, value: torch.Tensor) -> None:
        self._left -= value.numel() == 1
        if self._left == 0:
            self._left, act, self._act = -1, self._act, lambda: None
            act()

    def end(self) -> None:
        """transformers calls it."""


def last_of(swarm: LocalSwarm, session: InferenceSession) -> int:
    """The process that serves the last hop."""
    address = str(session.hops[-1].endpoint)
    return next(s.index for s in swarm.servers if s.alive and s.address == address)


def test_no_token_is_computed_twice_when_servers_leave() -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    expected = reference.generate(PROMPT, **(MORE | {"max_new_tokens": 80, "min_new_tokens": 80}))
    with QuickSwarm(spans=SPANS, dtype="float32") as swarm, ThreadPoolExecutor(1) as pool:
        try:
            model: Any = AutoDistributedModelForCausalLM.from_pretrained(
                None, initial_peers=swarm.peers
            )
            with model.inference_session(max_length=128) as session:
                stopping: list[Future[int]] = []

                def stop() -> None:
                    stopping.append(pool.submit(swarm.stop, last_of(swarm, session)))

                first = model.generate(PROMPT, session=session, streamer=At(5, stop), **MORE)
                stopping[0].result()  # it has left, at the latest when it was idle
                assert (session.moves, session.recoveries) == (1, 0)

                swarm.add("12:24")
                swarm.stop(last_of(swarm, session))
                assert (session.moves, session.recoveries) == (2, 0)
                whole = model.generate(first, session=session, **MORE)
                assert torch.equal(whole, expected)
                assert (session.moves, session.recoveries) == (2, 0)
        finally:
            SwarmNetwork.leave_all()
