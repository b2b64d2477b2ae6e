"""Tokens per second of 1 to 32 sessions at once, against one local stream."""

from __future__ import annotations

import psutil

from benchmarks.figures import at_least, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, timed
from benchmarks.streams import Streams, from_threads, has_asyncio, through_asyncio

COUNTS = {"A": (1, 4, 8, 16, 32), "B": (1, 4, 16)}
WAYS: dict[str, Streams] = {"threads": from_threads, "asyncio": through_asyncio}
TARGETS = {
    ("A", "threads", 16): at_least(4),
    ("A", "asyncio", 16): at_least(6),
    ("B", "asyncio", 16): at_least(4.5),
}


MANY = 256


def measure(lab: Lab) -> None:
    for name in COUNTS:
        _streams(lab, name)
    _many(lab)


def _many(lab: Lab) -> None:
    """Hundreds of streams of one process, and how many threads that process has for them."""
    remote = lab.remote("A")
    tokens = lab.tokens // 4
    rates: list[float] = []
    threads: list[float] = []
    for run in range(lab.runs):
        sequences, seconds = through_asyncio(remote, lab.prompts("A", MANY), tokens)
        lab.check("A", sequences, PROMPT_TOKENS)
        rates.append(MANY * tokens / seconds)
        threads.append(psutil.Process().num_threads())
        lab.say(f"A, {MANY} from asyncio, tokens/s", run, rates[-1])
    lab.note(f"A, {MANY} from asyncio", "tok/s", rates)
    lab.note("A, threads of the client's process then", "", threads)


def _streams(lab: Lab, name: str) -> None:
    """One local stream and then every number of remote ones, in each run."""
    local, remote = lab.local(name), lab.remote(name)
    tokens = lab.tokens if name == "A" else lab.tokens // 2
    alone: list[float] = []
    rates: dict[tuple[str, int], list[float]] = {
        (way, count): [] for way in WAYS for count in COUNTS[name]
    }
    for run in range(lab.runs):
        expected, seconds = timed(local, lab.prompts(name, 1), tokens)
        lab.check(name, expected, PROMPT_TOKENS)
        alone.append(tokens / seconds)
        for (way, count), found in rates.items():
            if way == "asyncio" and not has_asyncio(remote):
                continue
            sequences, seconds = WAYS[way](remote, lab.prompts(name, count), tokens)
            lab.check(name, sequences, PROMPT_TOKENS)
            found.append(count * tokens / seconds)
            lab.say(f"{name}, {count} from {way}, tokens/s", run, found[-1])
    lab.note(f"{name}, one local stream", "tok/s", alone)
    for (way, count), found in rates.items():
        lab.note(f"{name}, {count} from {way}", "tok/s", found)
        target = TARGETS.get((name, way, count))
        quotient = ratios(found, alone) if found else []
        lab.note(f"{name}, {count} from {way} / one local", "x", quotient, target)
