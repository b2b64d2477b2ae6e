"""How long a stream's worst steps take while strangers do what they must not."""

from __future__ import annotations

from statistics import median

from benchmarks.child import Child
from benchmarks.figures import NoFigure, at_most, percentile
from benchmarks.lab import Lab
from benchmarks.mixed import beside
from benchmarks.stranger import KINDS

NAME = "A"
SECONDS = 6.0
TARGET = at_most(4)  # as beside a prefill


def measure(lab: Lab) -> None:
    lab.remote(NAME)
    with Child("benchmarks.intruder", [str(lab.path(NAME)), str(SECONDS)]) as other:
        other.ask(" ".join(lab.swarm(NAME).peers))
        for kind in KINDS:
            _beside(lab, kind, other)


def _beside(lab: Lab, kind: str, other: Child) -> None:
    worst: list[float] = []
    visits: list[float] = []
    for run in range(lab.runs):
        before, during, answer = beside(lab, NAME, lambda: other.ask(kind))
        count, unanswered = map(int, answer.split())
        if unanswered:
            raise NoFigure(f"{kind}: {unanswered} of {count} visits got no answer")
        worst.append(percentile(during, 99) / median(before))
        visits.append(count / SECONDS)
        lab.say(f"{kind}, p99 of {len(during)} steps / quiet", run, worst[-1])
    lab.note(f"{NAME}, p99 beside {kind} / quiet", "x", worst, TARGET)
    lab.note(f"{NAME}, visits per second", "", visits)
