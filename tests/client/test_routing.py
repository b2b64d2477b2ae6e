"""The quickest chain of servers is found, and if there is none, what is missing is named."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.peers import PeerBook
from swarm.client.routing import Request, RouteHop, find_route, make_offer
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.errors import NoRoute
from swarm.types import BlockRange, ModelId, Numerics

MODEL = ModelId("tiny", "0" * 64)
NUMERICS = Numerics("float32")


def server(name: str, blocks: str, **fields: Any) -> SignedRecord:
    known: dict[str, Any] = {
        "model": MODEL,
        "num_blocks": 100,
        "host": "h",
        "port": 1,
        "certificate_digest": bytes(32),
        "numerics": NUMERICS,
        "throughput": 100.0,
    }
    record = ServerRecord(peer_id=name, blocks=BlockRange.parse(blocks), **(known | fields))
    return SignedRecord(record, b"")


def request(blocks: str, **changes: Any) -> Request:
    plain = Request(MODEL, BlockRange.parse(blocks), NUMERICS, prompt_tokens=16, new_tokens=32)
    return replace(plain, **changes)


def book(**rtts: float) -> PeerBook:
    peers = PeerBook(random.Random(0))
    for name, rtt in rtts.items():
        peers.measured(name, rtt)
    return peers


def route(
    servers: Sequence[SignedRecord], wanted: Request, peers: PeerBook | None = None, **options: Any
) -> list[tuple[str, str]]:
    hops = find_route(servers, wanted, peers or book(), now=0.0, **options)
    return [(hop.server.record.peer_id, str(hop.blocks)) for hop in hops]


def test_one_server_is_better_than_two_that_are_as_fast() -> None:
    servers = [server("a", "0:8"), server("b", "8:16"), server("ab", "0:16", throughput=50.0)]
    assert route(servers, request("0:16")) == [("ab", "0:16")]


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


spans = st.tuples(st.integers(0, 7), st.integers(1, 8)).map(
    lambda span: f"{span[0]}:{span[0] + span[1]}"
)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[SignedRecord], PeerBook]:
    names = "abcde"[: draw(st.integers(0, 5))]
    speeds = st.sampled_from([0.0, 1.0, 10.0, 33.0, 1000.0])
    servers = [
        server(name, draw(spans), throughput=draw(speeds), queue=draw(st.integers(0, 9)))
        for name in names
    ]
    rtts = st.sampled_from([0.001, 0.02, 0.3])
    return servers, book(**{name: draw(rtts) for name in names if draw(st.booleans())})


def all_chains(
    servers: Sequence[SignedRecord], blocks: BlockRange
) -> Iterator[tuple[RouteHop, ...]]:
    for each in servers:
        if each.record.blocks.start <= blocks.start < each.record.blocks.end:
            for end in range(blocks.start + 1, min(each.record.blocks.end, blocks.end) + 1):
                hop = RouteHop(each, BlockRange(blocks.start, end))
                if end == blocks.end:
                    yield (hop,)
                else:
                    for rest in all_chains(servers, BlockRange(end, blocks.end)):
                        yield (hop, *rest)


def seconds(hops: Sequence[RouteHop], wanted: Request, peers: PeerBook) -> float:
    offers = [(make_offer(hop.server, wanted, peers), len(hop.blocks)) for hop in hops]
    return sum(offer.fixed + offer.per_block * length for offer, length in offers)


@settings(max_examples=120)
@given(
    swarms(),
    spans,
    st.sampled_from([(0, 1), (1000, 1), (16, 64)]),
    st.sets(st.sampled_from("abcdef"), max_size=2),
)
def test_the_route_is_the_quickest_of_all_chains(
    swarm: tuple[list[SignedRecord], PeerBook],
    blocks: str,
    tokens: tuple[int, int],
    excluded: set[str],
) -> None:
    servers, peers = swarm
    prompt, new = tokens
    wanted = request(blocks, prompt_tokens=prompt, new_tokens=new, exclude=frozenset(excluded))
    usable = [each for each in servers if each.record.peer_id not in excluded]
    best = min(
        (seconds(hops, wanted, peers) for hops in all_chains(usable, wanted.blocks)), default=None
    )
    if best is None:
        with pytest.raises(NoRoute):
            find_route(servers, wanted, peers, now=0.0)
        return
    hops = find_route(servers, wanted, peers, now=0.0)
    assert seconds(hops, wanted, peers) == pytest.approx(best)
    borders = [wanted.blocks.start, *(hop.blocks.end for hop in hops)]
    assert [hop.blocks.start for hop in hops] == borders[:-1]
    assert borders[-1] == wanted.blocks.end
    for hop in hops:
        assert hop.server.record.blocks.contains(hop.blocks)
        assert hop.server.record.peer_id not in excluded


def test_a_thousand_servers_are_no_burden() -> None:
    lots = random.Random(0)
    servers = [
        server(f"server{i}", f"{start}:{start + lots.randint(4, 20)}", throughput=lots.random())
        for i in range(1000)
        for start in [lots.randint(0, 76)]
    ]
    started = time.perf_counter()
    for _ in range(10):
        find_route(servers, request("0:80"), book(), now=0.0)
    assert (time.perf_counter() - started) / 10 < 0.1  # 0.01 on a quiet machine
