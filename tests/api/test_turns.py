"""Places go round: who asks much waits behind their own, not others behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from swarm.api.keys import Budget, Caller
from swarm.api.turns import Turns
from swarm.web import HttpProblem


def caller() -> Caller:
    return Caller(None, Budget(None, 0.0))


class Line:
    """Requests that say when they begin, and end when they are told."""

    def __init__(self, places: int, waiting: int = 100, patience: float = 20.0) -> None:
        self.turns = Turns(places, waiting, patience)
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, who: Caller, name: str, count: int = 1) -> asyncio.Task[None]:
        self._ends[name] = asyncio.Event()
        task = self._tasks[name] = asyncio.create_task(self._request(who, name, count))
        await self.settle()
        return task

    async def _request(self, who: Caller, name: str, count: int) -> None:
        async with self.turns.turn(who, count):
            self.begun.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def test_callers_take_turns() -> None:
    async def test() -> None:
        line, alice, bob = Line(1), caller(), caller()
        for name in ("a1", "a2", "a3", "a4"):
            await line.ask(alice, name)
        await line.ask(bob, "b1")
        await line.ask(bob, "b2")
        assert line.begun == ["a1"]
        for name in ("a1", "a2", "b1", "a3", "b2", "a4"):
            await line.end(name)
        assert line.begun == ["a1", "a2", "b1", "a3", "b2", "a4"]
        assert (line.turns.taken, line.turns.waiting, alice.streams) == (0, 0, 0)

    run(test())


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    async def test() -> None:
        line, alice, bob = Line(3), caller(), caller()
        await line.ask(alice, "a1", 2)
        await line.ask(bob, "b1", 3)
        await line.ask(alice, "a2", 1)
        assert line.begun == ["a1"]
        await line.end("a1")
        assert line.begun == ["a1", "b1"]
        await line.end("b1")
        await line.end("a2")

    run(test())


def test_whoever_leaves_gives_the_place_back() -> None:
    async def test() -> None:
        line, alice, bob = Line(1), caller(), caller()
        first = await line.ask(alice, "a1")
        waiting = await line.ask(alice, "a2")
        await line.ask(bob, "b1")
        waiting.cancel()
        first.cancel()
        await line.settle()
        assert line.begun == ["a1", "b1"]
        await line.end("b1")
        assert (line.turns.taken, alice.streams) == (0, 0)

    run(test())


def test_who_is_granted_a_place_and_leaves_at_once_gives_it_back() -> None:
    async def test() -> None:
        line, alice = Line(1), caller()
        await line.ask(alice, "a1")
        waiting = await line.ask(alice, "a2")
        line._ends["a1"].set()
        await line._tasks["a1"]  # the place is granted, but not yet taken
        waiting.cancel()
        await line.settle()
        assert line.turns.taken == 0
        await line.ask(alice, "a3")
        await line.end("a3")

    run(test())


def test_nobody_waits_for_ever() -> None:
    async def test() -> None:
        line = Line(1, patience=0.01)
        await line.ask(caller(), "a1")
        with pytest.raises(HttpProblem, match="no place was free") as caught:
            await (await line.ask(caller(), "b1"))
        assert caught.value.status == 429
        assert caught.value.retry_after
        assert line.turns.waiting == 0
        await line.end("a1")

    run(test())


def test_one_caller_cannot_fill_the_line() -> None:
    async def test() -> None:
        line, alice, bob = Line(1, waiting=2), caller(), caller()
        for name in ("a1", "a2", "a3"):
            await line.ask(alice, name)
        with pytest.raises(HttpProblem, match="too many of your requests"):
            await (await line.ask(alice, "a4"))
        await line.ask(bob, "b1")
        for name in ("a1", "a2", "b1", "a3"):
            await line.end(name)

    run(test())


def test_more_than_there_is_room_for_is_refused_at_once() -> None:
    async def test() -> None:
        with pytest.raises(HttpProblem, match="at most 1 streams"):
            await (await Line(1).ask(caller(), "a1", 2))

    run(test())
