"""Whose training goes on when the device has nothing more urgent to do.

Pure: jobs are advanced elsewhere, and times are arguments, in seconds of any one clock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from swarm.server.scheduler import PATIENCE, Lull

_REST = 1.0  # times as long as a unit took, for which training rests while streams decode
# By which a unit may make a stream's step late: so much of the gap between two of them, and so many
# times what a step takes here. Each of n servers takes at most an n-th of the gap, so that all of
# them together make no step later than by about one and a half gaps.
_DELAY, _OWN = 0.5, 1.5
# Passes after which a unit runs that makes a step later than that: so few that even with four
# servers in a row it is less than one step in a hundred.
_RARELY = 400
_FADE = 0.7  # of the longest unit, for each shorter one since
_LOOK = 0.001  # seconds, at least, between two looks whether a unit fits


@dataclass(slots=True)
class Job:
    """One request. `units` yields after each unit of work: True where it could as well wait."""

    client: str
    units: Generator[bool, None, Any]
    done: Callable[[Any], None]  # with the result, or an error
    seconds: float = 0.0  # of the device, so far


class Turns:
    """The client that has had least of the device goes on, and no job is left half-way for
    another: so only one at a time has memory there."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []  # in the order in which they came
        self._running: Job | None = None
        self._had: dict[str, float] = {}  # seconds of the device, of clients that have jobs
        self._rested = 0.0
        self._waited = 0
        self._narrow = False  # the slice that runs is one for when others decode
        self._units = {False: 0.0, True: 0.0}  # seconds that one may take, of such slices or not

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Who comes anew has had as much as whoever had least."""
        self._had.setdefault(job.client, min(self._had.values(), default=0.0))
        self._jobs.append(job)

    def drop(self, job: Job) -> None:
        """Forget a job, which may have ended already."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._running = None if self._running is job else self._running
            if all(other.client != job.client for other in self._jobs):
                del self._had[job.client]

    def wait(self, now: float, *, busy: bool, lull: Lull | None) -> float | None:
        """Seconds until it is to be asked again, 0: a unit may run; None: nothing is to do, or
        others go first.

        `busy`: steps of sessions wait for the device. `lull`: of those that decode these days.
        """
        if not self._jobs:
            return None
        if self._running is None:
            self._narrow = lull is not None
        unit = self._units[self._narrow]
        left, gap, takes = lull or (0.0, 0.0, 0.0)
        bearable = lull is None or 0 < gap >= unit - left
        if self._waited >= (PATIENCE if bearable else _RARELY):
            return 0.0
        if busy:
            return None
        if lull is None:
            return 0.0
        if gap > 0 and unit - left <= max(_DELAY * gap, _OWN * takes):
            return max(0.0, self._rested - now)
        return max(self._rested - now, gap / 2, _LOOK)

    def passed_over(self) -> None:
        """A pass of the device went to others while jobs were waiting."""
        self._waited += bool(self._jobs)

    def next(self) -> Job:
        """Whose unit is to run now; then `advanced` must follow."""
        if self._running is None:
            self._running = min(self._jobs, key=lambda job: self._had[job.client])
        return self._running

    def advanced(self, job: Job, begin: float, end: float, *, paused: bool) -> None:
        """A unit of it ran; `paused`: it could as well wait now."""
        job.seconds += end - begin
        self._had[job.client] += end - begin
        self._rested = end + _REST * (end - begin)
        self._units[self._narrow] = max(end - begin, _FADE * self._units[self._narrow])
        self._waited = 0
        if paused:
            self._running = None
