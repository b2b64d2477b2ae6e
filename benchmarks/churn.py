"""Texts written while servers are killed and started: how many finish, and how many are right."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.figures import NoFigure, at_least
from benchmarks.lab import PROMPT_TOKENS, Lab, connect, generate
from swarm import LocalSwarm
from swarm.errors import SwarmError

TEXTS = 100
AT_ONCE = 4
EVERY = 3.0  # seconds between two deaths, as long as there are two servers of some blocks


def measure(lab: Lab, swarm: LocalSwarm) -> None:
    texts, tokens = (12, 32) if lab.quick else (TEXTS, lab.tokens)
    distributed = connect(None, swarm)
    prompts = [lab.prompts("demo", 1) for _ in range(texts)]
    written: list[torch.Tensor] = []

    def write(prompt: torch.Tensor) -> None:
        try:
            written.append(generate(distributed, prompt, tokens))
        except SwarmError as error:
            lab.progress(f"a text failed: {type(error).__name__}: {error}")
        else:
            lab.progress(f"{len(written)}/{texts} texts")

    disturbance, over = Churn(swarm, random.Random(lab.seed)), threading.Event()
    begin = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:
        disturbing = pool.submit(disturbance.run, over)
        try:
            list(pool.map(write, prompts))
        finally:
            over.set()
        seconds = time.perf_counter() - begin
        disturbing.result()
    right = sum(_is_right(lab, sequences) for sequences in written)
    lab.note(f"churn: of {texts} texts finished", "%", [100 * len(written) / texts], at_least(100))
    lab.note("… identical", "%", [100 * right / texts], at_least(100))
    lab.note("… servers killed meanwhile", "", [disturbance.killed])
    lab.note("… seconds from one to the next", "s", [seconds / max(1, disturbance.killed)])


class Churn:
    """Kills one of two servers with the same blocks, and starts another one, while others start."""

    def __init__(self, swarm: LocalSwarm, dice: random.Random) -> None:
        self._swarm, self._dice = swarm, dice
        self._ready = {one.index: str(one.blocks) for one in swarm.servers if one.alive}
        self.killed = 0

    def run(self, over: threading.Event) -> None:
        with ThreadPoolExecutor(len(self._ready)) as pool:
            starting: list[Future[None]] = []
            while not over.wait(EVERY):
                ready = dict(self._ready)  # others add to it
                copies = Counter(ready.values())
                spare = [index for index, span in ready.items() if copies[span] > 1]
                if spare:
                    victim = self._dice.choice(spare)
                    starting.append(pool.submit(self._start, self._ready.pop(victim)))
                    self._swarm.kill(victim)
                    self.killed += 1
            for start in starting:
                start.result()

    def _start(self, span: str) -> None:
        """Two that begin are EVERY apart, as `add` wants: it counts the servers that there are."""
        self._ready[self._swarm.add(span)] = span


def _is_right(lab: Lab, sequences: Any) -> bool:
    try:
        lab.check("demo", sequences, PROMPT_TOKENS)
    except NoFigure as error:
        lab.progress(str(error))
        return False
    return True
