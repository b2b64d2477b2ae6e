"""Who causes warnings by the thousand fills no disk, and hides none of another kind."""

from __future__ import annotations

import logging

import pytest

from swarm.sparing import Sparing


def test_one_of_a_kind_each_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    log = Sparing(logging.getLogger("swarm.of.this.test"), lambda: now[0])
    for visit in range(1000):
        log.warning("refused a %s: %s", "stream", visit, code="bad_frame")
        log.warning("refused a %s: %s", "stream", visit, code="busy")
    assert caplog.messages == ["refused a stream: 0", "refused a stream: 0"]
    assert [record.__dict__["code"] for record in caplog.records] == ["bad_frame", "busy"]
    now[0] += 59.0
    log.warning("refused a %s: %s", "stream", "early", code="busy")
    now[0] += 2.0
    log.warning("refused a %s: %s", "stream", "late", code="busy")
    late = "refused a stream: late (and 1000 like it since the last such line)"
    assert caplog.messages[2:] == [late]
    now[0] += 61.0
    log.warning("refused a %s: %s", "stream", "again", code="busy")
    assert caplog.messages[3:] == ["refused a stream: again"]
