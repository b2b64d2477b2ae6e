"""Hours of mixed load in minutes: does anything grow that should not?

    .venv/bin/python -m benchmarks.soak --minutes 10 --json soak.json

Rounds of load on real processes: texts of all kinds, sessions cut short, strangers who do what they
must not, servers killed and frozen. After each round all is quiet for a moment, and what every
process then holds is noted. docs/benchmarks.md explains the table. Ends with 1 if something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

# Servers inherit it; must be set before torch is imported, like what our commands tell oneDNN.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

import psutil
import torch

from benchmarks.figures import NoFigure
from benchmarks.lab import Lab, check_tokens, connect, generate, random_ids
from benchmarks.models import THIRDS
from benchmarks.stranger import KINDS, visit
from swarm import LocalSwarm
from swarm.client.network import SwarmNetwork
from swarm.dht.records import SignedRecord
from swarm.errors import SwarmError
from swarm.loop import BackgroundLoop

MIB = 2**20
CACHE = ("--kv-memory", "64MiB")  # so small that it is often full
CLIENTS = 6  # threads; each does one thing after the other
PROMPTS = {4: 24, 8: 200, 24: 16}  # new tokens: prompt's length
DRAIN_SECONDS = 30.0  # in which every session must be gone once nobody wants anything
SETTLE_SECONDS = 1.0

# malloc gives back at once what is freed, so that what a process keeps is what it uses: with its
# usual settings it kept up to 60 MiB more or less from one moment to the next.
FRUGAL = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

# What counts as growth over the second half, in which there are hundreds of calls and of visits by
# strangers: if each left a task, a descriptor or 16 KiB behind, it would be many times as much.
# Tasks and descriptors come and go with links, which outlive their use by a minute; the cache takes
# memory by the slab.
BOUNDS = {
    "USS MiB": 8.0,
    "descriptors": 12.0,
    "threads": 3.0,
    "tasks": 30.0,
    "sessions": 0.0,
    "cache, MiB": 32.0,
    "cache in use, MiB": 0.0,
}


@dataclass(frozen=True, slots=True)
class Trend:
    """One measure of one process at the quiet moments, oldest first."""

    process: str
    measure: str
    values: tuple[float, ...]

    @property
    def growth(self) -> float:
        """Over the second half: the median of all slopes (Theil and Sen), times its length."""
        half = self.values[len(self.values) // 2 :]
        pairs = itertools.combinations(enumerate(half), 2)
        return median((b - a) / (j - i) for (i, a), (j, b) in pairs) * (len(half) - 1)

    @property
    def grew(self) -> bool:
        bound = BOUNDS[self.measure]
        return self.growth > bound or (bound == 0 and self.values[-1] > 0)

    def __str__(self) -> str:
        count = len(self.values)
        shown = [self.values[at] for at in (0, count // 2, count - 1)]
        cells = [f"{value:,.1f}" for value in (*shown, max(self.values), self.growth)]
        verdict = "GREW" if self.grew else ""
        bound = f"{BOUNDS[self.measure]:g}"
        return f"| {' | '.join([self.process, self.measure, *cells, bound, verdict])} |"


class Load:
    """What clients want, from several threads at once; every greedy token is checked."""

    def __init__(self, lab: Lab, model: Any) -> None:
        self._local, self._model = lab.local("A"), model
        self._texts = {
            tokens: [self._write(lab, length, tokens) for _ in range(4)]
            for tokens, length in PROMPTS.items()
        }
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.ties = 0
        self.kinds: Sequence[Callable[[random.Random], None]] = (
            *[self.short_text, self.long_text, self.middle_text, self.batch, self.beams],
            *[self.rolled_back, self.left_early, self.forgotten],
        )

    def _write(self, lab: Lab, length: int, tokens: int) -> torch.Tensor:
        return generate(self._local, random_ids(self._local, 1, length, lab.generator), tokens)

    def work(self, seed: int, until: float) -> None:
        dice = random.Random(seed)
        while time.monotonic() < until:
            kind = dice.choice(self.kinds)
            try:
                kind(dice)
            except NoFigure as error:
                raise NoFigure(f"{kind.__name__}: {error}") from error
            except SwarmError as error:  # counted, and shown: nobody should see one
                self.failed[f"{kind.__name__}: {type(error).__name__}: {error}"[:200]] += 1
            self.done[kind.__name__] += 1

    def short_text(self, dice: random.Random) -> None:
        self._same(dice, 4)

    def middle_text(self, dice: random.Random) -> None:
        self._same(dice, 24)

    def long_text(self, dice: random.Random) -> None:
        self._same(dice, 8)

    def batch(self, dice: random.Random) -> None:
        whole = torch.cat(self._texts[4][: dice.randint(2, 4)])
        self._check(generate(self._model, whole[:, : PROMPTS[4]], 4), whole, 4)

    def beams(self, dice: random.Random) -> None:
        prompt = dice.choice(self._texts[24])[:, : PROMPTS[24]]
        generate(self._model, prompt, 8, num_beams=3)

    def rolled_back(self, dice: random.Random) -> None:
        whole = dice.choice(self._texts[24])
        with self._model.inference_session(max_length=dice.choice([8, 64])) as session:
            for _ in range(3):
                keep = dice.randint(1, PROMPTS[24])
                session.position = min(session.position, keep)
                got = self._model.generate(
                    whole[:, : PROMPTS[24]], session=session, max_new_tokens=6, do_sample=False
                )
                self._check(got, whole[:, : PROMPTS[24] + 6], 6)

    def left_early(self, dice: random.Random) -> None:
        prompt = dice.choice(self._texts[24])[:, : PROMPTS[24]]

        async def read() -> None:
            stream = self._model.stream(prompt, max_new_tokens=200, do_sample=False)
            for _ in range(dice.randint(1, 12)):
                await anext(stream)
            stream.cancel()

        asyncio.run(read())

    def forgotten(self, dice: random.Random) -> None:
        """A session that nobody closes."""
        blocks = self._model.remote_blocks
        start = dice.randrange(len(blocks))
        part = blocks[start : dice.randint(start + 1, len(blocks))]
        hidden = torch.randn(1, dice.randint(1, 9), self._local.config.hidden_size)
        part.inference_session(max_length=32).step(hidden)

    def _same(self, dice: random.Random, tokens: int) -> None:
        whole = dice.choice(self._texts[tokens])
        self._check(generate(self._model, whole[:, : PROMPTS[tokens]], tokens), whole, tokens)

    def _check(self, got: torch.Tensor, whole: torch.Tensor, tokens: int) -> None:
        if not torch.equal(got, whole):
            self.ties += check_tokens(self._local, got, got.shape[1] - tokens)


class Watch:
    """Notes what the processes of the swarm, and we, hold when all is quiet."""

    def __init__(self, swarm: LocalSwarm, network: SwarmNetwork, view: Any) -> None:
        self._swarm, self._network, self._view = swarm, network, view
        self._known: dict[str, SignedRecord] = {}
        self.values: dict[tuple[str, str], list[float]] = {}

    def records(self) -> dict[str, SignedRecord]:
        """Of servers that live, by peer id; the DHT forgets those that were frozen for a while."""
        self._known |= {server.record.peer_id: server for server in self._view().servers}
        alive = {server.peer_id for server in self._swarm.servers if server.alive}
        return {peer_id: self._known[peer_id] for peer_id in alive & self._known.keys()}

    def wait_until_quiet(self) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._sessions() and time.monotonic() < deadline:
            time.sleep(0.2)  # servers do not say when a session has ended
        time.sleep(SETTLE_SECONDS)

    def _sessions(self) -> int:
        return sum(
            self._network.ask(record).counters["open_sessions"]
            for record in self.records().values()
        )

    def note(self) -> None:
        """Of the three servers that live all the time, of the DHT's first node, and of us."""
        records = self.records()
        for server in self._swarm.servers[: len(THIRDS)]:
            name = f"server {server.blocks}"
            counters = self._network.ask(records[server.peer_id]).counters
            self._note_process(name, psutil.Process(server.pid))
            self._note(name, "tasks", counters["tasks"])
            self._note(name, "sessions", counters["open_sessions"])
            self._note(name, "cache in use, MiB", counters["kv_used_bytes"] / MIB)
            self._note(name, "cache, MiB", counters["kv_bytes"] / MIB)
        for child in psutil.Process().children():
            if "dht" in child.cmdline():
                self._note_process("bootstrap", child)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # as FRUGAL, for us
        self._note_process("client", psutil.Process(), alone=True)
        self._note("client", "tasks", BackgroundLoop.shared().call(_count_tasks()))

    def _note_process(self, name: str, process: psutil.Process, *, alone: bool = False) -> None:
        tree = [process, *([] if alone else process.children(recursive=True))]
        self._note(name, "USS MiB", sum(one.memory_full_info().uss for one in tree) / MIB)
        self._note(name, "descriptors", sum(one.num_fds() for one in tree))
        self._note(name, "threads", sum(one.num_threads() for one in tree))

    def _note(self, process: str, measure: str, value: float) -> None:
        self.values.setdefault((process, measure), []).append(value)

    def trends(self) -> list[Trend]:
        return [Trend(*names, tuple(values)) for names, values in self.values.items()]


async def _count_tasks() -> int:
    return len(asyncio.all_tasks())


class Soak:
    """Rounds of load, until the time is over."""

    def __init__(self, lab: Lab, swarm: LocalSwarm, seconds: float) -> None:
        model = connect(lab.path("A"), swarm)
        self._connection = connection = model.remote_blocks.connection
        self._network = SwarmNetwork.connect(swarm.peers, None)
        self._lab, self._swarm = lab, swarm
        self._seconds = seconds
        self._dice = random.Random(lab.seed)
        self.load = Load(lab, model)
        self.watch = Watch(swarm, self._network, lambda: connection.router.view)
        self.visits: Counter[str] = Counter()
        self.disasters: Counter[str] = Counter()
        self.rounds = 0

    def run(self, minutes: float) -> None:
        end = time.monotonic() + 60 * minutes
        with ThreadPoolExecutor(CLIENTS + 2) as pool:
            while time.monotonic() < end or self.rounds < 4:
                until = time.monotonic() + self._seconds
                seeds = [self._dice.randrange(1 << 30) for _ in range(CLIENTS)]
                running = [pool.submit(self.load.work, seed, until) for seed in seeds]
                running.append(pool.submit(self._strange, until))
                running.append(pool.submit(self._break_something))
                for future in running:
                    future.result()
                self.watch.wait_until_quiet()
                self.watch.note()
                self.rounds += 1
                self._progress(end)

    def _strange(self, until: float) -> None:
        while time.monotonic() < until:
            records = list(self.watch.records().values())
            kind = self._dice.choice(KINDS)
            answered = self._network.loop.call(
                visit(kind, self._dice.choice(records), self._connection.terms)
            )
            self.visits[kind if answered else f"{kind}: NO ANSWER"] += 1

    def _break_something(self) -> None:
        """The last spare dies and another one starts, or a server stops answering for a while."""
        if self.rounds % 2:
            index = self._dice.randrange(len(THIRDS))
            self._swarm.freeze(index)
            time.sleep(4.0)  # longer than clients wait for a sign of life
            self._swarm.thaw(index)
            self.disasters["frozen"] += 1
            return
        spares = [server for server in self._swarm.servers[len(THIRDS) :] if server.alive]
        victim = self._dice.choice(spares)
        time.sleep(self._seconds / 4)
        self._swarm.kill(victim.index)
        self._swarm.add(str(victim.blocks))
        self.disasters["killed"] += 1

    def _progress(self, end: float) -> None:
        said = ", ".join(
            f"{process} {values[-1]:.0f}"
            for (process, measure), values in self.watch.values.items()
            if measure == "USS MiB"
        )
        left = max(0.0, end - time.monotonic())
        self._lab.progress(f"round {self.rounds}, {left:.0f} s to go; MiB: {said}")


def main() -> None:
    arguments = _parse()
    minutes, seconds = (1.0, 6.0) if arguments.quick else (arguments.minutes, 20.0)
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder:
        lab = Lab(Path(folder), seed=arguments.seed, suite="soak")
        with (
            lab,
            LocalSwarm(lab.path("A"), spans=THIRDS * 2, server_args=CACHE, env=FRUGAL) as swarm,
        ):
            soak = Soak(lab, swarm, seconds)
            soak.run(minutes)
            trends, load = soak.watch.trends(), soak.load
            SwarmNetwork.leave_all()
    print(f"\n{soak.rounds} rounds in {minutes:g} minutes; {sum(load.done.values())} calls:")
    for counts in (load.done, soak.visits, soak.disasters):
        print("  " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    print(f"  {sum(load.failed.values())} calls failed, {load.ties} ties")
    for reason, count in load.failed.items():
        print(f"    {count} x {reason}")
    print("\n| process | at quiet moments | first | middle | last | most | growth | bound | |")
    print("|---|---|--:|--:|--:|--:|--:|--:|---|")
    for trend in trends:
        print(trend)
    if arguments.json:
        about = {"rounds": soak.rounds, "minutes": minutes, "calls": load.done}
        about |= {"visits": soak.visits, "disasters": soak.disasters, "failed": load.failed}
        rows = [asdict(trend) | {"growth": trend.growth, "grew": trend.grew} for trend in trends]
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    unanswered = [kind for kind in soak.visits if "NO ANSWER" in kind]
    grew = [trend for trend in trends if trend.grew and not arguments.quick]  # too few moments
    if grew or load.failed or unanswered:
        raise SystemExit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="(default: 10)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one minute: does it work at all?",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except NoFigure as error:
        sys.exit(str(error))
