"""The first figures of a swarm: start-up, time per token, pause when a server dies (issue 2)."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.figures import NoFigure, ratios
from benchmarks.lab import (
    PROMPT_TOKENS,
    Lab,
    Stopwatch,
    check_tokens,
    connect,
    generate,
    random_ids,
)
from swarm import LocalSwarm
from swarm.models.demo import DEMO_MODEL

KILL_AT = 32  # tokens


def measure(lab: Lab) -> None:
    lab.clear()
    local: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    with LocalSwarm(spans=["0:8", "8:16", "16:24"]) as swarm:
        _until_ready(lab, swarm)
        _time_per_token(lab, local, connect(None, swarm))
        _pause_when_killed(lab, local, swarm)
    lab.clear()


def _until_ready(lab: Lab, swarm: LocalSwarm) -> None:
    """From starting a process to the line in which it says that it serves."""
    values: list[float] = []
    for run in range(lab.runs):
        begin = time.perf_counter()
        index = swarm.add("8:16")
        values.append(time.perf_counter() - begin)
        swarm.stop(index)
        lab.say("server until ready, s", run, values[-1])
    lab.note("server until ready", "s", values)


def _time_per_token(lab: Lab, local: Any, distributed: Any) -> None:
    """Swarm and local by turns on the same prompt."""
    generate(distributed, _prompt(lab, local), lab.tokens)  # dials, and warms up
    remote: list[float] = []
    alone: list[float] = []
    for run in range(lab.runs):
        prompt = _prompt(lab, local)
        for model, found in ((local, alone), (distributed, remote)):
            watch = Stopwatch()
            _check(lab, local, generate(model, prompt, lab.tokens, watch))
            found.append(median(watch.gaps))
        lab.say("token through 3 servers, ms", run, remote[-1])
    lab.note("token through 3 servers", "ms", remote)
    lab.note("token, local transformers", "ms", alone)
    lab.note("the one over the other", "x", ratios(remote, alone))


def _pause_when_killed(lab: Lab, local: Any, swarm: LocalSwarm) -> None:
    """SIGKILL for the middle server, right after a token; a spare one serves its blocks."""
    values: list[float] = []
    for run in range(lab.runs):
        swarm.add("8:16")
        distributed = connect(None, swarm)  # looks at the swarm anew
        with distributed.inference_session(max_length=PROMPT_TOKENS + lab.tokens) as session:
            watch = Stopwatch(KILL_AT, lambda: swarm.kill(_in_use(swarm, session.hops[1])))
            sequences = generate(distributed, _prompt(lab, local), lab.tokens, watch)
            if not session.recoveries:
                raise NoFigure("the killed server was not in use")
        _check(lab, local, sequences)
        values.append(max(watch.gaps[KILL_AT - 1 :]))
        lab.say("pause at a kill, ms", run, values[-1])
    lab.note(f"pause, server killed at token {KILL_AT}", "ms", values)


def _in_use(swarm: LocalSwarm, hop: Any) -> int:
    """The index of the server behind a hop of a session."""
    return next(server.index for server in swarm.servers if server.peer_id == hop.peer_id)


def _prompt(lab: Lab, local: Any) -> Any:
    return random_ids(local, 1, PROMPT_TOKENS, lab.generator)


def _check(lab: Lab, local: Any, sequences: Any) -> None:
    lab.ties += check_tokens(local, sequences, PROMPT_TOKENS)
    lab.checked += sequences[:, PROMPT_TOKENS:].numel()
