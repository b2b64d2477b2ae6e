"""The first figures of a swarm on one machine: start-up, time per token, pause when a server dies.

    .venv/bin/python benchmarks/first_light.py --json figures.json

Real processes on loopback with one thread each, against plain transformers in this process with one
thread. docs/benchmarks.md explains the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # servers inherit it; must be set before torch is imported

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from swarm import AutoDistributedModelForCausalLM, LocalSwarm
from swarm.models.demo import DEMO_MODEL

PROMPT_TOKENS = 16
KILL_AT = 32  # tokens


@dataclass(frozen=True)
class Row:
    """One figure: all its measurements, in the order in which they were made."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        low, middle, high = quartiles(self.values)
        figures = (middle, low, high, min(self.values), max(self.values))
        return (self.name, self.unit, *(f"{value:,.2f}" for value in figures))

    def summary(self) -> dict[str, Any]:
        low, middle, high = quartiles(self.values)
        return asdict(self) | {
            "median": middle,
            "quartiles": [low, high],
            "range": [min(self.values), max(self.values)],
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Stopwatch:
    """A streamer that notes when each token came; `then` runs once, after `at` tokens."""

    def __init__(self, at: int = 0, then: Callable[[], object] | None = None) -> None:
        self.times: list[float] = []
        self._at, self._then = at, then
        self._seen_prompt = False

    def put(self, value: object) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.times.append(time.perf_counter())
        if self._then is not None and len(self.times) == self._at:
            self._then()

    def end(self) -> None:
        """transformers calls it."""

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between tokens; the first is left out, as it is the prompt's."""
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


class Benchmark:
    """Everything measured in one process, so that all figures see the same machine."""

    def __init__(self, runs: int, tokens: int, seed: int) -> None:
        self.runs, self.tokens = runs, tokens
        self.generator = torch.Generator().manual_seed(seed)
        torch.set_num_threads(1)
        disable_progress_bar()
        self.local: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
        self.rows: list[Row] = []

    def measure(self) -> None:
        with LocalSwarm(spans=["0:8", "8:16", "16:24"]) as swarm:
            self.seconds_until_ready(swarm)
            self.time_per_token(connect(swarm))
            self.pause_when_killed(swarm)

    def seconds_until_ready(self, swarm: LocalSwarm) -> None:
        """From starting a process to the line in which it says that it serves."""
        values: list[float] = []
        for run in range(self.runs):
            begin = time.perf_counter()
            index = swarm.add("8:16")
            values.append(time.perf_counter() - begin)
            swarm.stop(index)
            self.say("server until ready", run, values)
        self.note("server until ready", "s", values)

    def time_per_token(self, distributed: Any) -> None:
        """Swarm and local by turns on the same prompt, with the same tokens as a result."""
        self.generate(distributed, self.prompt(), Stopwatch())  # dials, and warms up
        remote: list[float] = []
        local: list[float] = []
        for run in range(self.runs):
            prompt = self.prompt()
            there, here = Stopwatch(), Stopwatch()
            expected = self.generate(self.local, prompt, here)
            check_same(self.generate(distributed, prompt, there), expected)
            remote.append(statistics.median(there.gaps))
            local.append(statistics.median(here.gaps))
            self.say("token through 3 servers", run, remote)
        self.note("token through 3 servers", "ms", remote)
        self.note("token, local transformers", "ms", local)
        self.note(
            "the one over the other", "x", [a / b for a, b in zip(remote, local, strict=True)]
        )

    def pause_when_killed(self, swarm: LocalSwarm) -> None:
        """SIGKILL for the middle server, right after a token; a spare one serves its blocks."""
        values: list[float] = []
        for run in range(self.runs):
            swarm.add("8:16")
            distributed = connect(swarm)  # looks at the swarm anew
            prompt = self.prompt()
            expected = self.generate(self.local, prompt, Stopwatch())
            with distributed.inference_session(max_length=PROMPT_TOKENS + self.tokens) as session:
                watch = Stopwatch(KILL_AT, lambda: swarm.kill(in_use(swarm, session.hops[1])))
                check_same(self.generate(distributed, prompt, watch), expected)
                if not session.recoveries:
                    raise SystemExit("the killed server was not in use")
            values.append(max(watch.gaps[KILL_AT - 1 :]))
            self.say("pause at a kill", run, values)
        self.note(f"pause, server killed at token {KILL_AT}", "ms", values)

    def prompt(self) -> torch.Tensor:
        """Token ids [1, 16], other ones each time; 0 and 1 end and pad."""
        size = self.local.config.vocab_size
        return torch.randint(2, size, (1, PROMPT_TOKENS), generator=self.generator)

    def generate(self, model: Any, prompt: torch.Tensor, watch: Stopwatch) -> torch.Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=False,
            streamer=watch,
        )

    def note(self, name: str, unit: str, values: Sequence[float]) -> None:
        self.rows.append(Row(name, unit, tuple(values)))

    def say(self, what: str, run: int, values: Sequence[float]) -> None:
        print(f"{what}: {run + 1}/{self.runs}, {values[-1]:.2f}", file=sys.stderr, flush=True)


def connect(swarm: LocalSwarm) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(None, initial_peers=swarm.peers)


def in_use(swarm: LocalSwarm, hop: Any) -> int:
    """The index of the server behind a hop of a session."""
    return next(server.index for server in swarm.servers if server.peer_id == hop.peer_id)


def check_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """A figure for wrong tokens would be worth nothing."""
    if not torch.equal(got, expected):
        raise SystemExit(f"the swarm wrote {got.tolist()}\nbut one machine {expected.tolist()}")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if "model name" in line]
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")  # Linux only
    return path.read_text().splitlines() if path.exists() else []


def print_table(rows: Sequence[Row]) -> None:
    lines = [("", "", "median", "quartile 1", "quartile 3", "min", "max")]
    lines += [row.cells for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *numbers]).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--runs", type=int, default=7, help="of each figure (default: 7)")
    parser.add_argument("--tokens", type=int, default=64, help="to generate in a run (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument("--quick", action="store_true", help="one run: does it work at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    arguments = parser.parse_args()
    if arguments.tokens <= KILL_AT:
        parser.error(f"--tokens must be more than {KILL_AT}, where a server is killed")
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    benchmark = Benchmark(
        1 if arguments.quick else arguments.runs, arguments.tokens, arguments.seed
    )
    benchmark.measure()
    print_table(benchmark.rows)
    if arguments.json:
        results = {"machine": about, "rows": [row.summary() for row in benchmark.rows]}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
