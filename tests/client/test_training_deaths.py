"""Processes that really die, or freeze and come back, do not show in what is learnt."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import AutoDistributedModelForCausalLM
from swarm.client import training, training_hop
from swarm.client.network import SwarmNetwork
from tests.client.test_training import texts
from tests.client.test_training_lora import learning, lora
from tests.models.tiny import save_tiny
from tests.nursery import QuickSwarm

STEPS = 18


class Learner:
    """One model with an adapter, and what its steps gave."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.requires_grad_(False)
        model.add_adapter(lora())
        self.parameters = learning(model, seed=2)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-2)
        self.losses: list[float] = []

    def step(self, before: Callable[[], object], between: Callable[[], object]) -> None:
        self.optimizer.zero_grad()
        before()
        loss = self.model(**texts(rows=4, tokens=64, seed=len(self.losses) % 2)).loss
        between()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    save_tiny("llama", tmp_path / "tiny")
    yield tmp_path / "tiny"
    SwarmNetwork.leave_all()


def test_killed_and_frozen_servers_do_not_show(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random moments. One that has all blocks is frozen going back, and thawed; then one that
    has half of them is killed going forward, so that all depends on the first one."""
    monkeypatch.setattr(training, "_PART_SECONDS", 1e-9)  # several parts on their way
    monkeypatch.setattr(training_hop, "_LOOK", 0.5)
    dice = random.Random(7)
    with QuickSwarm(folder, spans=["0:3", "3:6", "0:6"]) as swarm:
        local = Learner(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        remote = Learner(
            AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.peers)
        )
        begun = perf_counter()
        for _ in range(2):
            remote.step(int, int)
        usual = (perf_counter() - begun) / 4
        timers: list[threading.Timer] = []

        def soon(act: Callable[[int], object], index: int) -> Callable[[], None]:
            timers.append(threading.Timer(dice.uniform(0, usual), act, [index]))
            return timers[-1].start

        for step in range(2, STEPS):
            remote.step(
                soon(swarm.kill, dice.choice([0, 1])) if step == 12 else int,
                soon(swarm.freeze, 2) if step == 4 else int,
            )
            if step == 8:
                timers[0].join()
                swarm.thaw(2)
        timers[1].join()
        assert [server.alive for server in swarm.servers].count(False) == 1
        SwarmNetwork.leave_all()
    for _ in range(STEPS):
        local.step(int, int)
    assert local.losses[-1] < 0.9 * local.losses[0]
    assert remote.losses == pytest.approx(local.losses, abs=1e-3)
    for name, parameter in local.parameters.items():
        torch.testing.assert_close(remote.parameters[name], parameter, atol=2e-3, rtol=0)
