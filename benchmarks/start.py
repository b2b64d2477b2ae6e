"""How long a server needs until it is ready, beyond the time that its imports take."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.figures import at_most
from benchmarks.lab import Lab
from benchmarks.memory import IMPORTS, MODELLING
from swarm import LocalSwarm

SPAN = "8:16"


def measure(lab: Lab) -> None:
    lab.clear()
    imports: list[float] = []
    modelling: list[float] = []
    ready: list[float] = []
    with LocalSwarm(spans=[SPAN]) as swarm:
        for run in range(lab.runs):
            imports.append(_seconds(IMPORTS))
            modelling.append(_seconds(MODELLING))
            begin = time.perf_counter()
            index = swarm.add(SPAN)
            ready.append(time.perf_counter() - begin)
            swarm.stop(index)
            lab.say("server until ready, s", run, ready[-1])
    lab.note("a process that imports torch, transformers", "s", imports)
    lab.note("one that imports their modelling parts", "s", modelling)
    lab.note("demo model, server until ready", "s", ready)
    for what, base, target in (
        ("imports", imports, at_most(1.5)),
        ("modelling imports", modelling, None),
    ):
        beyond = [a - b for a, b in zip(ready, base, strict=True)]
        lab.note(f"demo model, server until ready beyond {what}", "s", beyond, target)


def _seconds(imports: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", imports], check=True)
    return time.perf_counter() - begin
