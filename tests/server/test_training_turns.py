"""Training takes what sessions leave of the device, and clients take it in turns."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from swarm.server.scheduler import PATIENCE
from swarm.server.training_turns import Job, Turns


def units(count: int = 9) -> Generator[bool]:
    for _ in range(count):
        yield False


def job(client: str = "a") -> Job:
    return Job(client, units(), lambda _: None)


def test_it_waits_for_steps_but_not_for_ever() -> None:
    turns = Turns()
    assert turns.wait(0.0, busy=False, streaming=False) is None  # nothing to do
    turns.add(job())
    assert turns.wait(0.0, busy=False, streaming=False) == 0
    for _ in range(PATIENCE):
        assert turns.wait(0.0, busy=True, streaming=False) is None
        turns.passed_over()
    assert turns.wait(0.0, busy=True, streaming=False) == 0
    turns.advanced(turns.next(), 0.0, 1.0, paused=False)
    assert turns.wait(1.0, busy=True, streaming=False) is None


def test_it_rests_as_long_as_it_took_while_somebody_decodes() -> None:
    turns = Turns()
    turns.add(job())
    turns.advanced(turns.next(), 10.0, 10.5, paused=False)
    assert turns.wait(10.5, busy=False, streaming=True) == pytest.approx(0.5)
    assert turns.wait(10.5, busy=False, streaming=False) == 0
    assert turns.wait(11.1, busy=False, streaming=True) == 0


def test_a_client_with_many_requests_gets_no_more_than_one_with_few() -> None:
    turns = Turns()
    for client in "aaaab":
        turns.add(job(client))
    had = {"a": 0, "b": 0}
    for unit in range(40):
        now = turns.next()
        had[now.client] += 1
        turns.advanced(now, unit, unit + 1, paused=True)
    assert had == {"a": 20, "b": 20}


def test_nobody_is_interrupted_half_way() -> None:
    turns = Turns()
    turns.add(first := job("a"))
    assert turns.next() is first
    turns.advanced(first, 0.0, 1.0, paused=False)
    turns.add(second := job("b"))  # who comes anew is no worse off, and no better
    assert turns.next() is first
    turns.advanced(first, 1.0, 2.0, paused=True)
    assert turns.next() is second


def test_jobs_that_are_dropped_leave_nothing() -> None:
    turns = Turns()
    turns.add(first := job("a"))
    turns.add(second := job("b"))
    turns.next()
    turns.drop(first)
    turns.drop(first)
    assert turns.next() is second
    turns.drop(second)
    assert len(turns) == 0
    assert turns.wait(0.0, busy=False, streaming=False) is None
