"""`swarm` and its subcommands; each is imported when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from swarm.cli.common import ENVIRONMENT, Parser, add_json
from swarm.errors import UsageError

_HELP = """\
Run large language models on many machines as if they were one.

commands:
  swarm demo      watch a model run in several processes, and one of them being killed
  swarm chat      talk to a model that a swarm serves
  swarm status    who serves which blocks, and whether any are missing
  swarm route     which servers a request would go through from here, and why
  swarm plan      how many machines a model wants, how quick they are, what that costs
  swarm key new   make the secret of a private swarm
  swarm server    the same as swarm-server: serve blocks of a model
  swarm dht       the same as swarm-dht: run a bootstrap node
  swarm monitor   the same as swarm-monitor: show all that in a browser
  swarm api       the same as swarm-api: serve OpenAI's API, and a chat page

Each has a --help of its own. To begin: `swarm demo`. For Tab to complete all that:
`eval "$(swarm completion bash)"`.
"""

_KEY_HELP = """\
Make the secret of a private swarm: who holds it may join, serve and read. Or make the identity of a
server or bootstrap node before it runs, and tell its peer id, which is in its address.

examples:
  swarm key new --out secret.key
  swarm-server --swarm-key secret.key --blocks 0:20
  swarm key identity --out dht.identity       prints Qm...; others join by .../p2p/Qm...
"""


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with; its exit status."""
    parser = Parser("swarm", _HELP, ENVIRONMENT)
    parser.add_argument("command", help="one of those above")
    command, rest = parser.parse_args(argv[:1] or ["--help"]).command, argv[1:]
    match command:
        case "demo":
            from swarm.cli.demo import demo

            return demo(rest)
        case "chat":
            from swarm.cli.chat import chat

            return chat(rest)
        case "status":
            from swarm.cli.status import status

            return status(rest)
        case "route":
            from swarm.cli.route import route

            return route(rest)
        case "plan":
            from swarm.cli.plan import plan

            return plan(rest)
        case "completion":
            from swarm.cli.completion import completion

            return completion(rest)
        case "key":
            return _key(rest)
        case "server":
            from swarm.cli.serve import serve

            return serve(rest)
        case "dht":
            from swarm.cli.serve import serve_dht

            return serve_dht(rest)
        case "api":
            from swarm.cli.api import api

            return api(rest)
        case "monitor":
            from swarm.cli.monitor import monitor

            return monitor(rest)
        case _:
            raise UsageError(f"there is no command '{command}'; see `swarm --help`")


def key_parser() -> Parser:
    parser = Parser("swarm key", _KEY_HELP)
    parser.add_argument(
        "action",
        choices=["new", "identity"],
        help="new: a swarm's secret; identity: of a node, unless it is in --out already",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write it there, for your eyes only"
    )
    add_json(parser)
    return parser


def _key(argv: Sequence[str]) -> int:
    arguments = key_parser().parse_args(argv)
    if arguments.action == "identity":
        return _identity(arguments.out, as_json=arguments.json)
    from swarm.identity import SwarmKey, write_secret

    text = SwarmKey.generate().text()
    where = None if arguments.out is None else str(arguments.out)
    told = json.dumps({"key": None if where else text, "file": where})
    if arguments.out is None:
        print(told if arguments.json else text)
        return 0
    try:
        write_secret(arguments.out, f"{text}\n".encode())
    except OSError as error:
        raise UsageError(f"{arguments.out}: {error.strerror}; choose another --out") from error
    if arguments.json:
        print(told)
    return 0


def _identity(path: Path | None, *, as_json: bool) -> int:
    if path is None:
        raise UsageError("where to? give --out FILE")
    from swarm.identity import Identity

    peer_id = Identity.load_or_create(path).peer_id
    print(json.dumps({"peer_id": peer_id, "file": str(path)}) if as_json else peer_id)
    return 0
