"""`swarm completion`: what a shell needs to complete our commands, their options and choices."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from swarm.cli.common import Parser

_HELP = """\
Print a script that has a shell complete `swarm`, `swarm-server` and the other commands.

examples:
  eval "$(swarm completion bash)"                           for this shell
  swarm completion bash > ~/.local/share/bash-completion/completions/swarm
  swarm completion zsh > ~/.zfunc/_swarm                    with ~/.zfunc in fpath
"""

_FILES = {"--swarm-key", "--identity", "--out", "--keys", "--history"}


def completion_parser() -> Parser:
    parser = Parser("swarm completion", _HELP)
    parser.add_argument("shell", choices=["bash", "zsh"], help="whose language")
    parser.add_argument(
        "--command",
        default="swarm",
        choices=["swarm", *_PROGRAMS],
        help="(default: swarm, and all)",
    )
    return parser


def completion(argv: Sequence[str]) -> int:
    arguments = completion_parser().parse_args(argv)
    import shtab

    wanted = [arguments.command]
    if arguments.shell == "bash" and arguments.command == "swarm":
        wanted += _PROGRAMS  # one script may serve them all; zsh wants a file for each
    for program in wanted:
        parser = _parser_of(program)
        print(shtab.complete(parser, arguments.shell, root_prefix=program.replace("-", "_")))
    return 0


def _parser_of(program: str) -> argparse.ArgumentParser:
    if program != "swarm":
        return _with_files(_PROGRAMS[program]())
    root = Parser("swarm", "Run large language models on many machines as if they were one.")
    commands = root.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, make in parsers().items():
        parser = _with_files(make())
        first = (parser.description or "").partition("\n")[0]
        commands.add_parser(name, parents=[parser], conflict_handler="resolve", help=first)
    return root


def _with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Some options take a file, and a model may be a folder."""
    import shtab

    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]  # there is no other way
        kind = None
        if _FILES.intersection(action.option_strings):
            kind = shtab.FILE
        elif action.dest in ("model", "models"):
            kind = shtab.DIRECTORY
        if kind is not None:
            setattr(action, "complete", kind)  # noqa: B010  # as shtab wants it
    return parser


def parsers() -> dict[str, Callable[[], Parser]]:
    """Every command's, by what comes after `swarm`."""
    from swarm.cli.api import api_parser
    from swarm.cli.chat import chat_parser
    from swarm.cli.demo import demo_parser
    from swarm.cli.main import key_parser
    from swarm.cli.monitor import monitor_parser
    from swarm.cli.plan import plan_parser
    from swarm.cli.route import route_parser
    from swarm.cli.serve import dht_parser, server_parser
    from swarm.cli.status import status_parser

    return {
        "demo": demo_parser,
        "chat": chat_parser,
        "status": status_parser,
        "route": route_parser,
        "plan": plan_parser,
        "key": key_parser,
        "completion": completion_parser,
        "server": server_parser,
        "dht": dht_parser,
        "monitor": monitor_parser,
        "api": api_parser,
    }


_PROGRAMS: dict[str, Callable[[], Parser]] = {
    f"swarm-{name}": lambda name=name: parsers()[name]()
    for name in ("server", "dht", "monitor", "api")
}
