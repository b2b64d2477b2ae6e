"""Tokens per second of forward, and of forward and backward, through servers against local; what a
second server for every block adds, what travels, what servers need; who decodes beside that; and
whether servers that are killed show in what is learnt."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, median
from typing import Any

import psutil
import torch
from peft import LoraConfig

from benchmarks import stubbed
from benchmarks.child import Child
from benchmarks.churn import Churn
from benchmarks.figures import at_least, at_most, percentile, ratios
from benchmarks.lab import Lab, connect, random_ids
from benchmarks.mixed import beside
from benchmarks.models import BLOCKS, THIRDS
from benchmarks.trainer import train
from swarm import LocalSwarm
from swarm.types import BlockRange

LENGTH = 128
BATCHES = (1, 8)
BESIDE = 2  # texts of a batch beside a stream, so that it is through before the stream's memory is
SATURATED = 3.0  # seconds, at least, of such batches: enough steps of the stream for a p99


def measure(lab: Lab) -> None:
    local = lab.local("A")
    for servers, spans in ((3, THIRDS), (6, THIRDS * 2)):
        with LocalSwarm(lab.path("A"), spans=spans) as swarm:
            remote = connect(lab.path("A"), swarm)
            for rows in BATCHES:
                _compare(lab, local, remote, rows, servers)
            held = [psutil.Process(server.pid).memory_info().rss for server in swarm.servers]
            lab.note(f"A, largest of {servers} servers after that", "MB", [max(held) / 1e6])
    lab.clear()
    _replicas(lab)


def beside_trainer(lab: Lab) -> None:
    for spans in ((f"0:{BLOCKS}",), THIRDS):
        _decode_beside(lab, spans)
        lab.clear()


def _replicas(lab: Lab) -> None:
    """Where computing is a wait, so that it does not matter how many processors there are."""
    thirds = [BlockRange.parse(span) for span in THIRDS]
    for rows in (8, 32):
        found = [stubbed.tokens_per_second(thirds * n, rows, LENGTH) for n in (1, 2)]
        what = f"stubbed compute, batch {rows} x {LENGTH}, two of each server / one"
        lab.note(what, "x", [found[1] / found[0]], at_least(1.6) if rows == 8 else None)


def _decode_beside(lab: Lab, spans: tuple[str, ...]) -> None:
    swarm = lab.swarm("A", spans)
    lab.remote("A", spans)
    quiet: list[float] = []
    busy: list[float] = []
    took: list[float] = []
    arguments = [str(lab.path("A")), str(BESIDE), str(LENGTH)]
    with Child("benchmarks.trainer", arguments) as other:
        other.ask(" ".join(swarm.peers))
        alone = float(other.ask("1"))
        for run in range(lab.runs):
            before, during, seconds = beside(lab, "A", lambda: _saturate(other))
            quiet.append(median(before))
            busy.append(percentile(during, 99))
            took.append(alone / seconds)
            lab.say(f"p99 of {len(during)} steps beside a trainer, ms", run, busy[-1])
    what = f"A, {len(spans)} server{'s' * (len(spans) > 1)}"
    lab.note(f"{what}, a stream's step when it is quiet", "ms", quiet)
    lab.note(f"{what}, p99 beside a trainer", "ms", busy)
    lab.note(f"{what}, p99 beside a trainer / quiet", "x", ratios(busy, quiet), at_most(3))
    lab.note(f"{what}, the trainer's speed beside it / alone", "x", took)


def _saturate(other: Child) -> float:
    """Seconds for one of several batches."""
    took: list[float] = []
    while sum(took) < SATURATED:
        took.append(float(other.ask("1")))
    return mean(took)


def deaths(lab: Lab) -> None:
    """The bundled model's adapters, while servers are killed and started every few seconds."""
    steps = 8 if lab.quick else 50
    generator = torch.Generator().manual_seed(lab.seed)
    ids = [random_ids(lab.local("demo"), 8, 64, generator) for _ in range(2)]
    disturbance = None
    curves: list[list[float]] = []
    with LocalSwarm(spans=("0:12", "12:24") * 2, dtype="float32") as swarm:
        disturbance, over = Churn(swarm, random.Random(lab.seed)), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            disturbing = pool.submit(disturbance.run, over)
            try:
                for model in (connect(None, swarm), lab.local("demo")):
                    curves.append([])
                    for loss in _learn(model, ids, steps):
                        curves[-1].append(loss)
                        lab.progress(f"step {len(curves[-1])}/{steps}, loss {loss:.2f}")
                    over.set()
            finally:
                over.set()
            disturbing.result()
    difference = max(abs(one - other) for one, other in zip(*curves, strict=True))
    what = f"{steps} steps while servers die, largest difference of losses"
    lab.note(what, "millionths", [1e6 * difference], at_most(1000))
    lab.note("… the loss fell by", "", [curves[1][0] - curves[1][-1]])
    lab.note("… servers killed meanwhile", "", [disturbance.killed])
    lab.clear()


def _learn(model: Any, ids: list[torch.Tensor], steps: int) -> Iterator[float]:
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for index, name in enumerate(sorted(parameters)):
        values = torch.Generator().manual_seed(index)
        parameters[name].data.normal_(0, 0.02, generator=values)
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    for step in range(steps):
        batch = ids[step % len(ids)]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        yield loss.item()
    model.delete_adapter("default")


def _compare(lab: Lab, local: Any, remote: Any, rows: int, servers: int) -> None:
    what = f"A, batch {rows} x {LENGTH}"
    for backward in (False, True):
        here: list[float] = []
        there: list[float] = []
        sizes: list[float] = []
        name = "forward and backward" if backward else "forward"
        for run in range(lab.runs + 1):
            ids = lab.prompts("A", rows, LENGTH)
            for model, found in ((local, here), (remote, there)):
                before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
                begin = time.perf_counter()
                train(model, ids, backward=backward)
                seconds = time.perf_counter() - begin
                sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
                if run:  # the first one dials and learns how quick everybody is
                    found.append(rows * LENGTH / seconds)
                    sizes += [sent / (rows * LENGTH)] if model is remote else []
            lab.say(f"{what}, {name}, tokens/s", run, there[-1] if there else 0.0)
        target = at_least(0.8) if backward and rows == max(BATCHES) and servers == 3 else None
        lab.note(f"{what}, {name}, local", "tok/s", here)
        lab.note(f"{what}, {name}, {servers} servers", "tok/s", there)
        lab.note(f"{what}, {name}, {servers} servers / local", "x", ratios(there, here), target)
        lab.note(f"{what}, {name}, {servers} servers, on the wire", "B/tok", sizes)
