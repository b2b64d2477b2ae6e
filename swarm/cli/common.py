"""What the commands share: their parser, which swarm they join, imports and logging."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import NoReturn, cast

from swarm import tracing
from swarm.cli import INTERRUPTED, lean
from swarm.cli.logs import FORMATS, start_logging
from swarm.errors import UsageError
from swarm.joining import initial_peers_of, swarm_key_of

ENVIRONMENT = """\
environment:
  SWARM_PEERS   peers to join through when --peers is not given (separated by spaces or commas)
  SWARM_KEY     the swarm key, or a file that holds it, when --swarm-key is not given
  HF_ENDPOINT, HF_TOKEN, HF_HOME   where models come from, who you are there, where they are kept
  OTEL_EXPORTER_OTLP_ENDPOINT      where traces go (docs/running/watching.md); without it nowhere
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the next step; help keeps its line breaks."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def joining_parser(prog: str, description: str) -> Parser:
    """Of a command that joins a swarm: --peers, --swarm-key, --verbose."""
    parser = Parser(prog, description, ENVIRONMENT)
    which = parser.add_argument_group("which swarm")
    which.add_argument(
        "--peers",
        nargs="+",
        action="extend",
        metavar="ADDR",
        help="addresses (/ip4/.../tcp/.../p2p/...) of servers or bootstrap nodes to join through; "
        "`-` reads them from standard input",
    )
    which.add_argument(
        "--swarm-key",
        metavar="KEY|FILE",
        help="the secret of a private swarm (see `swarm key new`); better a file, as others on "
        "this machine can read command lines",
    )
    add_verbose(parser)
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default="text",
        help="of what is logged: lines for people (the default), or an object per line",
    )
    return parser


def add_model(parser: Parser, what: str) -> None:
    """MODEL and where it comes from: what `Checkpoint.open` wants to know."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=what)
    parser.add_argument("--model-name", metavar="NAME", help="its name in the swarm, for a folder")
    parser.add_argument("--revision", help="branch, tag or commit of a repo")
    parser.add_argument("--token", help="for gated or private repos (default: HF_TOKEN)")


def add_json(parser: Parser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="for programs: docs/cli.md names the keys, which stay"
    )


def add_verbose(parser: Parser) -> None:
    parser.add_argument("--verbose", "-v", action="store_true", help="log more, to stderr")


def parse_joining(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `swarm_key` as a SwarmKey or None; starts logging, and tracing if the
    environment asks for it. Raises UsageError."""
    arguments = parser.parse_args(argv)
    arguments.swarm_key = swarm_key_of(arguments.swarm_key)
    start_logging(arguments.verbose, style=arguments.log_format)
    tracing.start(parser.prog)
    return arguments


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {low} to {high}")
        return int(text)

    return convert


def memory(text: str) -> int:
    """The type of an argument such as `512MiB`, `2GB` or plain bytes."""
    found = re.fullmatch(
        r"(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE | re.ASCII
    )
    size = 0
    if found:
        power = " KMGT".index(found[2].upper() or " ")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if not 0 < size < 1 << 50:
        raise argparse.ArgumentTypeError(f"'{text}' is no amount of memory, such as 2GB or 512MiB")
    return size


def read_peers(given: Sequence[str] | None) -> tuple[str, ...]:
    """From --peers or SWARM_PEERS; waits for standard input if that is where they come from.

    Raises UsageError if --peers is there and empty: nobody means to start a swarm of their own so.
    """
    texts = [sys.stdin.readline() if text == "-" else text for text in given or ()]
    peers = initial_peers_of(texts)
    if given and not peers:
        raise UsageError("--peers is empty: give the address that a server printed")
    return peers


def need_peers(given: Sequence[str] | None) -> tuple[str, ...]:
    """As `read_peers`. Raises UsageError if there are none."""
    if peers := read_peers(given):
        return peers
    raise UsageError(
        "which swarm? give --peers or set SWARM_PEERS to the address that a server printed, "
        "or start one with `swarm-server`"
    )


def own_names(host: str, others: Sequence[str]) -> tuple[str, ...] | None:
    """By which who listens there may be called: this machine's, and `others`. None: by any, as it
    is not loopback. What is there for this machine alone, web pages could otherwise read by a name
    of theirs that points here."""
    loopback = host == "localhost"
    with suppress(ValueError):
        loopback = ipaddress.ip_address(host).is_loopback
    return ("127.0.0.1", "localhost", "::1", host, *others) if loopback else None


@contextmanager
def quick_imports(*, models: bool = True) -> Generator[None]:
    """Around imports of torch and, unless without `models`, of transformers, before anything was
    started.

    Modules that load make no garbage: not looking for it saves a seventh of the time, and never
    looking at them again another second at the end. Transformers wants scipy for detecting objects
    in pictures alone: without it 20 MB and a third of a second less. Ctrl-C ends the process at
    once, because torch aborts with a page of stack traces when an exception breaks its import.
    """
    # Read when torch loads its OpenMP. By default its threads wait for each other in busy loops:
    # with two of them, on two cores that others use too, a pass took five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # How many compiled products oneDNN and what is between it and torch keep, of which each takes a
    # third of a megabyte: passes have so many widths that the usual 1,024 cost 460 MB in time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED)) if ours else None
    modules = cast(dict[str, ModuleType | None], sys.modules)
    gc.disable()
    try:
        if "transformers" not in modules:  # else it has looked for all this already
            modules.setdefault("scipy", None)  # to Python: there is none
            lean.defer_compiler()
            if models:
                lean.forgo_distributed()
        yield
    finally:
        gc.freeze()
        gc.enable()
        if "scipy" in modules and modules["scipy"] is None:
            del modules["scipy"]
        if ours:
            signal.signal(signal.SIGINT, before)
