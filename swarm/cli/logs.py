"""Logs on stderr: lines for people, or an object per line for programs. No tensors, no secrets.

What is logged is told by messages alone: no frames' variables, no prompts, no keys.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from swarm.cli.screen import plain

FORMATS = ("text", "json")
_MOST = 2000  # characters of one message
_USUAL = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """Strangers' words in a message cannot move the cursor or begin a line of their own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = plain(record.message, _MOST)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """`time` (ISO 8601, UTC), `level`, `logger`, `message`; `error` and `traceback` if there is
    one; and the fields that a message brings (`extra`), such as the `code` of a refusal."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MOST],
        }
        if record.exc_info and record.exc_info[0] is not None:
            told["error"] = record.exc_info[0].__name__
            told["traceback"] = self.formatException(record.exc_info)
        extra = {name: value for name, value in vars(record).items() if name not in _USUAL}
        return json.dumps({**extra, **told}, default=str)


def start_logging(verbose: bool, quiet: int = logging.WARNING, style: str = "text") -> None:
    """One line each to stderr: warnings (of ours from level `quiet` on), or all if `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.getLogger("swarm").setLevel(logging.DEBUG if verbose else quiet)
