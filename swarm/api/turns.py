"""Whose turn it is: places for streams, given round robin to those who wait."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from swarm.api.keys import Caller
from swarm.web import HttpProblem


class Turns:
    """At most `places` streams at a time. Callers who wait take turns, and each waits in line.

    A request of several streams begins when there is room for all of them; nobody overtakes it.
    """

    def __init__(self, places: int, waiting: int, patience: float) -> None:
        self.taken = 0
        self.places = places
        self._most_waiting = waiting  # of one caller
        self._patience = patience  # seconds
        self._lines: OrderedDict[Caller, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    @asynccontextmanager
    async def turn(self, caller: Caller, count: int) -> AsyncGenerator[None]:
        """Inside, `count` places are the caller's. Raises HttpProblem after `patience`."""
        if count > self.places:
            raise HttpProblem(400, f"at most {self.places} streams can run here", param="n")
        caller.streams += count
        try:
            await self._wait(caller, count)
            try:
                yield
            finally:
                self.taken -= count
                self._next()
        finally:
            caller.streams -= count

    async def _wait(self, caller: Caller, count: int) -> None:
        line = self._lines.setdefault(caller, deque())
        if len(line) >= self._most_waiting:
            raise self._busy("too many of your requests are waiting")
        place = count, asyncio.get_running_loop().create_future()
        line.append(place)
        self._next()
        try:
            async with asyncio.timeout(self._patience):
                await place[1]
        except BaseException as error:
            if place[1].done() and not place[1].cancelled():
                self.taken -= count  # it came too late
            elif place in line:
                line.remove(place)
                if not line:
                    del self._lines[caller]
            self._next()
            if isinstance(error, TimeoutError):
                raise self._busy(f"no place was free within {self._patience:g} s") from None
            raise

    def _next(self) -> None:
        while self._lines:
            caller, line = next(iter(self._lines.items()))
            count, place = line[0]
            if self.taken + count > self.places:
                return
            line.popleft()
            if line:
                self._lines.move_to_end(caller)
            else:
                del self._lines[caller]
            if not place.done():
                self.taken += count
                place.set_result(None)

    def _busy(self, why: str) -> HttpProblem:
        message = f"{why}: {self.taken} streams are open, {self.waiting} wait; try again soon"
        return HttpProblem(
            429, message, kind="requests", code="rate_limit_exceeded", retry_after=5.0
        )
