"""The quickest chain of servers is found, and if there is none, what is missing is named."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.routing import (
    Chart,
    RouteHop,
    better_route,
    find_better,
    find_route,
    is_slow,
    price_route,
)
from swarm.dht.records import ServerState, peer_tag
from swarm.errors import NoRoute
from swarm.types import ModelId, Numerics
from tests.client.market import book, request, route, server


def test_one_server_is_better_than_two_that_are_as_fast() -> None:
    servers = [server("a", "0:8"), server("b", "8:16"), server("ab", "0:16", throughput=50.0)]
    peers = book()
    peers.worked("ab", 1, 0.02, blocks=16)  # else only one client in four would believe it
    assert route(servers, request("0:16"), peers) == [("ab", "0:16")]


def test_any_part_of_a_span_may_be_used() -> None:
    assert route([server("a", "0:24")], request("5:9")) == [("a", "5:9")]


def test_overlapping_servers_share_where_the_slower_one_ends() -> None:
    servers = [server("slow", "0:16", throughput=1.0), server("fast", "8:24", throughput=1000.0)]
    assert route(servers, request("0:24")) == [("slow", "0:8"), ("fast", "8:24")]
    servers = [server("fast", "0:16", throughput=1000.0), server("slow", "8:24", throughput=1.0)]
    assert route(servers, request("0:24")) == [("fast", "0:16"), ("slow", "16:24")]


def test_a_near_server_beats_a_far_one_for_many_steps_and_a_fast_one_for_a_long_prompt() -> None:
    near, fast = server("near", "0:8", throughput=10.0), server("fast", "0:8", throughput=1000.0)
    peers = book(near=0.001, fast=0.2)
    chat = request("0:8", prompt_tokens=1, new_tokens=1000)
    reading = request("0:8", prompt_tokens=100_000, new_tokens=1)
    assert route([near, fast], chat, peers) == [("near", "0:8")]
    assert route([near, fast], reading, peers) == [("fast", "0:8")]


def test_what_is_unknown_is_not_free() -> None:
    silent, known = server("silent", "0:8", throughput=0.0), server("known", "0:8")
    assert route([silent, known], request("0:8")) == [("known", "0:8")]
    assert route([server("a", "0:8"), known], request("0:8"), book(known=0.01)) == [
        ("known", "0:8")
    ]


def test_many_who_claim_to_take_for_ever_do_not_make_all_prices_infinite() -> None:
    """Then servers were asked for blocks that they do not hold."""
    liars = [server(f"liar {n}", "0:16", throughput=5e-324) for n in range(7)]
    servers = [server("a", "0:8"), server("b", "8:16"), server("c", "0:16"), *liars]
    for lot in range(8):
        found = find_route(servers, request("0:16"), book(), 0.0, tiebreak=lot / 8)
        assert all(hop.server.record.blocks.contains(hop.blocks) for hop in found)


def test_a_queue_and_past_failures_count_and_own_observations_beat_claims() -> None:
    busy, idle = server("busy", "0:8", queue=100), server("idle", "0:8")
    assert route([busy, idle], request("0:8")) == [("idle", "0:8")]

    peers = book()
    peers.failed("busy", now=-1000.0)
    assert route([server("busy", "0:8"), idle], request("0:8"), peers) == [("idle", "0:8")]

    boaster = server("boaster", "0:8", throughput=1e9)
    peers = book()
    peers.worked("boaster", 1, 100.0, blocks=8)
    assert route([boaster, idle], request("0:8"), peers) == [("idle", "0:8")]


@pytest.mark.parametrize(
    "unfit",
    [
        {"state": ServerState.JOINING},
        {"state": ServerState.DRAINING},
        {"state": ServerState.OFFLINE},
        {"numerics": Numerics("bfloat16")},
        {"model": ModelId("tiny", "1" * 64)},
    ],
    ids=repr,
)
def test_servers_that_do_not_fit_are_never_used_even_alone(unfit: dict[str, Any]) -> None:
    servers = [server("good", "0:8"), server("unfit", "8:16", **unfit)]
    with pytest.raises(NoRoute, match=r"blocks 8:16 of tiny.*swarm-server tiny --blocks 8:16"):
        route(servers, request("0:16"))


def test_all_missing_ranges_are_named() -> None:
    servers = [server("a", "2:4"), server("b", "6:8")]
    with pytest.raises(NoRoute, match=r"blocks 0:2, 4:6, 8:10 of tiny are served by nobody"):
        route(servers, request("0:10"))
    with pytest.raises(NoRoute, match=r"blocks 0:10 of tiny are served by nobody in float32"):
        route([], request("0:10"))


def test_banned_and_excluded_servers_are_avoided_and_said_to_come_back() -> None:
    servers = [server("a", "0:8"), server("b", "0:8", throughput=1.0)]
    peers = book()
    peers.failed("a", now=0.0)
    assert route(servers, request("0:8"), peers) == [("b", "0:8")]
    assert route(servers, request("0:8", exclude=frozenset("a"))) == [("b", "0:8")]
    with pytest.raises(NoRoute, match=r"blocks 0:8 of tiny are held only by.* in [12] s"):
        route(servers, request("0:8", exclude=frozenset("b")), peers)
    with pytest.raises(NoRoute, match="when they are free"):
        route(servers, request("0:8", exclude=frozenset("ab")))


def test_clients_spread_over_equals_but_not_over_much_worse_ones() -> None:
    equals = [server(f"server{i}", "0:8") for i in range(8)]
    slow = server("slow", "0:8", throughput=1.0)
    lots = random.Random(1)
    chosen = [
        route([*equals, slow], request("0:8"), tiebreak=lots.random())[0][0] for _ in range(200)
    ]
    assert set(chosen) == {f"server{i}" for i in range(8)}
    assert max(map(chosen.count, chosen)) < 60
    again = route(equals, request("0:8"), tiebreak=0.25)
    assert route(equals, request("0:8"), tiebreak=0.25) == again


def test_who_may_be_used_is_the_clients_to_say() -> None:
    servers = [server("a", "0:8"), server("b", "0:8", throughput=20.0), server("c", "8:16")]
    assert route(servers, request("0:8", blocked=frozenset("a"))) == [("b", "0:8")]
    assert route(servers, request("0:8", allowed=frozenset("b"))) == [("b", "0:8")]
    with pytest.raises(NoRoute, match=r"8:16 of tiny are held only.*allowed_servers and blocked_"):
        route(servers, request("0:16", allowed=frozenset("ab")))
    with pytest.raises(NoRoute, match=r"16:17 of tiny are served by nobody"):
        route(servers, request("0:17", blocked=frozenset("c")))


def test_a_route_explains_its_price() -> None:
    servers = [
        server("aaaaaaaa", "0:8", next_rtts={peer_tag("bbbbbbbb"): 10}, queue=2),
        server("bbbbbbbb", "8:16"),
        server("cccccccc", "16:24", throughput=0.0),
    ]
    peers, wanted = book(aaaaaaaa=0.02, bbbbbbbb=0.02), request("0:24", new_tokens=100)
    peers.worked("bbbbbbbb", 1, 0.01, 8)
    hops = find_route(servers, wanted, peers, 0.0)
    priced = price_route(hops, servers, wanted, peers, 0.0)
    assert [hop.offer.source for hop in priced] == ["announced", "measured", "assumed"]
    assert [hop.offer.rtt_known for hop in priced] == [True, True, False]
    assert [hop.offer.rtt for hop in priced] == [0.02, 0.02, 0.1]
    assert [hop.offer.wait > 0 for hop in priced] == [True, False, False]
    assert [hop.link for hop in priced] == pytest.approx([0.0, -101 * 0.015, 0.0])
    assert all(hop.seconds > 0 for hop in priced)


def test_a_hop_is_slow_only_after_many_steps_that_are_not_what_was_expected() -> None:
    assert not is_slow([9.0] * 7, 0.1)
    assert is_slow([0.1] * 20 + [0.25] * 8, 0.1)
    assert not is_slow([0.21] * 8, 0.1)
    assert not is_slow([0.1] * 5 + [9.0] * 3, 0.1)  # the odd hiccup
    assert not is_slow([0.015] * 8, 0.0001)


def test_a_route_is_left_only_for_one_that_pays_for_the_move() -> None:
    assert better_route(stay=100.0, go=40.0, replay=10.0)
    assert not better_route(stay=100.0, go=80.0, replay=0.0)
    assert not better_route(stay=100.0, go=40.0, replay=40.0)
    assert not better_route(stay=0.9, go=0.0, replay=0.0)


def test_a_session_moves_if_that_is_quicker_even_with_all_that_has_to_be_said_again() -> None:
    servers = [server("slow", "0:8"), server("tail", "8:16"), server("fast", "0:8")]
    chart, peers = Chart(servers), book(slow=0.3, tail=0.01, fast=0.01)
    rest = request("0:16", prompt_tokens=0, new_tokens=100)
    slow, tail, fast = (RouteHop(s, s.record.blocks) for s in servers)
    assert find_better([slow, tail], chart, rest, 1000, peers, 0.0) == (fast, tail)
    assert find_better([fast, tail], chart, rest, 1000, peers, 0.0) is None
    few = request("0:16", prompt_tokens=0, new_tokens=2)
    assert find_better([slow, tail], chart, few, 1000, peers, 0.0) is None
    much = 10_000_000
    assert find_better([slow, tail], chart, rest, much, peers, 0.0) is None
    peers.pace.computed("tail", 8, 512, 1e6)  # which keeps what it has, so that does not matter
    assert find_better([slow, tail], chart, rest, 1000, peers, 0.0) == (fast, tail)


@given(st.floats(0.1, 1e4), st.floats(0.1, 1e4), st.floats(0.0, 100.0))
def test_nobody_moves_to_and_fro(here: float, there: float, replay: float) -> None:
    assert not (better_route(here, there, replay) and better_route(there, here, replay))


def test_a_thousand_servers_are_no_burden() -> None:
    """How long it takes is for docs/routing.md; here, that all of them were looked at."""
    lots = random.Random(0)
    servers = [
        server(f"server{i:04}", f"{start}:{start + 4}", throughput=1 + lots.random())
        for i in range(1000)
        for start in [lots.randint(0, 76)]
    ]
    chart, peers = Chart(servers), book(**{f"server{i:04}": 0.1 for i in range(1000)})
    for start in range(0, 80, 4):
        best = server(f"winner{start:02}", f"{start}:{start + 4}", throughput=50.0)
        peers.measured(best.record.peer_id, 0.001)
        peers.worked(best.record.peer_id, 1, 1 / 50.0, 4)
        chart = Chart([*chart.servers, best])
    assert [name for name, _ in route(chart, request("0:80"), peers)] == [
        f"winner{start:02}" for start in range(0, 80, 4)
    ]
