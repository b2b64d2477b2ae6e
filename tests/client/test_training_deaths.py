"""Processes that really die, or freeze and come back, do not show in what is learnt, nor in what is
written with it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from swarm import AutoDistributedModelForCausalLM
from swarm.client import training, training_hop
from swarm.client.network import SwarmNetwork
from tests.client.mortal import teacher
from tests.client.pairs import GREEDY, prompt
from tests.client.test_training import texts
from tests.client.test_training_lora import learning, lora
from tests.client.test_training_tools import losses
from tests.models.tiny import save_tiny
from tests.nursery import Program, QuickSwarm

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


class Strike(LogitsProcessor):
    """Does something before the choice of certain tokens."""

    def __init__(self, acts: Mapping[int, Callable[[], object]]) -> None:
        self.acts, self.calls = acts, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.acts.get(self.calls, int)()
        return scores


def test_a_text_goes_on_with_its_adapter_when_processes_end(folder: Path) -> None:
    """Amid it one is killed, and the next one is lent the adapter and fed the text; that one is
    stopped politely, and the third inherits the session."""
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, length = prompt(), {"max_new_tokens": 18, "min_new_tokens": 18}
    plain = local.generate(ids, **GREEDY | length)
    expected = Learner(local).model.generate(ids, **GREEDY | length)
    assert not torch.equal(plain, expected)
    with QuickSwarm(folder, spans=["0:6", "0:6", "0:6"]) as swarm:
        remote: Any = AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=swarm.peers
        )
        remote = Learner(remote).model
        with remote.inference_session(max_length=40) as session:

            def serving() -> int:
                (hop,) = session.hops
                return next(s.index for s in swarm.servers if s.peer_id == hop.peer_id)

            ends = Strike({6: lambda: swarm.kill(serving()), 12: lambda: swarm.stop(serving())})
            got = remote.generate(ids, logits_processor=[ends], **GREEDY | length)
            assert (session.recoveries, session.moves) == (1, 1)
        assert got.tolist() == expected.tolist()


def test_a_trainer_goes_on_after_it_and_all_servers_were_killed(
    folder: Path, tmp_path: Path
) -> None:
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    saved = tmp_path / "saved"
    with QuickSwarm(folder, spans=["0:6"]) as swarm:
        arguments = ["tests.client.mortal", str(folder), str(saved), *swarm.peers]
        with Program(arguments, stdout=subprocess.DEVNULL) as client:
            expected = teacher(local, tmp_path / "local")
            expected.train()
            assert client.wait(120) == -signal.SIGKILL
        assert {path.name for path in saved.iterdir()} == {"checkpoint-2", "checkpoint-4"}
        swarm.kill(0)
        swarm.add("0:6")
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=swarm.peers
        )
        again = teacher(model.adaptable(), saved)
        again.train(resume_from_checkpoint=True)
        SwarmNetwork.leave_all()
        about = json.loads((saved / "checkpoint-6" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(folder)  # so that PEFT finds it
    assert again.state.global_step == 6
    assert losses(again) == pytest.approx(losses(expected), abs=1e-3)
    theirs = learning(expected.model)
    for name, parameter in learning(again.model).items():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-4, rtol=0)
