"""A model larger than the memory: three servers with a third each, against disk offload.

accelerate may hold as many bytes of weights as the largest server does, and leaves the rest on the
disk. What the page cache holds of them is dropped after every token: where a model does not fit
into memory, it has to be read again, since all of it is read in turn. The other baseline may keep
them in the page cache, as if disks were as fast as memory.
"""

from __future__ import annotations

import json
import shutil
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.child import Child
from benchmarks.figures import at_least, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, Stopwatch, generate
from benchmarks.models import BLOCKS, block_bytes

NAME = "B"
TOKENS = 8


def measure(lab: Lab) -> None:
    weights = sum(file.stat().st_size for file in lab.path(NAME).glob("*.safetensors"))
    cap = block_bytes(lab.path(NAME), range(BLOCKS // 3))
    remote = lab.remote(NAME)
    # Pages of files that servers map cannot be dropped: the baseline has files of its own.
    copy = shutil.copytree(lab.path(NAME), lab.folder / "offloaded")
    prompt = lab.prompts(NAME, 1)
    there: list[float] = []
    kinds = {"disk": ["cold"], "page cache": []}  # and what else its process is told
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    resident: list[float] = []
    read: list[float] = []
    for kind, more in kinds.items():
        arguments = [str(copy), str(cap), str(TOKENS), *more]
        with Child("benchmarks.offloader", arguments) as baseline:
            baseline.read()
            for run in range(lab.runs):
                answer: dict[str, Any] = json.loads(baseline.ask(json.dumps(prompt.tolist())))
                lab.check(NAME, torch.tensor(answer["sequences"]), PROMPT_TOKENS)
                steps[kind].append(median(answer["gaps"]))
                lab.say(f"{NAME}, offload to {kind}, token in ms", run, steps[kind][-1])
                if kind == "disk":
                    watch = Stopwatch()
                    lab.check(NAME, generate(remote, prompt, lab.tokens // 2, watch), PROMPT_TOKENS)
                    there.append(median(watch.gaps))
                    resident.append(answer["resident"] / 2**20)
                    read.append(answer["read"] / TOKENS / 2**20)
    lab.note(f"{NAME}, weights", "MiB", [weights / 2**20])
    lab.note(f"{NAME}, cap for weights", "MiB", [cap / 2**20])
    lab.note(f"{NAME}, all memory of accelerate's process", "MiB", resident)
    lab.note(f"{NAME}, all memory of a server", "MiB", _residents(lab))
    lab.note(f"{NAME}, token through 3 servers", "ms", there)
    lab.note(f"{NAME}, accelerate reads from the disk per token", "MiB", read)
    for kind, values in steps.items():
        lab.note(f"{NAME}, token, accelerate from {kind}", "ms", values)
    target = at_least(10)
    lab.note(f"{NAME}, disk offload / 3 servers", "x", ratios(steps["disk"], there), target)


def _residents(lab: Lab) -> list[float]:
    """Of every server process."""
    servers = lab.swarm(NAME).servers
    return [psutil.Process(server.pid).memory_info().rss / 2**20 for server in servers]
