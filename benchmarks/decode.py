"""Tokens per second of 1 to 32 sessions at once, against one local stream."""

from __future__ import annotations

from typing import Any

from benchmarks.figures import Target, at_least, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, timed
from benchmarks.streams import Streams, from_threads, has_asyncio, through_asyncio

COUNTS = {"A": (1, 4, 8, 16, 32), "B": (1, 4, 16)}
TARGETS = {("A", "threads"): 4.0, ("A", "asyncio"): 6.0, ("B", "asyncio"): 4.5}
TARGET_COUNT = 16


def measure(lab: Lab) -> None:
    for name in COUNTS:
        model = lab.remote(name)
        _compare(lab, name, "threads", from_threads)
        if has_asyncio(model):
            _compare(lab, name, "asyncio", through_asyncio)
        else:
            _row(lab, name, "asyncio", TARGET_COUNT, [], [])


def _compare(lab: Lab, name: str, way: str, streams: Streams) -> None:
    """One local stream and then every count of remote ones, in each run."""
    local, remote = lab.local(name), lab.remote(name)
    tokens = lab.tokens if name == "A" else lab.tokens // 2
    alone: list[float] = []
    rates: dict[int, list[float]] = {count: [] for count in COUNTS[name]}
    for run in range(lab.runs):
        expected, seconds = timed(local, lab.prompts(name, 1), tokens)
        lab.check(name, expected, PROMPT_TOKENS)
        alone.append(tokens / seconds)
        for count, found in rates.items():
            sequences, seconds = streams(remote, lab.prompts(name, count), tokens)
            lab.check(name, sequences, PROMPT_TOKENS)
            found.append(count * tokens / seconds)
            lab.say(f"{name}, {count} from {way}, tokens/s", run, found[-1])
    lab.note(f"{name}, one local stream", "tok/s", alone)
    for count, found in rates.items():
        lab.note(f"{name}, {count} from {way}", "tok/s", found)
        _row(lab, name, way, count, found, alone)


def _row(lab: Lab, name: str, way: str, count: int, found: Any, alone: Any) -> None:
    wanted = TARGETS.get((name, way)) if count == TARGET_COUNT else None
    target: Target | None = None if wanted is None else at_least(wanted)
    lab.note(f"{name}, {count} from {way} / one local", "x", ratios(found, alone), target)
