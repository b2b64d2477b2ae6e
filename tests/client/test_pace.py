"""Prompts are cut so that their first token comes soonest, whatever links and servers are like."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.pace import _REMEMBERED, Flight, Pace, Piece, Stage, best_width
from tests.client.twins import House

ROUTE = (("a", 4), ("b", 4), ("c", 4))
ROW = 4096  # bytes
WINDOW = 8
PASS = 15  # positions that a pass costs more, on the machines below
MEGABIT = 8e-6  # seconds per byte

seconds = st.floats(1e-6, 1.0)
stages = st.lists(st.builds(Stage, seconds, st.just(0.0) | seconds), min_size=1, max_size=8)


@given(st.integers(1, 3000), stages, st.integers(1, 200))
def test_no_other_number_of_pieces_would_be_sooner(
    positions: int, stages: Sequence[Stage], least: int
) -> None:
    def end(pieces: float) -> float:
        times = [stage.fixed + stage.each * positions / pieces for stage in stages]
        return sum(times) + (pieces - 1) * max(times)

    width = best_width(positions, stages, least)
    assert min(least, positions) <= width <= positions
    soonest = min(map(end, range(1, max(1, positions // least) + 1)))
    tried = [n for n in range(1, positions + 1) if -(-positions // n) == width]
    assert min(map(end, tried)) <= soonest * (1 + 1e-6)


@dataclass(frozen=True)
class World:
    """Three servers in a row as they really are: seconds per byte and delay of the links into
    them, and seconds per position."""

    links: tuple[float, float, float] = (0.0, 0.0, 0.0)
    delay: float = 0.0
    servers: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    crowded: bool = False

    def first_token(
        self, pace: Pace, positions: int = 1024, width: Callable[[], int] | None = None
    ) -> float:
        """Seconds until a prompt's last piece is answered, and `pace` learns from all of them."""
        flight = Flight(pace, ROUTE)
        answers: list[float] = []
        news: list[tuple[float, int, int, Piece]] = []
        free = [0.0] * 6  # of each link and server
        begin = now = 0.0
        while begin < positions:
            if len(answers) >= WINDOW:
                now = max(now, answers[-WINDOW])
            while news and news[0][0] <= now:
                at, _, hop, piece = heapq.heappop(news)
                flight.arrived(hop, piece, at)
            wide = width() if width else pace.width(ROUTE, positions, 1, ROW)
            tokens = int(min(wide, positions - begin))
            begin += tokens
            flight.left(now)
            at = now
            for hop in range(3):
                at = free[2 * hop] = max(at, free[2 * hop]) + self.links[hop] * tokens * ROW
                at += self.delay
                computing = self.servers[hop] * (tokens + PASS)
                at = free[2 * hop + 1] = max(at, free[2 * hop + 1]) + computing
                piece = Piece(tokens, tokens * ROW, computing, self.crowded)
                heapq.heappush(news, (at + self.delay, len(answers), hop, piece))
            answers.append(at + self.delay)
        for at, _, hop, piece in sorted(news):
            flight.arrived(hop, piece, at)
        return answers[-1]


def believed(pace: Pace) -> list[float]:
    """Seconds per byte of the links into the three servers."""
    return [pace._links.get(link, 0.0) for link in (("", "a"), ("a", "b"), ("b", "c"))]


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.05])
@pytest.mark.parametrize("slow", range(3))
def test_a_slow_link_is_found_and_measured_whatever_the_delay(slow: int, delay: float) -> None:
    links = [0.0, 0.0, 0.0]
    links[slow] = MEGABIT / 10
    pace = Pace()
    for _ in range(3):
        World((links[0], links[1], links[2]), delay).first_token(pace)
    found = believed(pace)
    assert found[slow] == pytest.approx(links[slow], rel=0.1)
    assert sum(found) == found[slow]


@given(st.tuples(*[st.floats(3e-4, 3e-3)] * 3), st.floats(0, 0.1), st.floats(0, 0.5))
def test_links_that_nobody_waits_for_are_free(
    servers: tuple[float, float, float], delay: float, share: float
) -> None:
    """As on loopback: pieces are what they were when nothing was known of links."""
    link = share * min(servers) / ROW
    pace = Pace()
    for _ in range(3):
        World((link, link, link), delay, servers).first_token(pace)
    assert believed(pace) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("megabits", [2, 5, 10])
def test_over_slow_links_the_first_token_comes_sooner(megabits: float) -> None:
    link = MEGABIT / megabits
    world, pace = World((link, link, link), 0.002), Pace()
    fixed = world.first_token(Pace(), width=lambda: Pace().width(ROUTE, 1024, 1, ROW))
    world.first_token(pace)
    assert world.first_token(pace) < 0.95 * fixed
    long = world.first_token(Pace(), 8192, width=lambda: Pace().width(ROUTE, 8192, 1, ROW))
    assert world.first_token(Pace(), 8192) < long, "later pieces learn from the first ones"


def test_what_was_taken_for_slow_once_is_forgotten() -> None:
    pace = Pace()
    pace.crossed(("", "a"), 1e-6, waited=True)
    for _ in range(20):
        World().first_token(pace)
    unknown = Pace()
    World().first_token(unknown)
    assert pace.width(ROUTE, 1024, 1, ROW) == unknown.width(ROUTE, 1024, 1, ROW)


def test_who_waits_for_others_steps_says_nothing_of_links() -> None:
    pace = Pace()
    World((1e-6, 1e-6, 1e-6), crowded=True).first_token(pace)
    assert believed(pace) == [0.0, 0.0, 0.0]


@given(
    st.lists(st.tuples(seconds, st.booleans()), max_size=20),
    st.integers(1, 1 << 14),
    st.integers(1, 1024),
    st.integers(1, 1 << 16),
)
def test_pieces_are_never_empty_and_never_too_small_to_compute(
    seen: list[tuple[float, bool]], positions: int, rows: int, row_bytes: int
) -> None:
    pace = Pace()
    for each, waited in seen:
        pace.crossed(("a", "b"), each * 1e-6, waited=waited)
        pace.computed("a", 4, 100, each)
    assert pace.width(ROUTE, positions, rows, row_bytes) >= max(1, 64 // rows)


def test_a_swarm_that_changes_for_ever_takes_no_more_memory() -> None:
    pace = Pace()
    for peer in range(2 * _REMEMBERED):
        pace.computed(str(peer), 1, 100, 0.1)
        pace.crossed(("", str(peer)), 1e-6, waited=True)
    assert len(pace._links) == len(pace._servers) == _REMEMBERED


def test_what_one_session_learns_the_next_one_uses(house: House) -> None:
    with house.twin(max_length=2048) as twin:
        connection = twin.session._connection
        twin.step(600)
        pushed = house.swarm.network.frames.copy()
        assert set(connection.pace._servers) == {hop.peer_id for hop in twin.session.hops}
        first = twin.session.hops[0].peer_id
        connection.pace.crossed(("", first), 1e-3, waited=True)
        twin.step(600)
        pieces = house.swarm.network.frames - pushed
        assert pieces["client 99", first, "session"] == 10  # of 64
