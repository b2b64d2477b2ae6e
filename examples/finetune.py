"""Who wrote this? Teaches the demo model, through a swarm, to tell Jane Austen from the Bible.

The texts are those that were kept out of the model's training. Eight soft prompts and a new head
learn, some 2,000 numbers; the 24 blocks are on three servers, which this script starts unless it is
given peers. With `--lora` PEFT's factors learn instead, within those blocks, and what is saved is
an adapter that PEFT loads into the whole model. `python examples/finetune.py --help` has the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from swarm import AutoDistributedModelForSequenceClassification, LocalSwarm
from swarm.models.demo import DEMO_MODEL

TOKENS = 24  # of each passage
AUSTEN = "Mr. and Mrs. John Knightley were not detained"  # so her first passage begins


class Passages(Dataset[dict[str, Any]]):
    """As many passages of each: `labels` is 1 for Jane Austen."""

    def __init__(self, tokenizer: Any, count: int, skip: int = 0) -> None:
        text = (DEMO_MODEL / "held_out.txt").read_text()
        cut = text.index(AUSTEN)
        self.items: list[dict[str, Any]] = []
        for label, part in enumerate((text[:cut], text[cut:])):
            ids = tokenizer(part, verbose=False)["input_ids"]
            for number in range(skip, skip + count // 2):
                begin = 3 * TOKENS * number
                passage = torch.tensor(ids[begin : begin + TOKENS])
                self.items.append({"input_ids": passage, "labels": label})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def load(peers: Sequence[str], *, lora: bool) -> Any:
    """The model with a new head, and something to learn besides."""
    options: dict[str, Any] = {} if lora else {"tuning_mode": "ptune", "pre_seq_len": 8}
    model: Any = AutoDistributedModelForSequenceClassification.from_pretrained(
        "swarm-demo", initial_peers=peers, num_labels=2, **options
    )
    if not lora:
        return model
    factors = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model.adaptable(), factors)


def finetune(peers: Sequence[str], given: argparse.Namespace) -> None:
    """Tells the accuracy on passages that it does not learn from, before and after."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model, steps, passages = load(peers, lora=given.lora), given.steps, 64
    model.config.pad_token_id = tokenizer.pad_token_id
    arguments = TrainingArguments(
        output_dir=given.folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=1e-2,
        logging_steps=max(1, steps // 10),
        save_steps=max(1, steps // 2),
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Passages(tokenizer, 8 * passages),
        eval_dataset=Passages(tokenizer, passages, skip=4 * passages),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    told = (before["eval_accuracy"], after["eval_accuracy"])
    print("accuracy before: {:.2f}, after: {:.2f}".format(*told))  # noqa: T201
    model.save_pretrained(given.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="*", help="of a swarm that serves swarm-demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lora", action="store_true", help="learn LoRA factors within the blocks")
    parser.add_argument("--folder", default="finetuned", help="for checkpoints and the result")
    given = parser.parse_args()
    local = None if given.peers else LocalSwarm(spans=["0:8", "8:16", "16:24"])
    with local or nullcontext():
        peers = given.peers or (local.peers if local else [])
        finetune(peers, given)


if __name__ == "__main__":
    main()
