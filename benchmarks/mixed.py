"""How long a decode stream's worst steps take while another client prefills 4,096 tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.child import Child
from benchmarks.figures import at_most, percentile, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, Stopwatch, generate

LENGTH = 4096
QUIET_TOKENS = 64
MOST_TOKENS = 4000
Result = TypeVar("Result")


class _When(StoppingCriteria):
    """Ends a generate after the token at which `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._event.is_set())


def measure(lab: Lab) -> None:
    for name in ("A",) if lab.quick else ("A", "B"):
        _stream_beside_prefill(lab, name)


def _stream_beside_prefill(lab: Lab, name: str) -> None:
    swarm = lab.swarm(name)
    lab.remote(name)
    quiet: list[float] = []
    busy: list[float] = []
    took: list[float] = []
    arguments = [str(lab.path(name)), str(LENGTH), str(lab.seed)]
    with Child("benchmarks.prefiller", arguments) as other:
        other.ask(" ".join(swarm.peers))
        for run in range(lab.runs):
            before, during, seconds = beside(lab, name, lambda: float(other.ask("go")))
            quiet.append(median(before))
            busy.append(percentile(during, 99))
            took.append(seconds)
            lab.say(f"{name}, p99 of {len(during)} steps, ms", run, busy[-1])
    lab.note(f"{name}, a stream's step when it is quiet", "ms", quiet)
    lab.note(f"{name}, p99 beside a prefill of {LENGTH}", "ms", busy)
    target = at_most(4) if name == "A" else None
    lab.note(f"{name}, p99 beside that prefill / quiet", "x", ratios(busy, quiet), target)
    lab.note(f"{name}, that prefill, beside the stream", "s", took)


def beside(
    lab: Lab, name: str, work: Callable[[], Result]
) -> tuple[list[float], list[float], Result]:
    """Milliseconds per step of a stream before `work` and during it, and what `work` gives."""
    prompt, over = lab.prompts(name, 1), threading.Event()
    begun = threading.Event()
    watch = Stopwatch(QUIET_TOKENS, begun.set)
    stop = StoppingCriteriaList([_When(over)])
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(
            generate, lab.remote(name), prompt, MOST_TOKENS, watch, stopping_criteria=stop
        )
        try:
            while not begun.wait(0.1) and not stream.done():
                pass
            begin = time.perf_counter()
            result = work()
            end = time.perf_counter()
        finally:
            over.set()
        sequences = stream.result()
    lab.check(name, sequences, PROMPT_TOKENS)
    steps = list(zip(watch.times, watch.gaps, strict=False))  # when a step began, and its length
    before = [gap for at, gap in steps if at < watch.times[QUIET_TOKENS - 1]]
    # Also the step in which it begins, and the one in which it ends.
    during = [gap for at, gap in steps if at + gap / 1e3 > begin and at < end]
    return before, during, result
