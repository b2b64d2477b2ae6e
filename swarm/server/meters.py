"""What a server measures of its own work, whatever span it serves: a few additions per step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from swarm import tracing
from swarm.messages import Step
from swarm.metrics import SECONDS, SIZES, Histogram

KINDS = ("prefill", "decode")
PHASES = ("queue", "compute", "send")


def _by_phase() -> dict[tuple[str, str], Histogram]:
    return {(kind, phase): Histogram(SECONDS) for kind in KINDS for phase in PHASES}


@dataclass(slots=True)
class Meters:
    """One for all spans that a server serves in its life; `exposition.py` shows it."""

    tags: Mapping[str, str] = field(default_factory=dict[str, str])  # who this is, in traces
    steps: dict[tuple[str, str], Histogram] = field(default_factory=_by_phase)  # seconds
    pass_steps: Histogram = field(default_factory=lambda: Histogram(SIZES))
    pass_tokens: Histogram = field(default_factory=lambda: Histogram(SIZES))
    pass_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    refused: Counter[str] = field(default_factory=Counter[str])  # by code
    broken: int = 0  # streams
    replays: int = 0  # sessions that began with what a client had kept
    moves: int = 0  # to other blocks
    past: Counter[str] = field(default_factory=Counter[str])  # of `info`, of spans given up

    def passed(self, steps: int, tokens: int, seconds: float) -> None:
        """A pass of the device. Called by its thread."""
        self.pass_steps.observe(steps)
        self.pass_tokens.observe(tokens)
        self.pass_seconds.observe(seconds)

    def stepped(self, step: Step, begin: float, done: float, compute_ms: float) -> None:
        """A step had its turn at `begin`, its output at `done` (seconds of perf_counter), and has
        been answered now."""
        end, compute = time.perf_counter(), compute_ms / 1e3
        kind = KINDS[step.hidden.shape[1] == 1]
        phases = max(0.0, done - begin - compute), compute, end - done
        for phase, seconds in zip(PHASES, phases, strict=True):
            self.steps[kind, phase].observe(seconds)
        if step.start == 0 and not step.push:  # only who was lost is fed by the client alone
            self.replays += 1
        if step.trace:
            about = {"swarm.step": step.step, "swarm.start": step.start, "swarm.kind": kind}
            tracing.record_hop(step.trace, zip(PHASES, phases, strict=True), {**self.tags, **about})
