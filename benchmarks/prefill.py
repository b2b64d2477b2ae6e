"""Seconds until the first token of a long prompt, against local."""

from __future__ import annotations

from benchmarks.figures import at_most, ratios
from benchmarks.lab import Lab, Stopwatch, generate

LENGTH = 1024


def measure(lab: Lab) -> None:
    for name in ("A", "B"):
        local, remote = lab.local(name), lab.remote(name)
        here: list[float] = []
        there: list[float] = []
        for run in range(lab.runs):
            prompt = lab.prompts(name, 1, LENGTH)
            for model, found in ((local, here), (remote, there)):
                watch = Stopwatch()
                lab.check(name, generate(model, prompt, 1, watch), LENGTH)
                found.append(watch.first)
            lab.say(f"{name}, {LENGTH} tokens through 3 servers, s", run, there[-1])
        lab.note(f"{name}, first token after {LENGTH}, local", "s", here)
        lab.note(f"{name}, first token after {LENGTH}, 3 servers", "s", there)
        lab.note(
            f"{name}, first token after {LENGTH}, 3 servers / local",
            "x",
            ratios(there, here),
            at_most(0.8),
        )
