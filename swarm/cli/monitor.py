"""`swarm-monitor`: a web page that tells whether models are healthy, and who keeps them alive."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path

from swarm.cli.common import (
    Parser,
    joining_parser,
    need_peers,
    own_names,
    parse_joining,
    whole,
)

PORT = 8080

_HELP = """\
Show in a browser whether models are healthy, who serves which blocks, and what is needed most.

examples:
  swarm-monitor --peers /ip4/.../p2p/Qm...                  all models, at http://127.0.0.1:8080
  swarm-monitor Qwen/Qwen3-8B --host 0.0.0.0 --port 80      one model, for everybody
  SWARM_PEERS=/ip4/.../p2p/Qm... swarm-monitor --history ""    and forget it all at the end

It only reads, and so does everybody who opens its page. For programs there are /api/v1/state,
/api/v1/models/NAME, /metrics (Prometheus) and /healthz. docs/monitor.md has the rest.
"""


def monitor_parser() -> Parser:
    parser = joining_parser("swarm-monitor", _HELP)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="watch only these (default: all there are)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="IP address to listen on (default: %(default)s; 0.0.0.0 lets everybody read)",
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65_535),
        metavar="N",
        default=PORT,
        help="to listen on (default: %(default)s; 0: any free)",
    )
    parser.add_argument(
        "--history",
        metavar="FILE",
        help="where the last day and the served block-hours are kept; empty: nowhere (default: "
        f"{_folder()}/monitor-….sqlite, another one for other --peers)",
    )
    parser.add_argument(
        "--join-peers",
        nargs="+",
        metavar="ADDR",
        help="peers that the page tells people to join through (default: those of --peers)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which a proxy in front calls us; in a private swarm only this machine's "
        "own are answered on 127.0.0.1",
    )
    parser.add_argument(
        "--no-ask",
        dest="ask",
        action="store_false",
        help="believe what servers announce; ask none of them how it is",
    )
    return parser


def monitor(argv: Sequence[str]) -> int:
    """`swarm-monitor`."""
    arguments = parse_joining(monitor_parser(), argv)
    peers = need_peers(arguments.peers)
    from swarm.dht.lean import without_torch

    with without_torch():
        from swarm.dht.node import DhtNode
    from swarm.identity import Access, Identity
    from swarm.listening import serve
    from swarm.loop import run
    from swarm.monitor.app import make_app
    from swarm.monitor.ledger import Ledger
    from swarm.monitor.picture import Joining
    from swarm.monitor.pulse import Pulse
    from swarm.monitor.watcher import Watcher
    from swarm.rpc import RpcTransport

    history = history_file(arguments.history, peers)
    hosts = hosts_of(arguments)

    async def work() -> None:
        access = Access(Identity.ephemeral(), arguments.swarm_key)
        joining = Joining(tuple(arguments.join_peers or peers), access.swarm_key is not None)
        async with AsyncExitStack() as stack:
            ledger = Ledger(history)
            stack.callback(ledger.close)
            dht = await DhtNode.create(
                access.identity, peers, key=access.swarm_key, client_mode=True
            )
            stack.push_async_callback(dht.close)
            transport = RpcTransport()
            stack.push_async_callback(transport.close)
            pulse = Pulse(transport, access, dht.now) if arguments.ask else None
            watcher = Watcher(dht, pulse, ledger, joining, arguments.models)
            async with watcher.running():
                app = make_app(watcher, hosts)
                await serve(app, arguments.host, arguments.port, _tell)

    run(work())
    return 0


def hosts_of(arguments: Namespace) -> tuple[str, ...] | None:
    """By which we may be called; None: by any. A public swarm's page is there for everybody."""
    return own_names(arguments.host, arguments.allow_host) if arguments.swarm_key else None


def history_file(given: str | None, peers: Sequence[str]) -> Path | None:
    """As given, else one that is this swarm's own, as far as its peers tell: what is in it is shown
    as the swarm's even when nobody serves it any more. None: it is not wanted."""
    if given is not None:
        return Path(given).expanduser() if given else None
    names = sorted(peer.rpartition("/")[2] for peer in peers)
    swarm = sha256(" ".join(names).encode()).hexdigest()[:8]
    return _folder() / f"monitor-{swarm}.sqlite"


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "swarm"


def _tell(line: str) -> None:
    print(line, flush=True)
