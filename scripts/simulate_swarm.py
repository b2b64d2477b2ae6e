#!/usr/bin/env python3
"""Simulates a swarm of volunteers under our rules and under Petals', in the same history.

The table goes to stdout, progress to stderr. docs/scale.md explains the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulation.run import RULES, figures, simulate, table
from simulation.world import Scenario, make_world

EXAMPLES = """
examples:
  %(prog)s --servers 100 --clients 100 --minutes 10    a first look, in seconds
  %(prog)s --rules ours,petals --json run.json --plot run.svg
  %(prog)s --servers 10000 --clients 1000 --minutes 20 --tick 5

All servers hold a part of one model with 80 blocks. Speeds, links, places and lifetimes are drawn
from --seed, once for all rules; the same seed gives the same figures. Ten minutes go before what
counts.
"""


def main() -> None:
    arguments = _parse()
    scenario = Scenario(
        servers=arguments.servers,
        clients=arguments.clients,
        hours=arguments.minutes / 60,
        seed=arguments.seed,
        lifetime=60.0 * arguments.lifetime,
        tick=arguments.tick,
    )
    world = make_world(scenario)
    measures = {}
    try:
        for name in arguments.rules:
            measures[name] = simulate(world, RULES[name], _progress(name, scenario.end))
            print(file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped: rules that were not simulated to the end are left out", file=sys.stderr)
        if not measures:
            raise SystemExit(130) from None
    columns = {name: figures(world, measure) for name, measure in measures.items()}
    print(table(columns))
    if arguments.json:
        about = {"command": " ".join(sys.argv[1:]), "figures": columns}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")
    if arguments.plot:
        from simulation.plot import draw  # needs matplotlib, which only developers have

        draw(scenario, measures, arguments.plot)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--servers", type=_count, default=1000, help="that are up at any time (default 1000)")
    add("--clients", type=_count, default=2000, help="people who chat (default 2000)")
    add("--minutes", type=_positive, default=60, help="simulated after the warm-up (default 60)")
    add("--lifetime", type=_positive, default=60, metavar="MINUTES",
        help="a server's median; lower is more churn (default 60)")  # fmt: skip
    add("--rules", type=_rules, default=list(RULES), metavar="NAMES",
        help=f"any of {','.join(RULES)} (default: all)")  # fmt: skip
    add("--seed", type=int, default=0, help="another history (default 0)")
    add("--tick", type=_positive, default=1, metavar="SECONDS",
        help="how often loads are worked out; 5 is coarse and quicker (default 1)")  # fmt: skip
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
        took = time.monotonic() - began
        left = took * (end - now) / now if now else 0.0
        text = f"\r{name}: {now / 60:.0f} of {end / 60:.0f} minutes, {left:.0f} s left "
        print(text, end="", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    main()
