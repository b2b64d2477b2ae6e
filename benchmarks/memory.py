"""What a server's processes hold beyond its weights and what imports take."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

import psutil

from benchmarks.figures import at_most
from benchmarks.lab import Lab, timed
from benchmarks.models import block_bytes

MIB = 2**20
SESSIONS = 4
IMPORTS = "import torch, transformers"
# transformers imports its parts when they are first used: what every server needs of it at least.
MODELLING = "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel"


def measure(lab: Lab) -> None:
    imports = [_after(IMPORTS) / MIB for _ in range(lab.runs)]
    modelling = [_after(MODELLING) / MIB for _ in range(lab.runs)]
    lab.note("a process that imports torch, transformers", "MiB", imports)
    lab.note("one that imports their modelling parts", "MiB", modelling)
    for name in ("A", "B"):
        remote = lab.remote(name)
        for _ in range(SESSIONS):
            timed(remote, lab.prompts(name, 1, 256), 8)
        held: list[float] = []
        beyond: list[float] = []  # weights
        for server in lab.swarm(name).servers:
            blocks = range(server.blocks.start, server.blocks.end)
            held.append(tree_bytes(server.pid) / MIB)
            beyond.append(held[-1] - block_bytes(lab.path(name), blocks) / MIB)
            lab.progress(f"{name}, server {server.index}: {held[-1]:.0f} MiB")
        lab.note(f"{name}, server, all its processes", "MiB", held)
        for what, base, target in (
            ("imports", median(imports), at_most(150)),
            ("modelling imports", median(modelling), None),
        ):
            rest = [each - base for each in beyond]
            lab.note(f"{name}, beyond weights and {what}", "MiB", rest, target)


def tree_bytes(pid: int) -> int:
    """Bytes that would be free if a process and all below it ended (USS)."""
    process = psutil.Process(pid)
    return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)])


def _after(imports: str) -> int:
    """As `tree_bytes`, of a process that has done nothing else."""
    with subprocess.Popen(
        [sys.executable, "-c", f"{imports}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = tree_bytes(process.pid)
        process.kill()
    return found
