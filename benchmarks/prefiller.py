"""Another client, in a process of its own: for every line it reads, it prefills a long prompt.

The first line names the peers; it is answered when the model is there. The others are answered
with the seconds that a prefill took.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.lab import Stopwatch, generate, random_ids
from swarm import AutoDistributedModelForCausalLM


def main() -> None:
    path, length, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    peers = sys.stdin.readline().split()
    model = AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=peers)
    generate(model, random_ids(model, 1, 8, generator), 1)  # dials
    print("ready", flush=True)
    for _ in sys.stdin:
        watch = Stopwatch()
        generate(model, random_ids(model, 1, length, generator), 1, watch)
        print(watch.first, flush=True)


if __name__ == "__main__":
    main()
