"""The console commands: `swarm`, `swarm-server` and the others, and how each of them ends.

Nothing is imported here before somebody listens for Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130  # what shells call a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """`swarm`."""
    return _run("swarm", [], argv)


def server_main(argv: Sequence[str] | None = None) -> int:
    """`swarm-server`."""
    return _run("swarm-server", ["server"], argv)


def dht_main(argv: Sequence[str] | None = None) -> int:
    """`swarm-dht`."""
    return _run("swarm-dht", ["dht"], argv)


def monitor_main(argv: Sequence[str] | None = None) -> int:
    """`swarm-monitor`."""
    return _run("swarm-monitor", ["monitor"], argv)


def api_main(argv: Sequence[str] | None = None) -> int:
    """`swarm-api`."""
    return _run("swarm-api", ["api"], argv)


def _run(program: str, command: Sequence[str], argv: Sequence[str] | None) -> int:
    """The exit status, with what people should know on stderr, never a traceback."""
    try:
        from swarm.cli.main import dispatch
        from swarm.cli.screen import plain
        from swarm.errors import SwarmError, UsageError

        try:
            return dispatch([*command, *(sys.argv[1:] if argv is None else argv)])
        except SwarmError as error:
            said = plain(str(error), 10_000, lines=True)  # perhaps in a stranger's words
            print(f"{program}: {said}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `swarm status | head`
        sys.stderr.close()
        return 1
