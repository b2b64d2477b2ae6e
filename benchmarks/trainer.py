"""Another client, in a process of its own: for every line it reads, it trains with some batches.

The first line names the peers; it is answered when the model is there. The others say how many
batches, and are answered with the seconds that they took.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab import random_ids
from swarm import AutoDistributedModelForCausalLM


def train(model: Any, ids: Tensor, *, backward: bool = True) -> None:
    """Ids [B, T] forward, and gradients back to their embeddings."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
    if backward:
        loss.backward()


def main() -> None:
    path, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    peers = sys.stdin.readline().split()
    model = AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=peers)
    train(model, random_ids(model, rows, length, generator))  # dials
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            train(model, random_ids(model, rows, length, generator))
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
