"""How long a server needs until it is ready, beyond the time that its imports take."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.figures import at_most
from benchmarks.lab import Lab
from benchmarks.memory import IMPORTS
from swarm import LocalSwarm

SPAN = "8:16"


def measure(lab: Lab) -> None:
    lab.clear()
    imports: list[float] = []
    ready: list[float] = []
    with LocalSwarm(spans=[SPAN]) as swarm:
        for run in range(lab.runs):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS], check=True)
            imports.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            index = swarm.add(SPAN)
            ready.append(time.perf_counter() - begin)
            swarm.stop(index)
            lab.say("server until ready, s", run, ready[-1])
    lab.note("a process that imports torch, transformers", "s", imports)
    lab.note("demo model, server until ready", "s", ready)
    beyond = [a - b for a, b in zip(ready, imports, strict=True)]
    lab.note("demo model, server until ready beyond imports", "s", beyond, at_most(1.5))
