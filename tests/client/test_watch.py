"""A hop is doubted when it takes much longer than was expected when it was chosen, and stays so."""

from __future__ import annotations

from typing import Any

from swarm.client.routing import JUDGED
from swarm.client.watch import _PAUSE, Watch

FIRST: Any = "a hop"
SECOND: Any = "another one"


def watch(*expected: float) -> Watch:
    found = Watch()
    found.expect([FIRST, SECOND][: len(expected)], expected)
    return found


def doubts(watch: Watch, seconds: float, hop: Any = FIRST, now: float = 100.0) -> bool:
    found = False
    for _ in range(JUDGED):
        watch.observe(hop, seconds)
        found |= watch.doubts(now)
    return found


def test_slow_hops_are_doubted_and_others_not() -> None:
    assert doubts(watch(0.1), 0.5)
    assert not doubts(watch(0.1), 0.11)
    assert doubts(watch(0.1, 0.1), 0.5, SECOND)


def test_what_nobody_expected_is_never_slow() -> None:
    found = Watch()
    found.expect([FIRST], None)
    assert not doubts(found, 9.0)
    assert not doubts(found, 9.0, SECOND), "it is not in the route"


def test_what_was_expected_first_goes_on_to_be() -> None:
    """Else a hop that becomes slower bit by bit would always be as slow as it is known to be."""
    found = watch(0.1)
    found.expect([FIRST, SECOND], [0.5, 0.5])
    assert doubts(found, 0.5)
    assert not doubts(watch(0.5), 0.5)


def test_a_look_that_changed_nothing_is_not_repeated_at_once() -> None:
    found = watch(0.1)
    assert doubts(found, 0.5)
    assert not doubts(found, 0.5, now=100.0 + _PAUSE / 2)
    assert doubts(found, 0.5, now=101.0 + _PAUSE)
