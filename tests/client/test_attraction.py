"""How much of the traffic one liar gets, over 25 minutes of many clients' sessions.

It claims to hold everything, at 1e9 tokens per second, with no distance to anybody, and where all
say where they are, to be in their midst, with room for all and a line without end; what it does
then is what the tests differ in. Sessions go on elsewhere each time: that is in test_liars.py.
"""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from swarm.client.peers import PeerBook
from swarm.client.routing import Chart, find_route
from swarm.dht.records import peer_tag
from tests.client.market import request, server

HONEST = [f"honest{i:02}" for i in range(12)]
LIAR = "liar0000"
CLIENTS, PERIOD, END = 12, 20.0, 1500.0  # seconds between two sessions of a client
STEPS = 32
TRIES = 4  # of a session that begins, before it gives up

NEAR = {peer_tag(name): 0 for name in HONEST[:6]}
MARKET = [server(name, "0:12" if i % 2 else "12:24") for i, name in enumerate(HONEST)]
MARKET.append(server(LIAR, "0:24", throughput=1e9, next_rtts=NEAR))
WORD = {"batch_throughput": 1e9, "uplink": 2**32 - 1, "free_tokens": 2**32 - 1}
PLACED = [
    server(name, "0:12" if i % 2 else "12:24", coordinates=(100 * (i % 4), 50 * (i % 3), 0, 50))
    for i, name in enumerate(HONEST)
]
PLACED.append(
    server(LIAR, "0:24", throughput=1e9, next_rtts=NEAR, coordinates=(150, 50, 0, 0), **WORD)
)
Liar = Callable[[PeerBook, float], bool]
"""What comes of a session that begins there: whether the client stays for all its steps."""


def nowhere(book: PeerBook, now: float) -> bool:
    """Or at somebody else's address, who shows another certificate."""
    book.failed(LIAR, now)
    return False


def refuses(book: PeerBook, now: float) -> bool:
    book.busy(LIAR, now, 0.0)
    return False


def renews(book: PeerBook, now: float) -> bool:
    """Fails, and shows a new certificate each time, as if it had been started anew."""
    book.failed(LIAR, now, b"old")
    book.seen(LIAR, b"new")
    return False


def flaps(book: PeerBook, now: float) -> bool:
    """Works for one step each time: all is forgiven then."""
    book.worked(LIAR, 1, 0.0, 24, elapsed=0.02, now=now)
    book.failed(LIAR, now)
    return False


def is_slow(book: PeerBook, now: float) -> bool:
    """Says that it took no time."""
    book.measured(LIAR, 0.01)
    for _ in range(STEPS):
        book.worked(LIAR, 1, 0.0, 24, elapsed=2.0, now=now)
    return True


def shares(liar: Liar, *, placed: bool) -> tuple[float, float]:
    """Of all openings in the first two minutes, and afterwards."""
    rng = random.Random(0)
    chart = Chart(PLACED if placed else MARKET)
    books = [PeerBook(random.Random(i)) for i in range(CLIENTS)]
    for book in books if placed else []:
        book.coordinates = (0.01, 0.005, 0.0, 0.005)
    sessions = sorted(
        (rng.uniform(0, PERIOD) + PERIOD * turn, client)
        for client in range(CLIENTS)
        for turn in range(int(END / PERIOD))
    )
    openings: Counter[tuple[bool, bool]] = Counter()  # early? at the liar?
    for now, client in sessions:
        book = books[client]
        names = list[str]()
        for _ in range(TRIES):
            hops = find_route(chart, request("0:24"), book, now, tiebreak=rng.random())
            names = [hop.server.record.peer_id for hop in hops]
            openings[now < 120, LIAR in names] += 1
            if LIAR not in names or liar(book, now):
                break
        for name in set(names) - {LIAR}:
            book.measured(name, 0.03)
            book.worked(name, 1, 0.12, 12, elapsed=0.15, now=now)
    return tuple(  # type: ignore[return-value]
        openings[early, True] / (openings[early, True] + openings[early, False])
        for early in (True, False)
    )


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("liar", [nowhere, refuses, renews, flaps, is_slow])
def test_one_liar_gets_a_small_share_of_openings_and_soon_hardly_any(
    liar: Liar, *, placed: bool
) -> None:
    early, later = shares(liar, placed=placed)
    assert early < 0.6
    assert later < (0.15 if liar in (refuses, flaps) else 0.1)
