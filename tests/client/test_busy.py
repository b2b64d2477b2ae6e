"""Servers without room: the client goes elsewhere at once, or waits for one, but not for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from swarm.client.peers import PeerBook
from swarm.errors import ErrorCode, NoRoute, RemoteProtocolError
from tests.client.twins import THIRDS, House
from tests.inprocess import STEADY, Server


@pytest.fixture
def two() -> Iterator[House]:
    """Two servers for each span; the first of each is asked first."""
    with House(spans=THIRDS * 2) as house:
        yield house


def set_room(server: Server, sessions: int) -> None:
    server.handler._admission._max_sessions = sessions


def test_who_has_no_room_is_passed_over_at_once(two: House) -> None:
    set_room(two.servers[1], 0)
    with two.twin() as twin:
        twin.step(5)
        twin.step()
        assert twin.serving(1) is two.servers[4]
    ((peer_id, error),) = two.swarm.router.failures
    assert peer_id == two.servers[1].peer_id
    assert isinstance(error, RemoteProtocolError)
    assert error.code is ErrorCode.BUSY
    assert error.retry_after


def test_who_runs_out_of_room_in_mid_session_is_replaced(two: House) -> None:
    with two.twin() as twin:
        twin.step(5)
        busy = twin.serving(1)

        async def full(work: Any) -> Any:
            raise RemoteProtocolError(ErrorCode.BUSY, "no page came free", retry_after=1.0)

        busy.executor.submit = full  # type: ignore[method-assign]
        try:
            twin.step()
        finally:
            del busy.executor.submit  # type: ignore[attr-defined]
        twin.step(3)
        assert twin.serving(1) is two.servers[4]
        assert twin.session.recoveries == 1


def test_if_there_is_nobody_else_the_client_waits() -> None:
    with House(spans=THIRDS) as house:
        set_room(house.servers[1], 0)
        router, looks = house.swarm.router, 0

        async def refresh() -> None:
            nonlocal looks
            looks += 1
            router.banned.clear()  # the time that the server asked for is over
            if looks == 3:
                set_room(house.servers[1], 10)

        router.refresh = refresh  # type: ignore[method-assign]
        with house.twin() as twin:
            twin.step(5)
            twin.step()
        assert looks >= 3


def test_waiting_has_an_end() -> None:
    with House(spans=THIRDS) as house:
        set_room(house.servers[1], 0)
        timeouts = replace(STEADY, recovery=0.3)
        with house.twin(timeouts=timeouts) as twin, pytest.raises(NoRoute, match="2:4"):
            twin.step(5)


def test_a_busy_peer_is_left_alone_for_as_long_as_it_says_and_longer_each_time() -> None:
    book = PeerBook(random.Random(0))
    book.busy("p", 100.0, 2.0)
    assert "p" in book.banned(101.99)
    assert "p" not in book.banned(100.0 + 2.0 * 1.25)
    for _ in range(3):  # or one that always says "soon" would be asked for ever
        book.busy("p", 100.0, 2.0)
    assert "p" in book.banned(107.99)
    assert "p" not in book.banned(100.0 + 8.0 * 1.25)
    book.worked("p", 1, 0.1)
    book.busy("p", 100.0, 2.0)
    assert "p" not in book.banned(100.0 + 2.0 * 1.25)
    assert book.failures("p") == 0
    book.busy("q", 100.0, None)
    assert "q" in book.banned(100.99)
