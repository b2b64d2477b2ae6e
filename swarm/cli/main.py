"""`swarm` and its subcommands; each is imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from swarm.cli.common import ENVIRONMENT, Parser, run_command
from swarm.errors import UsageError

_HELP = """\
Run large language models on many machines as if they were one.

commands:
  swarm demo      watch a model run in several processes, and one of them being killed
  swarm chat      talk to a model that a swarm serves
  swarm status    who serves which blocks, and whether any are missing
  swarm key new   make the secret of a private swarm
  swarm server    the same as swarm-server: serve blocks of a model
  swarm dht       the same as swarm-dht: run a bootstrap node

Each has a --help of its own. To begin: `swarm demo`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`swarm`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command("swarm", lambda: _dispatch(arguments))


def server_main(argv: Sequence[str] | None = None) -> int:
    """`swarm-server`."""
    from swarm.cli.serve import serve

    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command("swarm-server", lambda: serve("swarm-server", arguments))


def dht_main(argv: Sequence[str] | None = None) -> int:
    """`swarm-dht`."""
    from swarm.cli.serve import serve_dht

    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command("swarm-dht", lambda: serve_dht("swarm-dht", arguments))


def _dispatch(argv: Sequence[str]) -> int:
    parser = Parser("swarm", description=_HELP, epilog=ENVIRONMENT)
    parser.add_argument("command", help="one of those above")
    arguments = parser.parse_args(argv[:1] or ["--help"])
    rest = argv[1:]
    match arguments.command:
        case "demo":
            from swarm.cli.demo import demo

            return demo(rest)
        case "chat":
            from swarm.cli.chat import chat

            return chat(rest)
        case "status":
            from swarm.cli.status import status

            return status(rest)
        case "key":
            return _key(rest)
        case "server":
            from swarm.cli.serve import serve

            return serve("swarm server", rest)
        case "dht":
            from swarm.cli.serve import serve_dht

            return serve_dht("swarm dht", rest)
        case unknown:
            raise UsageError(f"there is no command '{unknown}'; see `swarm --help`")


def _key(argv: Sequence[str]) -> int:
    parser = Parser(
        "swarm key",
        description="Make the secret of a private swarm: who holds it may join, serve and read.\n\n"
        "examples:\n  swarm key new --out secret.key\n"
        "  swarm-server --swarm-key secret.key --blocks 0:20",
    )
    parser.add_argument("action", choices=["new"])
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write it there, for your eyes only"
    )
    arguments = parser.parse_args(argv)
    from swarm.identity import SwarmKey

    text = SwarmKey.generate().text()
    if arguments.out is None:
        print(text)
        return 0
    try:
        write_secret(arguments.out, text + "\n")
    except FileExistsError as error:
        raise UsageError(f"{arguments.out} exists; choose another --out") from error
    except OSError as error:
        raise UsageError(f"{arguments.out}: {error.strerror}; choose another --out") from error
    return 0


def write_secret(path: Path, text: str) -> None:
    """Where no file is yet, readable by the owner alone. Raises OSError."""
    import os

    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
