"""Runs every suite, or some, and prints one table; writes JSON and a plot if asked to.

    .venv/bin/python -m benchmarks --json figures.json --plot figures.png
    .venv/bin/python -m benchmarks --only hop,decode --quick

Real processes on loopback with one thread each, against plain transformers in this process with one
thread. docs/benchmarks.md explains the rows.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # servers inherit it; must be set before torch is imported

from benchmarks import (
    adapters,
    api,
    batch,
    bf16,
    codec,
    decode,
    drafts,
    failover,
    families,
    finetune,
    first_light,
    hop,
    links,
    memory,
    mixed,
    monitor,
    offload,
    prefill,
    start,
    strangers,
)
from benchmarks.figures import NoFigure, table, write_json
from benchmarks.lab import Lab, machine
from swarm.errors import SwarmError

# Those that share the swarms of A and B come first; the others want the machine for themselves.
SUITES: dict[str, Callable[[Lab], None]] = {
    "hop": hop.measure,
    "decode": decode.measure,
    "prefill": prefill.measure,
    "batch": batch.measure,
    "mixed": mixed.measure,
    "strangers": strangers.measure,
    "memory": memory.measure,
    "families": families.measure,
    "links": links.measure,
    "drafts": drafts.measure,
    "codec": codec.measure,
    "bf16": bf16.measure,
    "offload": offload.measure,
    "start": start.measure,
    "first_light": first_light.measure,
    "failover": failover.measure,
    "finetune": finetune.measure,
    "adapters": adapters.measure,
    "beside": finetune.beside_trainer,
    "deaths": finetune.deaths,
    "monitor": monitor.measure,
    "api": api.measure,
}


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else models stay on the disk
    about, failed = machine(), list[str]()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder:
        lab = Lab(Path(folder), arguments.runs, arguments.tokens, arguments.seed, arguments.quick)
        with lab:
            for lab.suite in arguments.only:
                if not _runs(lab):
                    failed.append(lab.suite)
    about |= {"seed": lab.seed, "runs": lab.runs, "tokens": lab.tokens, "failed": failed}
    about |= {"checked_tokens": lab.checked, "ties": lab.ties}
    print(table(lab.rows))
    print(f"\n{lab.checked:,} tokens are one machine's, {lab.ties} of them by a tie")
    if arguments.json:
        write_json(arguments.json, lab.rows, about)
    if arguments.plot:
        from benchmarks.plot import draw

        draw(lab.rows, arguments.plot)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _runs(lab: Lab) -> bool:
    """Whether the suite came to its end: the others' figures are not lost if it did not."""
    try:
        SUITES[lab.suite](lab)
    except (SwarmError, NoFigure):
        traceback.print_exc()
        lab.clear()
        return False
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=_Raw
    )
    parser.add_argument(
        "--only", type=_suites, default=list(SUITES), metavar="SUITE,…", help=", ".join(SUITES)
    )
    parser.add_argument("--runs", type=int, default=5, help="of each figure (default: 5)")
    parser.add_argument("--tokens", type=int, default=64, help="to generate in a run (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts (default: 0)")
    parser.add_argument("--quick", action="store_true", help="one run: does it work at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs = 1
    if arguments.tokens <= first_light.KILL_AT:
        parser.error(f"--tokens must be more than {first_light.KILL_AT}, where a server is killed")
    return arguments


def _suites(text: str) -> Sequence[str]:
    names = text.split(",")
    if unknown := set(names) - SUITES.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}? there are {', '.join(SUITES)}")
    return names


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
