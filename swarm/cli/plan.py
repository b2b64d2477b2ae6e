"""`swarm plan`: how many machines a model wants, how quick they would be, and what that costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from swarm.cli.common import Parser, add_json, add_verbose, quick_imports, whole
from swarm.cli.logs import start_logging
from swarm.cli.screen import plain
from swarm.errors import UsageError
from swarm.plan import GB, GPUS, HOURS, Assumptions, Block, Machine, Offer, Wish, offer
from swarm.types import DTYPE_BYTES

if TYPE_CHECKING:
    from rich.table import Table

    from swarm.models.sizes import ModelSize

_HELP = """\
How many GPUs of which size a model wants, how many tokens per second to expect, watts, and what
electricity and renting cost. Only the model's config is read, no weights.

examples:
  swarm plan meta-llama/Llama-3.1-70B-Instruct
  swarm plan Qwen/Qwen3-235B-A22B --sessions 32 --tokens 16384 --rtt 20
  swarm plan ./my-model --gpu "RTX 3090" --replicas 1 --json
  swarm plan ./my-model --here                with this machine, as it was measured when it served

It is arithmetic, not a measurement: all that is assumed is printed below the table, and
docs/running/sizing.md tells where it comes from.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for, and what each kind of machine offers (None: a block does not fit)."""

    model: str
    size: ModelSize
    dtype: str
    wish: Wish
    assumed: Assumptions
    offers: tuple[tuple[Machine, Offer | None], ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return blocks_of(self.size, self.dtype)


def plan_parser() -> Parser:
    parser = Parser("swarm plan", _HELP)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hugging Face repo")
    parser.add_argument("--revision", help="branch, tag or commit of a repo")
    parser.add_argument("--token", help="for gated or private repos (default: HF_TOKEN)")
    usual, assumed = Wish(), Assumptions()
    for name, default, what in (
        ("sessions", usual.sessions, "texts that are written at a time"),
        ("tokens", usual.tokens, "of each text, prompt and answer together"),
        ("replicas", usual.replicas, "machines for each block: with two, any one may die"),
    ):
        parser.add_argument(
            f"--{name}",
            type=whole(1, 1 << 20),
            metavar="N",
            default=default,
            help=f"{what} (default: %(default)s)",
        )
    parser.add_argument(
        "--rtt",
        type=_number(0, 10_000),
        metavar="MS",
        default=usual.rtt * 1e3,
        help="round trip between two machines (default: %(default)s ms, as in one building)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="of weights and caches (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu",
        action="append",
        choices=[gpu.name for gpu in GPUS],
        help="only these (default: all that are known)",
    )
    parser.add_argument(
        "--rent", type=_number(0, 1000), metavar="DOLLARS", help="an hour of each of those GPUs"
    )
    parser.add_argument(
        "--kwh",
        type=_number(0, 100),
        metavar="DOLLARS",
        default=assumed.price_kwh,
        help="price of electricity (default: %(default)s)",
    )
    parser.add_argument(
        "--here", action="store_true", help="this machine, too, by what it measured when it served"
    )
    add_json(parser)
    add_verbose(parser)
    return parser


def _number(low: float, high: float) -> Any:
    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= (number := float(text)) <= high:
                return number
        raise argparse.ArgumentTypeError(f"'{text}' is no number from {low:g} to {high:g}")

    return convert


def plan(argv: Sequence[str]) -> int:
    arguments = plan_parser().parse_args(argv)
    start_logging(arguments.verbose)
    found = make_plan(arguments)
    if arguments.json:
        print(json.dumps(as_object(found), indent=2))
    else:
        _show(found)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Raises UsageError."""
    with quick_imports():
        from swarm.models.checkpoint import open_config
        from swarm.models.sizes import measure_sizes
    source = {"revision": arguments.revision, "token": arguments.token}
    name, config = open_config(arguments.model, **source)
    size = measure_sizes(config)
    machines = [gpu for gpu in GPUS if not arguments.gpu or gpu.name in arguments.gpu]
    if arguments.rent is not None:
        machines = [replace(machine, rent=arguments.rent) for machine in machines]
    if arguments.here:
        machines.insert(0, _this_machine(arguments.model, arguments.dtype, source))
    wish = Wish(arguments.sessions, arguments.tokens, arguments.replicas, arguments.rtt / 1e3)
    assumed = Assumptions(price_kwh=arguments.kwh)
    blocks = blocks_of(size, arguments.dtype)
    offers = tuple((machine, offer(blocks, machine, wish, assumed)) for machine in machines)
    return Plan(name, size, arguments.dtype, wish, assumed, offers)


def blocks_of(size: ModelSize, dtype: str) -> tuple[Block, ...]:
    """Numbers to bytes."""
    each = DTYPE_BYTES[dtype]
    return tuple(
        Block(b.weights * each, b.active * each, b.kept * each, b.window, b.fixed * each)
        for b in size.blocks
    )


def _this_machine(model: str | None, dtype: str, source: dict[str, str | None]) -> Machine:
    """Raises UsageError if nothing was measured here yet."""
    from swarm.models.checkpoint import Checkpoint
    from swarm.models.families import text_config
    from swarm.server import throughput

    checkpoint, device = Checkpoint.open(model, **source), throughput.pick_device("auto")
    count: int = text_config(checkpoint.config).num_hidden_layers
    for blocks in range(count, 0, -1):  # long spans tell most of what a block takes
        key = throughput.speeds_key(checkpoint.fingerprint, blocks, _dtype(dtype), device)
        speeds = throughput.remembered(key)
        if speeds.alone > 0:
            return Machine(
                f"this machine ({device.type})",
                throughput.free_bytes(device),
                0.0,
                block_seconds=1 / (speeds.alone * blocks),
                batch_seconds=16 / (speeds.of_16 * blocks) if speeds.of_16 > 0 else None,
            )
    raise UsageError(
        f"this machine has not served '{checkpoint.name}' in {dtype} yet: start "
        f"`swarm-server {model or ''} --dtype {dtype}` once, which measures it"
    )


def _dtype(name: str) -> Any:
    return name


def as_object(found: Plan) -> dict[str, object]:
    blocks, wish = found.blocks, found.wish
    return {
        "name": found.model,
        "dtype": found.dtype,
        "num_blocks": len(blocks),
        "block_bytes": sum(block.weights for block in blocks),
        "active_bytes": sum(block.active for block in blocks),
        "client_bytes": found.size.ends * DTYPE_BYTES[found.dtype],
        "cache_bytes_per_session": sum(block.cache(wish.tokens) for block in blocks),
        "sessions": wish.sessions,
        "tokens": wish.tokens,
        "replicas": wish.replicas,
        "rtt": wish.rtt,
        "assumed": asdict(found.assumed),
        "offers": [
            {
                "machine": machine.name,
                "fits": one is not None,
                "machines": one and one.machines,
                "blocks": one and list(one.spans),
                "tokens_per_second_alone": one and one.alone,
                "tokens_per_second_together": one and one.together,
                "free_tokens": one and one.free_tokens,
                "watts": one and one.watts,
                "power_month": one and one.power_month,
                "rent_month": one and one.rent_month,
                "power_per_million": one and one.per_million(one.power_month),
                "rent_per_million": one and one.per_million(one.rent_month),
            }
            for machine, one in found.offers
        ],
    }


def _show(found: Plan) -> None:
    from rich.console import Console
    from rich.text import Text

    console, blocks, wish = Console(), found.blocks, found.wish
    weights, active = (sum(getattr(b, name) for b in blocks) for name in ("weights", "active"))
    cache = sum(block.cache(wish.tokens) for block in blocks)
    line = Text.assemble((plain(found.model), "bold"), f"  {len(blocks)} blocks, {_size(weights)}")
    if active < weights:
        line.append(f" of which a token meets {_size(active)}")
    line.append(
        f", in {found.dtype}; {_size(found.size.ends * DTYPE_BYTES[found.dtype])} at clients"
    )
    console.print(line)
    console.print(
        f"{wish.sessions} sessions of {wish.tokens:,} tokens keep {_size(cache)} each; "
        f"every block on {wish.replicas} machine{'s' if wish.replicas > 1 else ''}",
        highlight=False,
    )
    console.print(_table(found))
    for sentence in _assumptions(found):
        console.print(f"- {sentence}", style="dim", highlight=False)


def _table(found: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("machines", no_wrap=True)
    for name in ("blocks each", "tok/s alone", "together", "watts", "power/month", "rent/month"):
        table.add_column(name, justify="right")
    table.add_column("$/M tokens: power, rent", justify="right")
    for machine, one in found.offers:
        if one is None:
            table.add_row(f"- x {machine.name}", "a block does not fit", style="dim")
            continue
        prices = (one.per_million(month) for month in (one.power_month, one.rent_month))
        spans = sorted(set(one.spans), reverse=True)
        table.add_row(
            f"{one.machines} x {machine.name}",
            str(spans[0]) if len(spans) == 1 else f"{spans[-1]} to {spans[0]}",
            f"{one.alone:.1f}",
            f"{one.together:.0f}",
            "?" if one.watts is None else f"{one.watts:,.0f}",
            _dollars(one.power_month, 0),
            _dollars(one.rent_month, 0),
            ", ".join(_dollars(price, 2) for price in prices),
        )
    return table


def _assumptions(found: Plan) -> list[str]:
    """Every one that went into the table."""
    assumed, wish = found.assumed, found.wish
    return [
        f"{assumed.usable:.0%} of a GPU's memory, less {_size(assumed.reserve)}, holds weights and "
        "keys and values; one GPU per machine",
        f"a pass reads weights and cache at {assumed.bandwidth_share:.0%} of the data sheet's "
        "bandwidth (not measured on these GPUs; on a CPU products reached 55 % of a block's time)",
        f"each further row of a pass takes {assumed.row_share:.1%} of the first (16 took 1.5 times "
        "one on a CPU); rows of a mixture meet different experts",
        f"besides reading, a block takes {assumed.block_seconds * 1e3:.1f} ms, a hop "
        f"{assumed.hop_seconds * 1e3:.1f} ms, a client {assumed.client_seconds * 1e3:.1f} ms per "
        f"token (measured on two CPU cores, docs/benchmarks.md); round trips {wish.rtt * 1e3:g} ms",
        "sessions decode all the time, with full texts; prompts come on top",
        f"watts are the data sheet's most, and {assumed.machine_watts:g} for the computer around "
        f"each GPU; electricity costs ${assumed.price_kwh:g} a kWh; hardware is not in it",
        "rents are RunPod's on demand of March 2026, unless --rent says otherwise; a month has "
        f"{HOURS:g} hours",
    ]


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def _dollars(amount: float | None, digits: int) -> str:
    return "?" if amount is None else f"${amount:,.{digits}f}"
