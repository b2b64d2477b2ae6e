"""What is kept for the way back stays within its budget, and nobody can push out who has less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import LocalProtocolError
from swarm.server.training_kept import Keeping, Place

BUDGET, MOST = 100, 10
LEAST = BUDGET // MOST  # that a place counts for

calls = st.tuples(st.integers(0, 2), st.integers(1, 120), st.sampled_from(["ask", "use", "free"]))


@given(st.lists(calls, max_size=60))
def test_the_budget_holds_and_whoever_is_told_to_leave_was_idle(
    given: list[tuple[int, int, str]],
) -> None:
    keeping = Keeping(BUDGET, MOST)
    there: list[Place] = []
    idle: set[Place] = set()

    def settle(place: Place, nbytes: int) -> None:
        def leave() -> None:
            assert place in idle
            there.remove(place)

        keeping.settle(place, nbytes, leave)
        idle.add(place)

    for client, size, call in given:
        if call == "ask":
            before = keeping.used
            place = keeping.ask(str(client), size)
            assert place.nbytes >= min(size, BUDGET - before) or BUDGET - before < LEAST
            assert place.nbytes <= max(size, LEAST)
            if place.nbytes:
                there.append(place)
                if size % 3:  # the others are still computed with
                    settle(place, place.nbytes - size % 2 * (place.nbytes > LEAST))
        elif there:
            place = there[size % len(there)]
            if call == "use":
                keeping.use(place)
                idle.discard(place)
            else:
                keeping.free(place)
                keeping.free(place)
                there.remove(place)
        keeping.check_integrity()
        assert keeping.used == sum(place.nbytes for place in there)
        assert len(keeping) == len(there) <= MOST


def kept(keeping: Keeping, client: str, wanted: int) -> Place:
    place = keeping.ask(client, wanted)
    keeping.settle(place, place.nbytes, lambda: None)
    return place


def present(keeping: Keeping, *places: Place) -> list[bool]:
    return [place in keeping._places for place in places]


def test_the_oldest_of_whoever_has_most_goes_first() -> None:
    keeping = Keeping(BUDGET, MOST)
    small = kept(keeping, "small", 20)
    first, second = kept(keeping, "large", 40), kept(keeping, "large", 40)
    third = kept(keeping, "new", 30)
    assert present(keeping, small, first, second, third) == [True, False, True, True]
    fourth = kept(keeping, "large", 60)  # it would have most, and gives up its own
    assert present(keeping, small, second, third, fourth) == [True, False, True, True]
    assert fourth.nbytes == 50


def test_who_has_least_cannot_be_pushed_out() -> None:
    keeping = Keeping(BUDGET, MOST)
    small = kept(keeping, "small", 20)
    for _ in range(9):
        assert kept(keeping, "large", 70).nbytes == 70
    assert present(keeping, small) == [True]


def test_what_is_computed_with_stays() -> None:
    keeping = Keeping(BUDGET, MOST)
    place = kept(keeping, "a", 90)
    keeping.use(place)
    assert keeping.ask("b", 50).nbytes == 10
    with pytest.raises(LocalProtocolError, match="granted"):
        keeping.settle(place, 91, lambda: None)
    keeping.free(place)
    assert keeping.ask("b", 50).nbytes == 50


def test_there_are_not_more_than_so_many_and_who_has_all_of_them_gives_up_some() -> None:
    keeping = Keeping(BUDGET, MOST)
    places = [keeping.ask("a", 1) for _ in range(MOST + 1)]
    assert [place.nbytes for place in places] == [LEAST] * MOST + [0]
    for place in places[:MOST]:
        keeping.settle(place, 1, lambda: None)
    assert keeping.ask("b", 50).nbytes == 50
    assert present(keeping, *places) == [False] * 5 + [True] * 5 + [False]
    nothing = Keeping(0, MOST)
    assert nothing.ask("a", 1).nbytes == 0
    assert len(nothing) == 0
