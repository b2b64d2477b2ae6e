"""`python -m tests.client.mortal MODEL FOLDER PEER…`: a Trainer that teaches an adapter, with
checkpoints in FOLDER, until its process is killed in the middle of the sixth step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from swarm import AutoDistributedModelForCausalLM
from tests.client.test_training_lora import learning, lora
from tests.client.test_training_tools import trainer


class Plug(TrainerCallback):
    """It is pulled between the two halves of a batch."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def teacher(model: Any, folder: Path) -> Trainer:
    """Of a new adapter, always the same."""
    tuned: Any = get_peft_model(model, lora())
    learning(tuned, seed=4)
    return trainer(tuned, folder, save_steps=2, eval_strategy="no")


def main() -> None:
    source, folder, *peers = sys.argv[1:]
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=peers)
    teaching = teacher(model.adaptable(), Path(folder))
    teaching.add_callback(Plug())
    teaching.train()


if __name__ == "__main__":
    main()
