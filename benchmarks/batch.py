"""One client's batch of 32, against the same batch local."""

from __future__ import annotations

from benchmarks.figures import at_least, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, timed

ROWS = 32
TARGETS = {"A": at_least(0.8), "B": None}


def measure(lab: Lab) -> None:
    for name, target in TARGETS.items():
        local, remote = lab.local(name), lab.remote(name)
        tokens = lab.tokens if name == "A" else lab.tokens // 4
        here: list[float] = []
        there: list[float] = []
        for run in range(lab.runs):
            prompts = lab.prompts(name, ROWS)
            for model, found in ((local, here), (remote, there)):
                sequences, seconds = timed(model, prompts, tokens)
                lab.check(name, sequences, PROMPT_TOKENS)
                found.append(ROWS * tokens / seconds)
            lab.say(f"{name}, batch {ROWS}, tokens/s", run, there[-1])
        lab.note(f"{name}, batch {ROWS}, local", "tok/s", here)
        lab.note(f"{name}, batch {ROWS}, 3 servers", "tok/s", there)
        lab.note(f"{name}, batch {ROWS} / the same local", "x", ratios(there, here), target)
