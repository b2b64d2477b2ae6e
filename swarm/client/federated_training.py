"""Averaging in transformers' Trainer: a callback."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from swarm.client.federated import FederatedAverager, Round
from swarm.errors import UsageError


class AverageWithOthers(TrainerCallback):
    """Has the Trainer average every `steps` optimizer steps (None: after every epoch), at the end,
    and at the beginning: then everybody weighs as much as one sample, so that who comes late takes
    over what the others have. `samples` stand behind our parameters; None: those of the data set.

    Rounds that fail do not stop the training: all are in `rounds`. Optimizers keep their moments.
    """

    def __init__(
        self, averager: FederatedAverager, *, steps: int | None = None, samples: int | None = None
    ) -> None:
        if steps is not None and steps < 1:
            raise UsageError("steps must be 1 or more, or None for epochs")
        self.rounds: list[Round] = []
        self._averager, self._steps, self._samples = averager, steps, samples
        self._averaged_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._averaged_at = state.global_step
        self.rounds.append(self._averager.average(1))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps is not None and state.global_step % self._steps == 0:
            self._average(state, kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps is None:
            self._average(state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self._averaged_at:
            self._average(state, kwargs)

    def _average(self, state: TrainerState, kwargs: dict[str, Any]) -> None:
        samples = self._samples
        if samples is None:
            dataset = kwargs["train_dataloader"].dataset
            if not isinstance(dataset, Sized):
                raise UsageError("the data set has no length: pass samples=")
            samples = len(dataset)
        self._averaged_at = state.global_step
        self.rounds.append(self._averager.average(samples))
