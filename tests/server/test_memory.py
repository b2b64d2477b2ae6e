"""The budget of cache slots is hard, and whatever was taken comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.server.memory import KvBudget

SLOTS = 100


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 120), st.booleans()), max_size=30))
def test_a_budget_counts_as_a_dictionary_would(calls: list[tuple[int, int, bool]]) -> None:
    budget, held = KvBudget(SLOTS), dict[bytes, int]()
    for number, slots, takes in calls:
        session = bytes([number]) * 16
        refusal = None
        if session in held:
            refusal = ErrorCode.OUT_OF_ORDER
        elif slots > SLOTS - sum(held.values()):
            refusal = ErrorCode.BUSY if slots <= SLOTS else ErrorCode.TOO_LONG
        if takes and refusal:
            with pytest.raises(RemoteProtocolError) as caught:
                budget.reserve(session, slots)
            assert caught.value.code is refusal
        elif takes:
            budget.reserve(session, slots)
            held[session] = slots
        elif session in held:
            budget.release(session)
            del held[session]
        else:
            with pytest.raises(LocalProtocolError):
                budget.release(session)
        assert budget.free == SLOTS - sum(held.values())
        budget.check_integrity()
    for session in held:
        budget.release(session)
    assert budget.free == SLOTS


def test_who_is_turned_away_learns_when_to_come_again() -> None:
    budget = KvBudget(SLOTS)
    budget.reserve(b"a" * 16, 60)
    with pytest.raises(RemoteProtocolError, match="40 of 100") as caught:
        budget.reserve(b"b" * 16, 41)
    assert caught.value.retry_after == 1.0
