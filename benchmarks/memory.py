"""What a server's processes hold beyond its weights, its cache and what imports take."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

import psutil

from benchmarks.figures import at_most
from benchmarks.lab import Lab, timed
from benchmarks.models import block_bytes
from swarm.client.network import SwarmNetwork

MIB = 2**20
SESSIONS = 4
IMPORTS = "import torch, transformers"


def measure(lab: Lab) -> None:
    imports = [_imports() / MIB for _ in range(lab.runs)]
    lab.note("a process that imports torch, transformers", "MiB", imports)
    for name in ("A", "B"):
        remote = lab.remote(name)
        for _ in range(SESSIONS):
            timed(remote, lab.prompts(name, 1, 256), 8)
        held: list[float] = []
        beyond: list[float] = []
        caches = _cache_bytes(lab, name)
        for server in lab.swarm(name).servers:
            blocks = range(server.blocks.start, server.blocks.end)
            known = block_bytes(lab.path(name), blocks) + caches[server.peer_id]
            held.append(_tree(server.pid) / MIB)
            beyond.append(held[-1] - known / MIB - median(imports))
            lab.progress(f"{name}, server {server.index}: {held[-1]:.0f} MiB")
        lab.note(f"{name}, server, all its processes", "MiB", held)
        lab.note(f"{name}, beyond weights and imports", "MiB", beyond, at_most(150))


def _cache_bytes(lab: Lab, name: str) -> dict[str, int]:
    """By peer id, what a server has taken for its KV cache and keeps, used or not."""
    view = lab.remote(name).remote_blocks.connection.router.view
    network = SwarmNetwork.connect(lab.swarm(name).peers, None)
    counters = {server.record.peer_id: network.ask(server).counters for server in view.servers}
    return {peer: found.get("kv_bytes", 0) for peer, found in counters.items()}


def _tree(pid: int) -> int:
    """Bytes that would be free if a process and all below it ended (USS)."""
    process = psutil.Process(pid)
    return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)])


def _imports() -> int:
    with subprocess.Popen(
        [sys.executable, "-c", f"{IMPORTS}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = _tree(process.pid)
        process.kill()
    return found
