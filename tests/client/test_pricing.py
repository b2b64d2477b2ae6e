"""What is measured counts, what is announced is believed within bounds, the unknown has a price."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.peers import PeerBook
from swarm.client.pricing import Offer, Prices
from swarm.client.routing import Chart, RouteHop, find_better, find_route
from swarm.dht.records import Adapter, SignedRecord, peer_tag
from swarm.errors import NoRoute
from swarm.types import BlockRange
from tests.client.market import MODEL, NUMERICS, book, request, route, server


def test_lan_neighbours_that_are_far_from_the_client_are_better_than_two_that_are_near_it() -> None:
    servers = [
        server("near-abc", "0:8"),
        server("near-xyz", "8:16"),
        server("far-abcd", "0:8", next_rtts={peer_tag("far-wxyz"): 1}),
        server("far-wxyz", "8:16"),
    ]
    peers = book(**{"near-abc": 0.06, "near-xyz": 0.06, "far-abcd": 0.1, "far-wxyz": 0.1})
    assert route(servers, request("0:16"), peers) == [("far-abcd", "0:8"), ("far-wxyz", "8:16")]


def test_a_link_that_is_announced_to_be_bad_is_gone_around() -> None:
    servers = [
        server("aaaaaaaa", "0:8", next_rtts={peer_tag("bbbbbbbb"): 2000}),
        server("bbbbbbbb", "8:16"),
        server("cccccccc", "8:16"),
    ]
    peers = book(aaaaaaaa=0.01, bbbbbbbb=0.01, cccccccc=0.05)
    assert route(servers, request("0:16"), peers) == [("aaaaaaaa", "0:8"), ("cccccccc", "8:16")]


def test_nobody_comes_nearer_by_what_is_said_than_our_own_measurements_allow() -> None:
    """A server that announces to be next to all others, and is not next to us."""
    liar = server("liarliar", "0:8", next_rtts={peer_tag("bbbbbbbb"): 0})
    servers = [liar, server("aaaaaaaa", "0:8"), server("bbbbbbbb", "8:16")]
    peers = book(liarliar=0.2, aaaaaaaa=0.05, bbbbbbbb=0.05)
    chosen = [("aaaaaaaa", "0:8"), ("bbbbbbbb", "8:16")]
    assert route(servers, request("0:16"), peers) == chosen
    # As far as from us to the nearer one and back: nothing can be said about who was not measured.
    peers = book(aaaaaaaa=0.09, bbbbbbbb=0.05)
    assert route(servers, request("0:16"), peers) == chosen


def test_servers_without_room_are_used_only_if_there_are_no_others() -> None:
    full, slow = server("full", "0:8", free_tokens=40), server("slow", "0:8", throughput=20.0)
    assert route([full, slow], request("0:8")) == [("slow", "0:8")]
    assert route([full], request("0:8")) == [("full", "0:8")]
    assert route([full, slow], request("0:8", prompt_tokens=4, new_tokens=8)) == [("full", "0:8")]


def test_many_rows_go_to_who_is_good_at_batches() -> None:
    alone = server("alone", "0:8", throughput=30.0, batch_throughput=32.0)
    batch = server("batch", "0:8", throughput=15.0, batch_throughput=300.0)
    assert route([alone, batch], request("0:8", prompt_tokens=1)) == [("alone", "0:8")]
    assert route([alone, batch], request("0:8", rows=16)) == [("batch", "0:8")]


def test_a_long_prompt_goes_where_bytes_and_prompts_have_gone_quickly() -> None:
    servers = [server("slow", "0:8"), server("quick", "0:8")]
    reading = request("0:8", prompt_tokens=10_000, position_bytes=8192)
    for _ in range(4):
        peers = book(slow=0.01, quick=0.012)
        peers.pace.crossed(("", "slow"), 1e-6, waited=True)
        peers.pace.crossed(("", "quick"), 1e-8, waited=False)
        assert route(servers, request("0:8"), peers) == [("slow", "0:8")]
        assert route(servers, reading, peers) == [("quick", "0:8")]
    peers = book(slow=0.01, quick=0.012)
    peers.pace.computed("slow", 8, 512, 8.0)
    peers.pace.computed("quick", 8, 512, 0.1)
    assert route(servers, reading, peers) == [("quick", "0:8")]


def test_whose_line_is_full_is_gone_around_until_it_was_seen_how_quick_it_is() -> None:
    slow, quick = server("slow", "0:8", uplink=600), server("quick", "0:8", uplink=60_000)
    chat = request("0:8", position_bytes=16_384)
    peers = book(slow=0.01, quick=0.03)
    assert route([slow, quick], request("0:8"), peers) == [("slow", "0:8")]
    assert route([slow, quick], chat, peers) == [("quick", "0:8")]
    assert route([server("silent", "0:8"), slow, quick], chat, peers) == [("quick", "0:8")]
    for name in ("slow", "quick"):
        peers.worked(name, 1, 0.08, 8, elapsed=0.08)
    assert route([slow, quick], chat, peers) == [("slow", "0:8")]


def test_coordinates_tell_what_was_never_measured_and_no_more_than_measurements_allow() -> None:
    """Three of our town, one across the sea, of whom we have asked only those who tell us where we
    are."""
    here, there = (0, 0, 0, 50), (1000, 0, 0, 50)  # tenths of a millisecond
    servers = [
        server("near", "0:8", coordinates=here),
        server("far", "0:8", coordinates=there, throughput=120.0),
        server("second", "8:16", coordinates=(0, 0, 10, 50)),
        server("overseas", "8:16", coordinates=there, throughput=120.0),
    ]
    peers = book(elsewhere=0.1)
    assert route(servers, request("0:16"), peers)[0] == ("far", "0:8")
    peers.coordinates = (0.0, 0.0, 0.0, 0.005)
    assert route(servers, request("0:16"), peers) == [("near", "0:8"), ("second", "8:16")]
    peers.measured("near", 0.5)  # it lied
    assert route(servers, request("0:16"), peers) == [("far", "0:8"), ("second", "8:16")]


def offers(
    servers: Sequence[SignedRecord],
    peers: PeerBook,
    tiebreak: float | None = None,
    **changes: Any,
) -> dict[str, Offer]:
    """What each would take, by the name it has."""
    holders = Chart(servers).holders(MODEL, NUMERICS)
    prices = Prices(holders, request("0:8", **changes), peers, 0.0, tiebreak)
    return {name: prices.offer(place) for place, name in enumerate(holders.ids)}


def test_a_stranger_in_a_data_centre_counts_as_near_as_its_farthest_server() -> None:
    servers = [server(name, "0:8") for name in ("a", "b", "c", "new")]
    assert offers(servers, book(a=0.001, b=0.002))["new"].rtt == 0.1  # two are no rule
    assert offers(servers, book(a=0.001, b=0.002, c=0.003))["new"].rtt == 0.003


def test_what_coordinates_tell_counts_for_a_tenth_more() -> None:
    peers = book()
    peers.coordinates = (0.0, 0.0, 0.0, 0.01)
    told = offers([server("a", "0:8", coordinates=(300, 400, 0, 100))], peers)["a"]
    assert told.rtt == pytest.approx(1.1 * 0.07)
    assert not told.rtt_known


def test_who_does_not_say_how_fast_it_is_counts_as_the_median_and_ten_milliseconds_at_least() -> (
    None
):
    silent = server("silent", "0:8", throughput=0.0)
    quick, slow = (
        [server(f"{name}{i}", "0:8", throughput=speed) for i in range(3)]
        for name, speed in (("quick", 125.0), ("slow", 2.5))
    )
    assert offers([silent, *quick], book())["silent"].block_seconds == 0.01
    assert offers([silent, *slow], book())["silent"].block_seconds == pytest.approx(0.05)


def test_waiting_is_counted_once_as_what_was_measured_has_it_in_it() -> None:
    full, peers = server("full", "0:8", queue=5), book()
    waits = offers([full], peers)["full"]
    assert waits.wait == pytest.approx(0.5 * 8 * waits.block_seconds)
    peers.worked("full", 1, 0.4, 8)
    seen = offers([full], peers)["full"]
    assert (seen.block_seconds, seen.wait) == (0.05, 0.0)


def test_bytes_cost_80_megabit_and_lines_that_say_nothing_are_as_others() -> None:
    servers = [server("a", "0:8", uplink=1000), server("b", "0:8", uplink=3000)]
    servers.append(server("silent", "0:8"))
    rtts = book(a=0.01, b=0.01, silent=0.01)
    free, paid = (
        offers(servers, rtts, prompt_tokens=100, new_tokens=9, position_bytes=size)
        for size in (0, 1024)
    )
    assert [paid[name].fixed - free[name].fixed for name in paid] == pytest.approx(
        [100 * 1024 * 1e-7 + 10 / kibibytes for kibibytes in (1000, 3000, 2000)]
    )


def test_one_client_in_four_believes_a_claim_and_no_more_than_four_times_the_usual() -> None:
    servers = [server(f"honest{i}", "0:8", throughput=125.0, batch_throughput=1e3) for i in "abc"]
    servers.append(server("liar", "0:8", throughput=5e7, batch_throughput=1e9))
    lots = random.Random(3)
    claims = [offers(servers, book(), lots.random(), rows=16)["liar"] for _ in range(400)]
    usual = offers(servers, book(), rows=16)["honesta"].block_seconds
    times = [usual / claim.block_seconds for claim in claims]
    assert {claim.source for claim in claims} == {"doubted"}
    believers = sum(each > 1.01 for each in times) / len(times)
    assert 0.18 < believers < 0.32
    assert min(times) == pytest.approx(1.0)
    assert max(times) < 16  # of the time alone, and of what a row adds to it


def test_the_hops_that_a_stranger_would_spare_by_holding_more_are_charged_until_it_was_seen() -> (
    None
):
    servers = [server(f"usual{i}", "0:8", throughput=10.0) for i in "abc"]
    servers.append(server("large", "0:16", throughput=5.0))
    peers = book(usuala=0.05, usualb=0.05, usualc=0.05, large=0.05)
    found = offers(servers, peers, new_tokens=99)
    spared = 100 * 0.05 * (1 / 8 - 1 / 16)
    assert found["large"].per_block - found["usuala"].per_block == pytest.approx(spared)
    for name in ("large", "usuala"):
        peers.worked(name, 1, 0.1, 8)
    found = offers(servers, peers, new_tokens=99)
    assert found["large"].per_block == pytest.approx(found["usuala"].per_block)


def test_who_has_more_room_is_chosen_more_often_among_equals() -> None:
    servers = [server("large", "0:8", free_tokens=4 * 48), server("small", "0:8", free_tokens=48)]
    lots = random.Random(1)
    chosen = [route(servers, request("0:8"), tiebreak=lots.random())[0][0] for _ in range(1000)]
    assert 700 < chosen.count("large") < 900  # four of five


def shares(servers: Sequence[SignedRecord], clients: Sequence[PeerBook]) -> dict[str, float]:
    """Which part of all clients chooses each of some servers."""
    lots, chart = random.Random(2), Chart(servers)
    chosen = [
        hop.server.record.peer_id
        for peers in clients
        for hop in find_route(chart, request("0:8"), peers, 0.0, tiebreak=lots.random())
    ]
    return {name: chosen.count(name) / len(clients) for name in set(chosen)}


@settings(max_examples=10, deadline=None)
@given(
    st.integers(2, 12),
    st.floats(101.0, 1e9),
    st.floats(0.0, 1e9),
    st.integers(0, 8),
    st.booleans(),
)
def test_a_liars_share_is_bounded_and_gone_when_its_first_steps_were_seen(
    honest: int, claim: float, batch: float, measured: int, unmeasured_rtt: bool
) -> None:
    names = [f"honest-{i:02}" for i in range(honest)]
    lies = {peer_tag(name): 0 for name in names[:6]}
    liar = server("liarliar", "0:8", throughput=claim, batch_throughput=batch, next_rtts=lies)
    servers = [liar, *(server(name, "0:8", throughput=100.0, queue=0) for name in names)]
    clients = [PeerBook(random.Random(i)) for i in range(100)]
    for peers in clients:
        for name in names[:measured]:
            peers.worked(name, 1, 1 / 100.0, 8)
        if not unmeasured_rtt:
            for name in [*names, "liarliar"]:
                peers.measured(name, 0.02)
    # One client in four believes it; to the others it is as good as all others, or nearly.
    assert shares(servers, clients).get("liarliar", 0.0) < 1 / 4 + 1 / (honest + 1) + 0.1
    for peers in clients:  # it took ten times as long as the others, whatever it says
        peers.measured("liarliar", 0.02)
        peers.worked("liarliar", 1, 0.0, 8, elapsed=0.02 + 10 / 100.0)
    assert "liarliar" not in shares(servers, clients)


def test_how_slow_somebody_was_is_forgotten_in_time() -> None:
    servers = [server("once", "0:8"), server("other", "0:8", throughput=50.0)]
    peers = book()
    peers.worked("once", 1, 10.0, 8, now=0.0)
    wanted = request("0:8")
    assert find_route(servers, wanted, peers, 600.0)[0].server.record.peer_id == "other"
    assert find_route(servers, wanted, peers, 601.0)[0].server.record.peer_id == "once"


def test_an_adapter_draws_sessions_to_who_has_it_by_what_sending_it_would_take() -> None:
    poet = Adapter("poet", b"12345678")
    having = server("having", "0:8", adapters=(Adapter("other", bytes(8)), poet))
    servers, peers = [server("lacking", "0:8"), having], book(lacking=0.01, having=0.02)
    assert route(servers, request("0:8"), peers) == [("lacking", "0:8")]
    small, large = (
        request("0:8", adapter=poet.id + bytes(24), adapter_bytes=size) for size in (1e3, 1e8)
    )
    assert route(servers, small, peers) == [("lacking", "0:8")]
    assert route(servers, large, peers) == [("having", "0:8")]
    # Who has lent it there need not again, wherever others have it.
    hops = [RouteHop(servers[0], BlockRange(0, 8))]
    assert find_better(hops, Chart(servers), large, 10, peers, 0.0) is None
    only = request("0:8", adapter=poet.id + bytes(24), adapter_bytes=None)
    assert route(servers, only, peers) == [("having", "0:8")]
    with pytest.raises(NoRoute, match="announces adapter 3132333435363738"):
        route(servers[:1], only, peers)
