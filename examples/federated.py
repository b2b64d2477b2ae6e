"""Four people, one set of prompts: who wrote this, learnt from texts that nobody shows to anybody.

The task is that of finetune.py, with shorter passages: Jane Austen or the Bible. Each of four
clients has a quarter of the passages, trains eight soft prompts and a head on them with
transformers' Trainer, and every few steps takes over the mean of all four. Then one client
that has all passages follows the same recipe, with as many steps of as many passages each, and both
are asked about passages that nobody has learnt from.

`python examples/federated.py` does all of it on this machine: three servers, and a process for each
client, which is what each person would run with `--peers` of a swarm and a `--client` of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import Any, cast

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from swarm import AutoDistributedModelForSequenceClassification, LocalSwarm
from swarm.client.federated import FederatedAverager, Rounds
from swarm.client.federated_training import AverageWithOthers
from swarm.models.demo import DEMO_MODEL

CLIENTS = 4
TOKENS = 8  # of each passage: too few to be sure
PASSAGES = 512  # to learn from
HELD_OUT = 256
AUSTEN = "Mr. and Mrs. John Knightley were not detained"  # so her first passage begins


def passages(count: int, skip: int = 0) -> list[dict[str, Any]]:
    """As many of each, in turns: `labels` is 1 for Jane Austen."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = (DEMO_MODEL / "held_out.txt").read_text()
    cut = text.index(AUSTEN)
    books = [tokenizer(part, verbose=False)["input_ids"] for part in (text[:cut], text[cut:])]
    found: list[dict[str, Any]] = []
    for number in range(skip, skip + count):
        begin = 3 * TOKENS * (number // 2)
        ids = torch.tensor(books[number % 2][begin : begin + TOKENS])
        found.append({"input_ids": ids, "labels": number % 2})
    return found


def learn(given: argparse.Namespace, folder: str) -> float | None:
    """Train on our share of the passages; of the first client the loss on those held out."""
    torch.manual_seed(1)  # all begin with the same prompts and head
    model: Any = AutoDistributedModelForSequenceClassification.from_pretrained(
        "swarm-demo", initial_peers=given.peers, num_labels=2, tuning_mode="ptune", pre_seq_len=8
    )
    model.config.pad_token_id = 0
    everything = passages(PASSAGES)
    ours = everything if given.alone else share(everything, given.client)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8,
        max_steps=given.steps,
        per_device_eval_batch_size=64,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=given.client,
    )
    with ExitStack() as stack:
        callbacks: list[Any] = []
        if not given.alone:
            averager = FederatedAverager(
                model,
                given.peers,
                run_id="who-wrote-this",
                listen="127.0.0.1:0",
                rounds=Rounds(size=CLIENTS, gather=60),
            )
            stack.enter_context(averager)
            callbacks = [AverageWithOthers(averager, steps=given.every)]
        held_out: Any = passages(HELD_OUT, skip=PASSAGES)
        trainer = Trainer(
            model=model,
            args=arguments,
            callbacks=callbacks,
            train_dataset=cast(Any, ours),
            eval_dataset=held_out,
        )
        trainer.train()
    for averaged in callbacks[0].rounds if callbacks else ():
        print(f"client {given.client}: {averaged}", file=sys.stderr)  # noqa: T201
    return trainer.evaluate()["eval_loss"] if given.client == 0 else None


def share(everything: list[dict[str, Any]], client: int) -> list[dict[str, Any]]:
    """A client's quarter."""
    size = len(everything) // CLIENTS
    return everything[client * size : (client + 1) * size]


def compare(given: argparse.Namespace) -> None:
    """All clients, and then one alone with all there is."""
    losses: dict[str, float] = {}
    with LocalSwarm(spans=["0:8", "8:16", "16:24"]) as swarm:
        for name, alone in (("four clients with a quarter each", False), ("one with all", True)):
            print(f"{name}: {given.steps} steps", flush=True)  # noqa: T201
            options = ["--steps", str(given.steps), "--every", str(given.every)]
            options += ["--peers", *swarm.peers, *(["--alone"] if alone else [])]
            running = [
                subprocess.Popen(
                    [sys.executable, __file__, *options, "--client", str(client)],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for client in range(1 if alone else CLIENTS)
            ]
            told = [process.communicate()[0] for process in running]
            losses[name] = json.loads(told[0].splitlines()[-1])["loss"]
            print(f"{name}: loss {losses[name]:.4f}", flush=True)  # noqa: T201
    together, alone_loss = losses.values()
    print(f"together / alone: {together / alone_loss:.3f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="*", help="of a swarm that serves swarm-demo")
    parser.add_argument("--client", type=int, default=0, help="which quarter is ours: 0 to 3")
    parser.add_argument("--alone", action="store_true", help="all passages are ours")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--every", type=int, default=4, help="steps from one mean to the next")
    given = parser.parse_args()
    if not given.peers:
        compare(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"loss": learn(given, folder)}))  # noqa: T201


if __name__ == "__main__":
    main()
