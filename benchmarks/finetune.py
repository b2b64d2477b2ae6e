"""Tokens per second of forward, and of forward and backward, through servers against local; what a
second server for every block adds, what travels, and what servers need."""

from __future__ import annotations

import time
from typing import Any

import psutil
from torch import Tensor

from benchmarks.figures import at_least, ratios
from benchmarks.lab import Lab, connect
from benchmarks.models import THIRDS
from swarm import LocalSwarm

LENGTH = 128
BATCHES = (1, 8)


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
                _pass(model, ids, backward)
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


def _pass(model: Any, ids: Tensor, backward: bool) -> None:
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
    if backward:
        loss.backward()
