"""A Trainer that averages as it goes, and begins from what others have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from swarm.client.federated import Member, Round
from swarm.client.federated_training import AverageWithOthers
from swarm.errors import UsageError
from tests.client.test_training_tools import trainer


class Learner(nn.Module):
    """Drives its weights up, by a tenth in each step of the Trainer below."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": -self.weight.sum() + 0.0 * input_ids.sum()}


class Others:
    """In place of a FederatedAverager: the mean is zero, and every other round fails."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.asked = parameter, list[int]()
        self.before: list[float] = []

    def average(self, samples: int) -> Round:
        self.asked.append(samples)
        self.before.append(float(self.parameter.detach().sum()))
        if len(self.asked) % 2:
            return Round(reason="nobody else came")
        with torch.no_grad():
            self.parameter.zero_()
        return Round((Member("Qm1", samples, True), Member("Qm2", 2 * samples, True)), share=1.0)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"steps": 2}, [1, 12, 12, 12]),
        ({"steps": 4, "samples": 5}, [1, 5, 5]),  # at 4, and at the end
        ({}, [1, 12, 12]),  # two epochs of three steps, the last of which is the end
    ],
)
def test_the_trainer_averages_and_goes_on_from_the_mean(
    tmp_path: Path, options: dict[str, Any], asked: list[int]
) -> None:
    learner = Learner()
    others: Any = Others(learner.weight)
    callback = AverageWithOthers(others, **options)
    done = trainer(
        learner,
        tmp_path,
        save_strategy="no",
        eval_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_accumulation_steps=2,
    )
    done.add_callback(callback)
    done.train()  # six steps
    assert others.asked == asked
    assert [bool(one) for one in callback.rounds] == [bool(n % 2) for n in range(len(asked))]
    every = 6 // (len(asked) - 1) if "samples" not in options else 4
    assert others.before[:2] == pytest.approx([0.0, 0.3 * every])
    assert others.before[2] == pytest.approx(0.3 * min(every, 6 - every))  # since the mean


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        raise AssertionError("nobody asks")


def test_it_must_know_how_much_stands_behind_it() -> None:
    nothing: Any = None
    callback = AverageWithOthers(nothing, steps=1)
    state: Any = SimpleNamespace(global_step=1)
    with pytest.raises(UsageError, match="samples="):
        callback.on_step_end(nothing, state, nothing, train_dataloader=DataLoader(Endless()))
    with pytest.raises(UsageError, match="steps"):
        AverageWithOthers(nothing, steps=0)
