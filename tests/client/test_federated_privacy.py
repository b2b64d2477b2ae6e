"""Private steps: what one example can change is bounded, and what is said of it is Opacus' word."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn

from swarm.client import federated_privacy
from swarm.client.federated_privacy import PrivateSteps, clipped, noise_for
from swarm.errors import UsageError
from tests.client.pairs import Pair, prompt
from tests.client.test_training_lora import learning, lora, take_back


def steps(module: nn.Module, **options: Any) -> PrivateSteps:
    settings: dict[str, Any] = {
        "examples": 40,
        "batch": 10,
        "max_norm": 0.5,
        "noise": 1.1,
        "delta": 1e-5,
        "seed": 3,
    }
    return PrivateSteps(torch.optim.SGD(module.parameters(), lr=1.0), **settings | options)


def test_epsilon_is_what_the_accountant_says() -> None:
    private = steps(nn.Linear(3, 1))
    assert private.spent().epsilon == 0.0
    module = nn.Linear(3, 1)
    private = steps(module)
    for _ in range(7):
        private.step(lambda number: module(torch.full((3,), float(number))).sum())
    spent, accountant = private.spent(), PRVAccountant()
    for _ in range(7):
        accountant.step(noise_multiplier=1.1, sample_rate=10 / 40)
    assert spent.epsilon == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-9)
    assert (spent.delta, spent.steps, spent.sample_rate) == (1e-5, 7, 0.25)
    assert f"epsilon {spent.epsilon:.2f} at delta 1e-05 after 7 steps" in str(spent)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_one_step_on_everything_is_the_gaussian_mechanism() -> None:
    """Whose exact epsilon is known (Balle and Wang, https://arxiv.org/abs/1805.06530)."""
    module = nn.Linear(3, 1)
    private = steps(module, batch=40, noise=2.0)
    private.step(lambda number: module(torch.ones(3)).sum())
    epsilon = private.spent().epsilon

    def phi(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    delta = phi(0.25 - 2 * epsilon) - math.exp(epsilon) * phi(-0.25 - 2 * epsilon)
    assert delta <= 1e-5
    assert delta == pytest.approx(1e-5, rel=0.2)


def test_a_step_is_the_sum_of_clipped_gradients_and_noise() -> None:
    """Each example is drawn or not; its gradient is no longer than max_norm, whatever it says."""
    module = nn.Linear(4, 1, bias=False)
    examples = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) * 100
    examples[5] = float("nan")
    drawn: list[int] = []

    def loss_of(number: int) -> torch.Tensor:
        drawn.append(number)
        return module(examples[number]).sum()

    before = module.weight.detach().clone()
    quiet = steps(module, noise=1e-9)
    quiet.step(loss_of)
    assert 0 < len(drawn) < 40
    wanted = [examples[n] / examples[n].norm() * 0.5 for n in drawn if n != 5]
    expected = before - torch.stack(wanted).sum(0) / 10
    torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-4, atol=1e-5)

    wide = nn.Linear(10_000, 1, bias=False)
    before = wide.weight.detach().clone()
    noisy = steps(wide, noise=2.0)
    assert math.isnan(steps(wide, batch=1e-6).step(lambda number: wide(torch.zeros(10_000)).sum()))
    with torch.no_grad():
        wide.weight.copy_(before)
    noisy.step(lambda number: wide(torch.zeros(10_000)).sum())
    moved = wide.weight.detach() - before
    assert float(moved.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.05)
    assert float(moved.mean().abs()) < 0.005


def test_clipping_is_of_all_tensors_together() -> None:
    one, other = clipped([torch.full((9,), 1.0), None, torch.full((16,), 1.0)], 1.0)[::2]
    assert one is not None
    assert other is not None
    assert float((one.norm() ** 2 + other.norm() ** 2).sqrt()) == pytest.approx(1.0, rel=1e-4)
    small = clipped([torch.full((4,), 0.01)], 1.0)[0]
    assert small is not None
    assert small.tolist() == pytest.approx([0.01] * 4)


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_noise_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated_privacy, "ACCOUNTANT", "rdp")  # quicker
    noise = noise_for(3.0, 1e-5, sample_rate=0.05, steps=50)
    accountant = RDPAccountant()
    for _ in range(50):
        accountant.step(noise_multiplier=noise, sample_rate=0.05)
    assert 2.9 < accountant.get_epsilon(delta=1e-5) <= 3.0


@pytest.mark.parametrize("bad", [{"batch": 41}, {"noise": 0.0}, {"max_norm": -1.0}, {"delta": 1}])
def test_settings_that_hide_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="private steps"):
        steps(nn.Linear(2, 2), **bad)


def test_without_opacus_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("opacus"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"swarm-blocks\[privacy\]"):
        steps(nn.Linear(2, 2))


def test_steps_through_remote_blocks_are_those_of_one_machine() -> None:
    """One request per example: the same draws and noise give the same adapter."""
    pair = Pair("llama", seed=34)
    ids = prompt(6, 9)
    learnt: list[torch.Tensor] = []
    with pair.swarm:
        for model in (pair.local, pair.model):
            model.requires_grad_(False)
            model.add_adapter(lora(r=2, target_modules=["v_proj"]))
            found = learning(model, seed=5)
            optimizer = torch.optim.SGD([found[name] for name in sorted(found)], lr=0.1)
            private = PrivateSteps(
                optimizer, examples=6, batch=3, max_norm=0.1, noise=1.0, delta=1e-3, seed=2
            )

            def loss_of(number: int, model: Any = model) -> torch.Tensor:
                return model(input_ids=ids[number, None], labels=ids[number, None]).loss

            for _ in range(2):
                private.step(loss_of)
            learnt.append(torch.cat([found[name].detach().flatten() for name in sorted(found)]))
        take_back(pair)
    torch.testing.assert_close(learnt[1], learnt[0], rtol=1e-4, atol=1e-5)
