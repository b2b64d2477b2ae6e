"""Promises of memory are kept in order, whatever was taken comes back, and nobody waits unseen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.server.memory import Admission

BUDGET, OVERCOMMIT, SESSIONS = 100, 1.5, 6


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 120), st.booleans()), max_size=40))
def test_promises_are_what_a_queue_and_a_sum_would_give(
    calls: list[tuple[int, int, bool]],
) -> None:
    """Eight sessions of three clients."""
    admission = Admission(BUDGET, OVERCOMMIT, SESSIONS)
    queue: list[tuple[bytes, int]] = []  # everybody, in order of asking
    inside: set[bytes] = set()

    def begin() -> list[bytes]:
        begun: list[bytes] = []
        for name, size in queue:
            if name in inside:
                continue
            if sum(s for n, s in queue if n in inside) + size > BUDGET * OVERCOMMIT:
                break
            inside.add(name)
            begun.append(name)
        return begun

    for number, size, asks in calls:
        name, client = bytes([number]) * 16, f"client {number % 3}"
        known = any(name == other for other, _ in queue)
        if asks and (known or size > BUDGET):
            with pytest.raises(RemoteProtocolError) as caught:
                admission.ask(name, client, size)
            assert caught.value.code is (ErrorCode.OUT_OF_ORDER if known else ErrorCode.TOO_LONG)
        elif asks:
            mine = [other for entry, other in queue if entry[0] % 3 == number % 3]
            full = len(queue) == SESSIONS or len(mine) == SESSIONS // 2
            if full or sum(mine) + size > BUDGET:
                with pytest.raises(RemoteProtocolError) as caught:
                    admission.ask(name, client, size)
                assert caught.value.code is ErrorCode.BUSY
                assert caught.value.retry_after
            else:
                queue.append((name, size))
                assert admission.ask(name, client, size) == (begin() == [name])
        elif known:
            queue = [entry for entry in queue if entry[0] != name]
            inside.discard(name)
            assert admission.leave(name) == begin()
        else:
            with pytest.raises(LocalProtocolError):
                admission.leave(name)
        admission.check_integrity()
        assert len(admission) == len(queue)
        assert admission.promised == sum(size for name, size in queue if name in inside)


def test_small_ones_do_not_overtake_a_large_one_for_ever() -> None:
    admission = Admission(BUDGET, 1.0, SESSIONS)
    assert admission.ask(b"first", "first", 60)
    assert not admission.ask(b"large", "large", 90)
    assert not admission.ask(b"small", "small", 10)
    assert admission.free == 0
    assert admission.leave(b"first") == [b"large", b"small"]


def test_who_gives_up_waiting_makes_room_for_the_next() -> None:
    admission = Admission(BUDGET, 1.0, SESSIONS)
    assert admission.ask(b"first", "first", 60)
    assert not admission.ask(b"large", "large", 90)
    assert not admission.ask(b"small", "small", 10)
    assert admission.leave(b"large") == [b"small"]
