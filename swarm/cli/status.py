"""`swarm status`: which models a swarm serves, who serves which blocks, and what is missing."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from swarm.cli.common import (
    Parser,
    add_json,
    joining_parser,
    need_peers,
    parse_joining,
)
from swarm.cli.screen import plain
from swarm.errors import PeerUnavailable, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from swarm.dht.directory import Directory, ModelListing, SwarmView
    from swarm.identity import SwarmKey

_HELP = """\
Show who serves which blocks, of every model that the swarm announces.

examples:
  swarm status --peers /ip4/.../p2p/Qm...
  SWARM_PEERS=/ip4/.../p2p/Qm... swarm status swarm-demo --json
  swarm status --watch                        again every two seconds, until Ctrl-C
  swarm status --watch 10 --json              the same for programs: an object per line

A model is healthy if every block has two servers or more, degraded if losing one server would
break it, and broken if some block has none; which are then named.
"""

_COLOURS = {"healthy": "green", "degraded": "yellow", "broken": "red"}
_PERIOD = 2.0  # seconds between two looks
_WIDE = 110  # columns from which on there is room for a picture of each server's blocks
_PICTURE = 24  # columns, at most, of it

Look = Callable[[], Awaitable["list[SwarmView]"]]


def status_parser() -> Parser:
    parser = joining_parser("swarm status", _HELP)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="show only this one")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_period,
        const=_PERIOD,
        metavar="SECONDS",
        help=f"look again every so often (default: every {_PERIOD:g})",
    )
    add_json(parser)
    return parser


def _period(text: str) -> float:
    with suppress(ValueError):
        if 0.5 <= (seconds := float(text)) <= 3600:
            return seconds
    raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds from 0.5 to 3600")


def status(argv: Sequence[str]) -> int:
    arguments = parse_joining(status_parser(), argv)
    asked = need_peers(arguments.peers), arguments.swarm_key, arguments.model
    if arguments.watch is not None:
        with suppress(KeyboardInterrupt):  # that is how it ends
            watch(*asked, arguments.watch, as_json=arguments.json)
        return 0
    views = survey(*asked)
    if arguments.json:
        print(json.dumps(_as_object(views), indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(picture(views, console))
    return 0


def survey(peers: Sequence[str], key: SwarmKey | None, model: str | None) -> list[SwarmView]:
    """Who serves `model` (or any model). Raises UsageError, PeerUnavailable."""
    from swarm.loop import run

    async def once() -> list[SwarmView]:
        async with _looking(peers, key, model) as look:
            return await look()

    return run(once())


def watch(
    peers: Sequence[str], key: SwarmKey | None, model: str | None, period: float, *, as_json: bool
) -> None:
    """Show it again and again, until Ctrl-C. Raises UsageError, PeerUnavailable at first."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from swarm.loop import run

    console = Console()

    async def on() -> None:
        async with _looking(peers, key, model) as look:
            views = await look()
            if as_json:
                while True:
                    print(json.dumps(_as_object(views)), flush=True)
                    views, _ = await _again(look, views, period)
            hint = Text(f"every {period:g} s; Ctrl-C ends", "dim")
            with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
                while True:
                    live.update(Group(hint, picture(views, console)), refresh=True)
                    views, trouble = await _again(look, views, period)
                    hint = Text(plain(trouble), "red") if trouble else hint

    run(on())


async def _again(look: Look, before: list[SwarmView], period: float) -> tuple[list[SwarmView], str]:
    """What is seen `period` seconds later; or what was seen before, and what is wrong."""
    await asyncio.sleep(period)
    try:
        return await look(), ""
    except (PeerUnavailable, UsageError) as error:
        return before, str(error)


@asynccontextmanager
async def _looking(
    peers: Sequence[str], key: SwarmKey | None, model: str | None
) -> AsyncGenerator[Look]:
    """A look into the swarm whenever it is wanted; servers that fall silent are noticed."""
    from swarm.dht.lean import without_torch

    with without_torch():
        from swarm.dht.directory import Directory, list_models
        from swarm.dht.node import DhtNode
        from swarm.identity import Identity

    node = await DhtNode.create(Identity.ephemeral(), peers, key=key, client_mode=True)
    known: dict[ModelListing, Directory] = {}

    async def look() -> list[SwarmView]:
        served = await list_models(node)
        wanted = [item for item in served if model in (None, item.model.name)]
        if served and not wanted:
            names = ", ".join(sorted({item.model.name for item in served}))
            raise UsageError(f"this swarm serves no '{model}'; choose one of: {plain(names)}")
        for item in wanted:
            known.setdefault(item, Directory(node, item.model, item.num_blocks, whole=True))
        return [await known[item].refresh() for item in wanted]

    try:
        yield look
    finally:
        await node.close()


def health(view: SwarmView) -> str:
    """healthy, degraded or broken."""
    if view.missing_blocks():
        return "broken"
    return "healthy" if min(_replicas(view)) > 1 else "degraded"


def _replicas(view: SwarmView) -> list[int]:
    return [len(view.holders(block)) for block in range(view.num_blocks)]


def _as_object(views: Sequence[SwarmView]) -> dict[str, object]:
    return {"models": [_model_as_object(view) for view in views]}


def _model_as_object(view: SwarmView) -> dict[str, object]:
    records = [server.record for server in view.servers]
    return {
        "name": view.model.name,
        "fingerprint": view.model.fingerprint,
        "num_blocks": view.num_blocks,
        "health": health(view),
        "missing": [str(blocks) for blocks in view.missing_blocks()],
        "replicas": _replicas(view),
        "servers": [
            {
                "blocks": str(record.blocks),
                "state": str(record.state),
                "silent": record.peer_id in view.silent,
                "address": f"{record.host}:{record.port}",
                "peer_id": record.peer_id,
                "public_name": record.public_name,
                "dtype": record.numerics.dtype,
                "throughput": round(record.throughput, 2),
                "queue": record.queue,
                "free_tokens": record.free_tokens,
                "adapters": [str(adapter) for adapter in record.adapters],
                "version": record.version,
            }
            for record in records
        ],
    }


def picture(views: Sequence[SwarmView], console: Console) -> RenderableType:
    """All of it, for a terminal like `console`."""
    from rich.console import Group
    from rich.text import Text

    if not views:
        return Text("this swarm serves no model yet: start one with `swarm-server MODEL`")
    parts: list[RenderableType] = []
    for view in views:
        parts += [_heading(view), _coverage(view), _table(view, wide=console.width >= _WIDE)]
        parts += [*_adapters(view), ""]
    return Group(*parts)


def _heading(view: SwarmView) -> Text:
    from rich.text import Text

    state = health(view)
    line = Text.assemble(
        (plain(str(view.model)), "bold"), f"  {view.num_blocks} blocks  ", (state, _COLOURS[state])
    )
    if missing := view.missing_blocks():
        line.append(f": nobody serves {', '.join(map(str, missing))}")
    return line


def _coverage(view: SwarmView) -> Text:
    """How many hold each block: by its digit, and by colour."""
    from rich.text import Text

    line = Text("servers of each block: ", "dim")
    for count in _replicas(view):
        line.append(
            str(count) if count < 10 else "+", ("bold red", "yellow", "green")[min(count, 2)]
        )
    return line


def _table(view: SwarmView, *, wide: bool) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", pad_edge=False)
    names = ["blocks", *(["where"] if wide else []), "state", "address", "computes in"]
    for name in (*names, "tokens/s", "queue", "free KV", "who"):
        right = name in ("tokens/s", "queue", "free KV")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for record in (server.record for server in view.servers):
        silent = record.peer_id in view.silent
        cells = [
            str(record.blocks),
            *([_place(record.blocks.start, record.blocks.end, view.num_blocks)] if wide else []),
            "silent" if silent else str(record.state),
            plain(f"{record.host}:{record.port}"),
            record.numerics.dtype,
            f"{record.throughput:.0f}",
            str(record.queue),
            f"{record.free_tokens:,}",
            plain(record.public_name or record.peer_id[-8:], 30),
        ]
        dim = silent or record.state != "online"
        # As Text, or a name in square brackets would be taken for a colour.
        table.add_row(*map(Text, cells), style="dim" if dim else "")
    return table


def _adapters(view: SwarmView) -> list[Text]:
    """Which ones servers have for everybody, and in which blocks."""
    from rich.text import Text

    held: dict[str, list[str]] = {}
    for record in (server.record for server in view.servers):
        for adapter in record.adapters:
            held.setdefault(plain(str(adapter), 40), []).append(str(record.blocks))
    return [
        Text.assemble(("adapter ", "dim"), name, (" in ", "dim"), ", ".join(blocks))
        for name, blocks in sorted(held.items())
    ]


def _place(start: int, end: int, count: int) -> str:
    """Where blocks `[start, end)` lie among so many."""
    width = min(count, _PICTURE)
    first, last = start * width // count, math.ceil(end * width / count)
    return "·" * first + "█" * (last - first) + "·" * (width - last)
