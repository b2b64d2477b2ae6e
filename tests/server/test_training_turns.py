"""Training takes what sessions leave of the device, and clients take it in turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator

import pytest

from swarm.server.scheduler import PATIENCE, Lull, Scheduler, Waiting
from swarm.server.training_turns import Job, Turns


def units(count: int = 9) -> Generator[bool]:
    for _ in range(count):
        yield False


def job(client: str = "a") -> Job:
    return Job(client, units(), lambda _: None)


def run(turns: Turns, begin: float, seconds: float, *, paused: bool = False) -> None:
    turns.advanced(turns.next(), begin, begin + seconds, paused=paused)


def test_it_waits_for_steps_but_not_for_ever() -> None:
    turns = Turns()
    assert turns.wait(0.0, busy=False, lull=None) is None  # nothing to do
    turns.add(job())
    assert turns.wait(0.0, busy=False, lull=None) == 0
    for _ in range(PATIENCE):
        assert turns.wait(0.0, busy=True, lull=None) is None
        turns.passed_over()
    assert turns.wait(0.0, busy=True, lull=None) == 0
    run(turns, 0.0, 1.0)
    assert turns.wait(1.0, busy=True, lull=None) is None


def test_it_runs_between_two_steps_and_rests_as_long_as_that_took() -> None:
    turns, gap = Turns(), 1.0
    turns.add(job())
    assert turns.wait(9.0, busy=False, lull=Lull(0.9, gap)) == 0
    run(turns, 9.0, 0.6)
    assert turns.wait(9.6, busy=False, lull=None) == 0  # nobody decodes any more
    assert turns.wait(9.6, busy=False, lull=Lull(0.3, gap)) == pytest.approx(0.6)
    assert turns.wait(10.3, busy=False, lull=Lull(0.9, gap)) == 0
    assert turns.wait(10.3, busy=False, lull=Lull(0.11, gap)) == 0  # a little late at most
    late = turns.wait(10.3, busy=False, lull=Lull(0.09, gap))
    assert late is not None
    assert late > 0


def test_what_never_fits_makes_steps_late_but_rarely() -> None:
    turns, lull = Turns(), Lull(1.0, 1.0)
    turns.add(job())
    now = 0.0
    ran: list[int] = []
    for step in range(5000):
        if turns.wait(now, busy=False, lull=lull) == 0:
            ran.append(step)
            run(turns, now, 3.0)
            now += 3.0
        turns.passed_over()
        now += 1.0
    assert 10 <= len(ran) <= 5000 // 300


class Device:
    """A server's, with a trainer who always has more, and in a clock that is told."""

    def __init__(self, units: list[float]) -> None:
        self.scheduler, self.turns = Scheduler(512), Turns()
        self.turns.add(job())
        self._units = itertools.cycle(units)
        self.now = self.trained = 0.0

    def step(self, arrives: float, takes: float) -> float:
        """When a step of a stream is through; until it arrived there was training."""
        while self.now < arrives:
            lull = self.scheduler.lull(self.now)
            wait = self.turns.wait(self.now, busy=False, lull=lull)
            assert wait is not None
            if wait > 0:  # or until the step comes
                self.now = min(arrives, self.now + wait)
                continue
            unit = next(self._units)
            self.turns.advanced(self.turns.next(), self.now, self.now + unit, paused=False)
            self.scheduler.disturbed()
            self.trained += unit
            self.now += unit
        self.scheduler.add(Waiting(0, "reader", 1, 1))
        self.scheduler.next_pass(self.now)
        self.turns.passed_over()
        begin, self.now = self.now, self.now + takes
        self.scheduler.passed(begin, self.now)
        return self.now


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("longest", [0.5, 2, 4, 8, 16, 60, 400])
def test_a_stream_through_servers_that_train_is_hardly_late(servers: int, longest: float) -> None:
    """p99 within thrice the quiet median, whatever a unit takes, in milliseconds."""
    dice = random.Random(3)
    devices = [Device([longest / 2e3] * 4 + [longest / 1e3] * 4) for _ in range(servers)]
    takes, now, gaps = 3.6e-3 / servers, 1.0, list[float]()
    for _ in range(3000):
        begin = now
        for device in devices:
            now = device.step(now + dice.uniform(2e-4, 4e-4), dice.uniform(0.9, 1.1) * takes)
        now += dice.uniform(4e-4, 6e-4)  # head, and the next token's embedding
        gaps.append(now - begin)
    quiet = servers * (3e-4 + takes) + 5e-4
    assert sorted(gaps)[int(0.99 * len(gaps))] <= 2.5 * quiet
    share = sum(device.trained for device in devices) / servers / now
    assert share > (0.15 if longest <= 4 else 0.005)


def test_how_long_a_wide_slice_takes_says_nothing_of_a_narrow_one() -> None:
    """It goes on rarely; the next one is tried at once."""
    other, lull = Turns(), Lull(1.0, 1.0)
    other.add(job())
    assert other.wait(0.0, busy=False, lull=None) == 0
    run(other, 0.0, 3.0)
    assert other.wait(9.0, busy=False, lull=lull) != 0
    run(other, 9.0, 3.0, paused=True)
    assert other.wait(20.0, busy=False, lull=lull) == 0


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
    assert turns.wait(0.0, busy=False, lull=None) is None
