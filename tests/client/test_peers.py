"""Bans grow and are forgiven, and a client's memory of its peers stays small."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.peers import MAX_PEERS, PeerBook


def book() -> PeerBook:
    return PeerBook(random.Random(0))


def test_bans_double_with_each_failure_up_to_five_minutes() -> None:
    peers = book()
    for failure in range(12):
        now = 1000.0 * failure
        peers.failed("a", now)
        ban = min(300.0, 2.0**failure)
        assert 0.75 * ban <= peers.banned_until("a") - now <= 1.25 * ban
        assert peers.banned(now + 0.74 * ban) == {"a"}
        assert peers.banned(now + 1.26 * ban) == frozenset()


def test_work_forgives_everything() -> None:
    peers = book()
    for _ in range(5):
        peers.failed("a", 0.0)
    peers.worked("a", 1, 0.01)
    assert peers.banned(0.0) == frozenset()
    assert peers.failures("a") == 0
    peers.failed("a", 0.0)
    assert peers.banned(1.3) == frozenset()


def test_who_failed_once_has_another_chance_if_nobody_else_is_left() -> None:
    known = book()
    for name, failures in (("once", 1), ("twice", 2)):
        known.worked(name, 1, 0.1, 1, now=0.0)
        for _ in range(failures):
            known.failed(name, 0.0)
    known.busy("busy", 0.0, 5.0)
    known.failed("never worked", 0.0)
    assert known.forgive(0.1)
    assert known.banned(0.1) == {"twice", "busy", "never worked"}
    known.busy("once", 0.2, 5.0)
    assert not known.forgive(0.3), "or two peers would be asked in turn for ever"
    known.worked("once", 1, 0.1)
    known.failed("once", 0.4)
    assert known.forgive(0.5)


def test_a_peer_that_was_started_anew_is_tried_at_once() -> None:
    peers = book()
    peers.failed("a", 0.0, b"old certificate")
    peers.seen("a", b"old certificate")
    peers.seen("b", b"of a stranger")
    assert peers.banned(0.1) == {"a"}
    peers.seen("a", b"new certificate")
    assert peers.banned(0.1) == frozenset()
    assert peers.failures("a") == 0
    assert len(peers) == 1


def test_clients_do_not_come_back_at_the_same_moment() -> None:
    clients = [PeerBook(random.Random(seed)) for seed in range(20)]
    for client in clients:
        client.failed("a", 0.0)
    assert len({client.banned_until("a") for client in clients}) == 20


def test_nothing_is_known_of_strangers() -> None:
    peers = book()
    assert peers.rtt("a") is None
    assert peers.block_seconds("a") is None
    assert peers.failures("a") == 0
    assert peers.banned(0.0) == frozenset()


@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=30))
def test_measurements_are_smoothed_within_what_was_seen(seen: list[float]) -> None:
    peers = book()
    for value in seen:
        peers.measured("a", value)
        peers.worked("a", 1, 4 * value, blocks=4)
    for estimate in (peers.rtt("a"), peers.block_seconds("a")):
        assert estimate is not None
        assert min(seen) * 0.999 <= estimate <= max(seen) * 1.001


def test_the_newest_measurements_prevail() -> None:
    peers = book()
    for value in [1.0] * 10 + [0.1] * 30:
        peers.measured("a", value)
    assert peers.rtt("a") == pytest.approx(0.1, rel=0.05)


def test_a_long_prefill_says_nothing_about_decode_steps() -> None:
    peers = book()
    peers.worked("a", 1000, 5.0, blocks=4)
    assert peers.block_seconds("a") is None


def test_answers_that_come_late_count_for_more_than_words() -> None:
    peers = book()
    peers.measured("a", 0.1)
    peers.worked("a", 1, 0.0, blocks=4, elapsed=0.5)
    assert peers.block_seconds("a") == pytest.approx(0.1)
    peers.worked("b", 1, 0.2, blocks=4, elapsed=0.5)  # how far it is nobody knows
    assert peers.block_seconds("b") == pytest.approx(0.05)
    peers.measured("c", 0.1)
    peers.worked("c", 1, 0.2, blocks=4, elapsed=0.25)  # all of it was spent on the way
    assert peers.block_seconds("c") == pytest.approx(0.05)


def test_speeds_are_forgotten_in_time_and_then_measured_anew() -> None:
    peers = book()
    peers.worked("a", 1, 4.0, blocks=4, now=100.0)
    assert peers.block_seconds("a", 700.0) == 1.0
    assert peers.block_seconds("a", 701.0) is None
    peers.worked("a", 1, 0.4, blocks=4, now=800.0)
    assert peers.block_seconds("a", 800.0) == pytest.approx(0.1)


def test_a_shorter_way_is_believed_sooner_than_a_longer_one() -> None:
    """What makes an answer late is a queue somewhere, mostly."""
    peers = book()
    for name, second in (("nearer", 0.1), ("farther", 1.9)):
        peers.measured(name, 1.0)
        peers.measured(name, second)
    assert peers.rtt("nearer") == pytest.approx(0.55)
    assert peers.rtt("farther") == pytest.approx(1.18)


def test_those_who_are_known_are_recalled_with_their_places() -> None:
    peers = book()
    peers.measured("b", 0.1)
    assert [(place, peer.rtt) for place, peer in peers.recall(["a", "b", "c"])] == [(1, 0.1)]


def test_memory_is_bounded_and_forgets_the_longest_silent() -> None:
    peers = book()
    peers.failed("first", 0.0)
    for i in range(MAX_PEERS - 1):
        peers.measured(str(i), 0.1)
    peers.measured("first", 0.1)
    peers.measured("one more", 0.1)
    assert len(peers) == MAX_PEERS
    assert peers.rtt("0") is None
    assert peers.rtt("first") is not None
