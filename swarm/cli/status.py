"""`swarm status`: which models a swarm serves, who serves which blocks, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.cli.common import (
    joining_parser,
    need_peers,
    parse_joining,
    quick_imports,
)
from swarm.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from swarm.dht.directory import SwarmView
    from swarm.identity import SwarmKey

_HELP = """\
Show who serves which blocks, of every model that the swarm announces.

examples:
  swarm status --peers /ip4/.../p2p/Qm...
  SWARM_PEERS=/ip4/.../p2p/Qm... swarm status swarm-demo --json

A model is healthy if every block has two servers or more, degraded if losing one server would
break it, and broken if blocks are missing, which are then named.
"""

_COLOURS = {"healthy": "green", "degraded": "yellow", "broken": "red"}


def status(argv: Sequence[str]) -> int:
    parser = joining_parser("swarm status", _HELP)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="show only this one")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parse_joining(parser, argv)
    views = survey(need_peers(arguments.peers), arguments.swarm_key, arguments.model)
    if arguments.json:
        print(json.dumps({"models": [_as_object(view) for view in views]}, indent=2))
        return 0
    from rich.console import Console

    console = Console()
    if not views:
        console.print("this swarm serves no model yet: start one with `swarm-server MODEL`")
    for view in views:
        _show(view, console)
    return 0


def survey(peers: Sequence[str], key: SwarmKey | None, model: str | None) -> list[SwarmView]:
    """Who serves `model` (or any model). Raises UsageError, PeerUnavailable."""
    with quick_imports():
        from swarm.dht.directory import Directory, list_models
        from swarm.dht.node import DhtNode
        from swarm.identity import Identity
        from swarm.loop import run

    async def look() -> list[SwarmView]:
        node = await DhtNode.create(Identity.ephemeral(), peers, key=key, client_mode=True)
        try:
            served = await list_models(node)
            wanted = [item for item in served if model in (None, item.model.name)]
            if served and not wanted:
                names = ", ".join(sorted({item.model.name for item in served}))
                raise UsageError(f"this swarm serves no '{model}'; choose one of: {names}")
            return [await Directory(node, item.model, item.num_blocks).refresh() for item in wanted]
        finally:
            await node.close()

    return run(look())


def health(view: SwarmView) -> str:
    """healthy, degraded or broken."""
    if view.missing_blocks():
        return "broken"
    return "healthy" if min(_replicas(view)) > 1 else "degraded"


def _replicas(view: SwarmView) -> list[int]:
    return [len(view.holders(block)) for block in range(view.num_blocks)]


def _as_object(view: SwarmView) -> dict[str, object]:
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
                "version": record.version,
            }
            for record in records
        ],
    }


def _show(view: SwarmView, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    state = health(view)
    line = Text.assemble(
        (str(view.model), "bold"), f"  {view.num_blocks} blocks  ", (state, _COLOURS[state])
    )
    if missing := view.missing_blocks():
        line.append(f": nobody serves {', '.join(map(str, missing))}")
    console.print(line)
    counts = "".join(str(n) if n < 10 else "+" for n in _replicas(view))
    console.print(f"servers of each block: {counts}", style="dim", soft_wrap=True)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("blocks", "state", "address", "computes in", "tokens/s", "queue", "free KV"):
        table.add_column(name, justify="right" if name in ("tokens/s", "queue") else "left")
    table.add_column("who")
    for record in (server.record for server in view.servers):
        silent = record.peer_id in view.silent
        table.add_row(
            str(record.blocks),
            "silent" if silent else str(record.state),
            f"{record.host}:{record.port}",
            record.numerics.dtype,
            f"{record.throughput:.0f}",
            str(record.queue),
            str(record.free_tokens),
            record.public_name or f"{record.peer_id[-8:]}",
            style="dim" if silent or record.state != "online" else "",
        )
    console.print(table)
    console.print()
