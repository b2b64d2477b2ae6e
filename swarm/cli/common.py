"""What all commands share: arguments, where peers and keys come from, errors in one sentence."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from swarm.errors import SwarmError, UsageError

if TYPE_CHECKING:
    from swarm.identity import SwarmKey

ENVIRONMENT = """\
environment:
  SWARM_PEERS   peers to join through when --peers is not given (separated by spaces or commas)
  SWARM_KEY     the swarm key, or a file that holds it, when --swarm-key is not given
  HF_ENDPOINT, HF_TOKEN, HF_HOME   where models come from, who you are there, where they are kept
"""

BAD_USAGE = 2
INTERRUPTED = 130  # what shells call a command that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the next step; help keeps its line breaks."""

    def __init__(self, prog: str, **kwargs: object) -> None:
        super().__init__(
            prog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,  # pyright: ignore[reportArgumentType]  # argparse's own, passed on
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def add_swarm_arguments(parser: argparse.ArgumentParser) -> None:
    """--peers and --swarm-key: which swarm is meant."""
    parser.add_argument(
        "--peers",
        nargs="+",
        action="extend",
        metavar="ADDR",
        help="addresses (/ip4/.../tcp/.../p2p/...) of servers or bootstrap nodes to join through; "
        "`-` reads them from standard input",
    )
    parser.add_argument(
        "--swarm-key",
        metavar="KEY|FILE",
        help="the secret of a private swarm (see `swarm key new`); better a file, as others on "
        "this machine can read command lines",
    )


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", "-v", action="store_true", help="log more, to stderr")


def peers_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """From --peers, else SWARM_PEERS. Waits for standard input if that is where they come from."""
    given: Sequence[str] = arguments.peers or [os.environ.get("SWARM_PEERS", "")]
    if "-" in given:
        given = [sys.stdin.readline() if peer == "-" else peer for peer in given]
    return tuple(peer for text in given for peer in re.split(r"[\s,]+", text) if peer)


def need_peers(arguments: argparse.Namespace) -> tuple[str, ...]:
    """As `peers_of`. Raises UsageError if there are none."""
    if peers := peers_of(arguments):
        return peers
    raise UsageError(
        "which swarm? give --peers or set SWARM_PEERS to the address that a server printed, "
        "or start one with `swarm-server`"
    )


def swarm_key_of(arguments: argparse.Namespace) -> SwarmKey | None:
    """From --swarm-key, else SWARM_KEY. Raises UsageError."""
    text = arguments.swarm_key or os.environ.get("SWARM_KEY")
    if not text:
        return None
    from swarm.identity import SwarmKey

    return SwarmKey.parse(text) if text.startswith("swarm-key-") else SwarmKey.load(text)


def start_logging(verbose: bool) -> None:
    """Warnings, one line each, to stderr; everything of ours if `verbose`."""
    logging.basicConfig(
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if verbose else logging.WARNING,
        force=True,
    )
    logging.getLogger("swarm").setLevel(logging.DEBUG if verbose else logging.WARNING)


@contextmanager
def quick_imports() -> Generator[None]:
    """Around imports of torch and transformers, before anything was started.

    Modules that load make no garbage: not looking for it saves a seventh of the time, and never
    looking at them again another second at the end. Ctrl-C ends the process at once, because torch
    aborts with a page of stack traces when an exception breaks its import.
    """
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED)) if ours else None
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if ours:
            signal.signal(signal.SIGINT, before)


def run_command(program: str, command: Callable[[], int]) -> int:
    """The exit status of `command`, with what people should know on stderr, never a traceback."""
    try:
        return command()
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return BAD_USAGE
    except SwarmError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `swarm status | head`
        sys.stderr.close()
        return 1
