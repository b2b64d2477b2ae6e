#!/usr/bin/env python3
"""Simulates a swarm of volunteers under our rules and under Petals', in the same history.

The table goes to stdout, progress to stderr. docs/scale.md explains the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulation.kademlia import Traffic, traffic
from simulation.run import RULES, curves, figures, simulate, table
from simulation.world import Scenario, make_world

EXAMPLES = """
examples:
  %(prog)s --dht                                       bytes per node in the DHT, by size
  %(prog)s --servers 100 --clients 100 --minutes 10    a first look, in seconds
  %(prog)s --rules ours,petals --json run.json --plot run.svg
  %(prog)s --servers 10000 --clients 2000 --minutes 1 --warmup 3 --rules ours

All servers hold a part of one model with 80 blocks. Speeds, links, places and lifetimes are drawn
from --seed, once for all rules; the same seed gives the same figures.
"""


_stopped: list[int] = []  # by Ctrl-C


def _stop(number: int, _: object) -> None:
    """Python drops what is raised while something is freed: then `_progress` raises it."""
    _stopped.append(number)
    raise KeyboardInterrupt


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGINT, _stop)
    if arguments.dht:
        print(_dht_table())
        return
    scenario = Scenario(
        servers=arguments.servers,
        clients=arguments.clients,
        hours=arguments.minutes / 60,
        seed=arguments.seed,
        lifetime=60.0 * arguments.lifetime,
        warmup=60.0 * arguments.warmup,
        tick=arguments.tick,
    )
    about, done = dataclasses.asdict(scenario), dict[str, Any]()
    for path in arguments.add:
        done |= _read(path, about)
    world = make_world(scenario)
    try:
        for name in (name for name in arguments.rules if name not in done):
            measure = simulate(world, RULES[name], _progress(name, scenario.end))
            done[name] = {"figures": figures(world, measure), "curves": curves(world, measure)}
            print(file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped: rules that were not simulated to the end are left out", file=sys.stderr)
        if not done:
            raise SystemExit(130) from None
    print(table({name: run["figures"] for name, run in done.items()}))
    if arguments.json:
        arguments.json.write_text(json.dumps({"scenario": about, "rules": done}) + "\n")
    if arguments.plot:
        from simulation.plot import draw  # needs matplotlib, which only developers have

        title = f"{scenario.servers:,} servers, {scenario.clients:,} clients"
        draw(title, {name: run["curves"] for name, run in done.items()}, arguments.plot)


def _dht_table() -> str:
    rows = [f"{'servers':>8}" + "".join(f"{name:>12}" for name in Traffic.__slots__)]
    for servers in (10, 100, 1000, 10_000):
        values = dataclasses.astuple(traffic(servers, 2 * servers, Scenario().num_blocks))
        rows.append(f"{servers:>8,}" + "".join(f"{value:>12,.0f}" for value in values))
    return "\n".join(rows)


def _read(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
        if written["scenario"] == about:
            return written["rules"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path} is not what --json writes: {error}") from error
    raise SystemExit(f"{path} tells another history: give the same options as then")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--servers", type=_count, default=1000, help="that are up at any time (default 1000)")
    add("--clients", type=_count, default=2000, help="people who chat (default 2000)")
    add("--minutes", type=_positive, default=60, help="simulated after the warm-up (default 60)")
    add("--warmup", type=_positive, default=10, metavar="MINUTES",
        help="simulated before, not counted (default 10)")  # fmt: skip
    add("--lifetime", type=_positive, default=60, metavar="MINUTES",
        help="a server's median; lower is more churn (default 60)")  # fmt: skip
    add("--rules", type=_rules, default=list(RULES), metavar="NAMES",
        help=f"any of {','.join(RULES)} (default: all)")  # fmt: skip
    add("--seed", type=int, default=0, help="another history (default 0)")
    add("--tick", type=_positive, default=1, metavar="SECONDS",
        help="how often loads are worked out; 5 is coarse and quicker (default 1)")  # fmt: skip
    add("--add", type=Path, action="append", default=[], metavar="FILE",
        help="what --json wrote of other rules in the same history; repeatable")  # fmt: skip
    add("--dht", action="store_true",
        help="only this: bytes/s in the DHT per node, with 2 clients per server")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--plot", type=Path, metavar="FILE", help="draw them there (.png or .svg)")
    return parser.parse_args()


def _rules(text: str) -> Sequence[str]:
    names = text.split(",")
    for name in names:
        if name not in RULES:
            raise argparse.ArgumentTypeError(f"no rules '{name}': choose from {', '.join(RULES)}")
    return names


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return number


def _progress(name: str, end: float) -> Callable[[float], None]:
    began = time.monotonic()

    def tell(now: float) -> None:
        if _stopped:
            raise KeyboardInterrupt
        took = time.monotonic() - began
        left = took * (end - now) / now if now else 0.0
        text = f"\r{name}: {now / 60:.0f} of {end / 60:.0f} minutes, {left:.0f} s left "
        print(text, end="", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    main()
