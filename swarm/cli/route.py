"""`swarm route`: which servers a request would go through from here, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from swarm.cli.common import (
    Parser,
    add_json,
    joining_parser,
    need_peers,
    parse_joining,
    quick_imports,
    whole,
)
from swarm.cli.screen import plain
from swarm.errors import NoRoute, UsageError

if TYPE_CHECKING:
    from swarm.client.network import ModelRouter
    from swarm.client.routing import PricedHop, Request
    from swarm.identity import SwarmKey

_HELP = """\
Show which servers a request would go through from this machine, what that is expected to take and
why, and what would be chosen without each of them.

examples:
  swarm route swarm-demo --peers /ip4/.../p2p/Qm...
  SWARM_PEERS=/ip4/.../p2p/Qm... swarm route swarm-demo --prompt-tokens 4000 --json

Some servers are asked how far they are, twice each. Clients draw lots among routes that are about
as good, so theirs may be another one. docs/routing.md tells how prices are made.
"""

_HIDDEN_BYTES = 8192  # of one position, such as 4,096 numbers of two bytes: servers do not say
_PROBES = 64
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """A route and its price: seconds until the first new token, and for each one after it."""

    hops: Sequence[PricedHop]
    first: float
    each: float

    @property
    def seconds(self) -> float:
        return sum(hop.seconds for hop in self.hops)


@dataclass(frozen=True, slots=True)
class Outlook:
    """The best plan, and the best ones without each of its servers, by peer id (None: nobody)."""

    request: Request
    best: Plan
    without: dict[str, Plan | None]


def route_parser() -> Parser:
    parser = joining_parser("swarm route", _HELP)
    parser.add_argument("model", metavar="MODEL", help="its name in the swarm")
    tokens = whole(1, _MAX_TOKENS)
    parser.add_argument(
        "--prompt-tokens", type=tokens, default=128, metavar="N", help="of the request (128)"
    )
    parser.add_argument(
        "--new-tokens", type=tokens, default=128, metavar="N", help="of the answer (128)"
    )
    add_json(parser)
    return parser


def route(argv: Sequence[str]) -> int:
    arguments = parse_joining(route_parser(), argv)
    peers, key = need_peers(arguments.peers), arguments.swarm_key
    asked = arguments.model, arguments.prompt_tokens, arguments.new_tokens
    outlook = explore(peers, key, *asked)
    if arguments.json:
        print(json.dumps(_as_object(outlook), indent=2))
    else:
        _show(outlook)
    return 0


def explore(
    peers: Sequence[str], key: SwarmKey | None, model: str, prompt: int, new: int
) -> Outlook:
    """Join, measure and choose. Raises UsageError, PeerUnavailable, NoRoute."""
    with quick_imports(models=False):
        from swarm.client.network import SwarmNetwork
        from swarm.client.routing import Request
        from swarm.config import ClientConfig
        from swarm.dht.directory import list_models
        from swarm.types import BlockRange

    network = SwarmNetwork.connect(peers, key)
    try:
        served = network.loop.call(list_models(network.dht))
        listing = next((item for item in served if item.model.name == model), None)
        if listing is None:
            names = plain(", ".join(sorted({item.model.name for item in served})) or "nothing yet")
            raise UsageError(f"this swarm serves no '{model}'; it serves: {names}")
        router = network.router(listing.model, listing.num_blocks, ClientConfig())
        network.loop.call(router.probe(network.measure, _PROBES))
        blocks, numerics = BlockRange(0, listing.num_blocks), network.numerics(router, None)
        request = Request(
            listing.model, blocks, numerics, prompt, new, position_bytes=_HIDDEN_BYTES
        )
        return _look_out(router, request)
    finally:
        SwarmNetwork.leave_all()


def _look_out(router: ModelRouter, request: Request) -> Outlook:
    """Raises NoRoute."""
    best = _plan(router, request)
    without: dict[str, Plan | None] = {}
    for name in (hop.hop.server.record.peer_id for hop in best.hops):
        try:
            without[name] = _plan(router, replace(request, exclude=frozenset({name})))
        except NoRoute:
            without[name] = None
    return Outlook(request, best, without)


def _plan(router: ModelRouter, request: Request) -> Plan:
    hops = router.choose(request, by_lot=False)
    priced = router.price(hops, request)
    first = sum(hop.seconds for hop in router.price(hops, replace(request, new_tokens=0)))
    total = sum(hop.seconds for hop in priced)
    return Plan(priced, first, max(0.0, total - first) / request.new_tokens)


def _between(plan: Plan, steps: int) -> list[float]:
    """Seconds there and back between each hop and the one before it, or the client."""
    rtts = [
        before.offer.rtt + hop.offer.rtt + 2 * hop.link / steps
        for before, hop in pairwise(plan.hops)
    ]
    return [plan.hops[0].offer.rtt, *rtts]


def _as_object(outlook: Outlook) -> dict[str, object]:
    request = outlook.request

    def describe(plan: Plan) -> dict[str, object]:
        return {
            "seconds": plan.seconds,
            "first_token_seconds": plan.first,
            "token_seconds": plan.each,
            "hops": [
                {
                    "blocks": str(hop.hop.blocks),
                    "peer_id": hop.hop.server.record.peer_id,
                    "address": _address(hop),
                    "seconds": hop.seconds,
                    "rtt": hop.offer.rtt,
                    "rtt_known": hop.offer.rtt_known,
                    "rtt_from_before": between,
                    "link_announced": hop.link != 0,
                    "block_seconds": hop.offer.block_seconds,
                    "block_seconds_are": hop.offer.source,
                    "queue": hop.hop.server.record.queue,
                    "queue_seconds": hop.offer.wait,
                    "has_room": hop.offer.has_room,
                }
                for hop, between in zip(plan.hops, _between(plan, request.steps), strict=True)
            ],
        }

    return {
        "name": request.model.name,
        "fingerprint": request.model.fingerprint,
        "prompt_tokens": request.prompt_tokens,
        "new_tokens": request.new_tokens,
        "route": describe(outlook.best),
        "without": {
            name: describe(plan) if plan else None for name, plan in outlook.without.items()
        },
    }


def _show(outlook: Outlook) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, request, best = Console(), outlook.request, outlook.best
    console.print(
        Text.assemble(
            (plain(str(request.model)), "bold"),
            f"  {request.prompt_tokens} tokens of prompt, {request.new_tokens} new ones  ",
            (f"{best.seconds:.2f} s", "green"),
            f": the first token after {best.first:.2f} s, then {1e3 * best.each:.1f} ms each",
        )
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("blocks")
    table.add_column("address", no_wrap=True)
    for name in ("from here", "from before", "per block", "queue", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("who")
    for hop, between in zip(best.hops, _between(best, request.steps), strict=True):
        offer, record = hop.offer, hop.hop.server.record
        table.add_row(
            str(hop.hop.blocks),
            Text(_address(hop)),
            _milliseconds(offer.rtt, sure=offer.rtt_known),
            _milliseconds(between, sure=hop is best.hops[0] or hop.link != 0),
            _milliseconds(offer.block_seconds, sure=offer.source == "measured"),
            str(record.queue) if offer.has_room else f"{record.queue}, full",
            f"{hop.seconds:.2f}",
            Text(plain(record.public_name or record.peer_id[-8:], 30)),
        )
    console.print(table)
    console.print("~: announced or assumed, not measured", style="dim")
    for hop in best.hops:
        plan = outlook.without[hop.hop.server.record.peer_id]
        console.print(
            f"without {_address(hop)}: {_compare(plan, best)}", soft_wrap=True, markup=False
        )


def _compare(plan: Plan | None, best: Plan) -> str:
    if plan is None:
        return "no route"
    hops = ", ".join(f"{hop.hop.blocks} at {_address(hop)}" for hop in plan.hops)
    return f"{plan.seconds - best.seconds:+.2f} s, by {hops}"


def _milliseconds(seconds: float, *, sure: bool) -> str:
    return f"{'' if sure else '~'}{1e3 * seconds:.1f} ms"


def _address(hop: PricedHop) -> str:
    record = hop.hop.server.record
    return plain(f"{record.host}:{record.port}")
