"""16 sessions at once of families whose attention is unlike Llama's, against one of the same."""

from __future__ import annotations

from benchmarks.figures import at_least, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab
from benchmarks.models import FAMILIES
from benchmarks.streams import from_threads, has_asyncio, through_asyncio

SESSIONS = 16


def measure(lab: Lab) -> None:
    for name in FAMILIES:
        lab.clear()
        count = lab.local(name).config.num_hidden_layers
        remote = lab.remote(name, [f"0:{count // 2}", f"{count // 2}:{count}"])
        streams = through_asyncio if has_asyncio(remote) else from_threads
        rates: dict[int, list[float]] = {1: [], SESSIONS: []}
        for run in range(lab.runs):
            for sessions, found in rates.items():
                sequences, seconds = streams(remote, lab.prompts(name, sessions), lab.tokens)
                lab.check(name, sequences, PROMPT_TOKENS)
                found.append(sessions * lab.tokens / seconds)
            lab.say(f"{name}, {SESSIONS} sessions, tokens/s", run, rates[SESSIONS][-1])
        lab.note(f"{name}, 1 session", "tok/s", rates[1])
        lab.note(f"{name}, {SESSIONS} sessions", "tok/s", rates[SESSIONS])
        quotient = ratios(rates[SESSIONS], rates[1])
        lab.note(f"{name}, {SESSIONS} sessions / 1", "x", quotient, at_least(3))
    lab.clear()
