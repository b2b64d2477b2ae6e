"""Logs are for people, or an object per line for programs; strangers write into neither."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from swarm.cli.logs import JsonFormatter, TextFormatter

EVIL = "no such session\x1b[2J\r\n12:00:00 ERROR swarm: all is lost\u202e"


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, io.StringIO, logging.StreamHandler[io.StringIO]]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("swarm.test")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, stream, handler
    logger.removeHandler(handler)
    logger.propagate = True


Lines = tuple[logging.Logger, io.StringIO, "logging.StreamHandler[io.StringIO]"]


def test_an_object_per_line_with_named_fields(lines: Lines) -> None:
    logger, stream, handler = lines
    handler.setFormatter(JsonFormatter())
    logger.warning("refused a %s: %s", "stream", EVIL, extra={"code": "busy"})
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("a defect")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert set(first) == {"time", "level", "logger", "message", "code"}
    assert (first["level"], first["logger"], first["code"]) == ("warning", "swarm.test", "busy")
    assert first["message"] == f"refused a stream: {EVIL}"
    assert "\x1b" not in stream.getvalue()
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert second["error"] == "ValueError"
    assert "test_logs.py" in second["traceback"]


def test_what_is_no_json_and_what_is_long_is_told_all_the_same(lines: Lines) -> None:
    logger, stream, handler = lines
    handler.setFormatter(JsonFormatter())
    logger.warning("x" * 100_000, extra={"thing": object(), "message_id": 1})
    told = json.loads(stream.getvalue())
    assert told["message"] == "x" * 2000
    assert told["message_id"] == 1


def test_an_extra_field_cannot_pose_as_ours(lines: Lines) -> None:
    logger, stream, handler = lines
    handler.setFormatter(JsonFormatter())
    logger.warning("here", extra={"level": "none", "time": "never", "logger": "me"})
    told = json.loads(stream.getvalue())
    assert (told["level"], told["logger"]) == ("warning", "swarm.test")
    assert told["time"] != "never"


def test_strangers_begin_no_line_of_their_own(lines: Lines) -> None:
    logger, stream, handler = lines
    handler.setFormatter(TextFormatter())
    logger.warning("refused: %s", EVIL)
    [line] = stream.getvalue().splitlines()
    assert line.isprintable()
    assert "WARNING swarm.test: refused: no such session" in line


def test_our_own_tracebacks_keep_their_lines(lines: Lines) -> None:
    logger, stream, handler = lines
    handler.setFormatter(TextFormatter())
    try:
        raise ValueError
    except ValueError:
        logger.exception("a defect")
    assert len(stream.getvalue().splitlines()) > 3
    assert sys.exc_info() == (None, None, None)
