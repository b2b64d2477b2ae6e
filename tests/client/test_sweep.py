"""Of all chains of servers it is the cheapest one, wherever borders lie and links differ."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.peers import PeerBook
from swarm.client.pricing import Prices
from swarm.client.routing import Chart, RouteHop, find_route
from swarm.dht.records import SignedRecord
from swarm.errors import NoRoute
from swarm.types import BlockRange
from tests.client.market import MODEL, NUMERICS, book, request, server

spans = st.tuples(st.integers(0, 7), st.integers(1, 8)).map(
    lambda span: f"{span[0]}:{span[0] + span[1]}"
)
NAMES = [f"server-{letter}" for letter in "abcde"]


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[SignedRecord], PeerBook]:
    names = NAMES[: draw(st.integers(0, 5))]
    speeds = st.sampled_from([0.0, 1.0, 10.0, 33.0, 1000.0])
    near = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0, 5, 50, 900]), max_size=4)
    servers = [
        server(
            name,
            draw(spans),
            throughput=draw(speeds),
            queue=draw(st.integers(0, 9)),
            next_rtts=draw(near),
            coordinates=draw(st.none() | st.tuples(*[st.integers(-900, 900)] * 3, st.just(20))),
        )
        for name in names
    ]
    rtts = st.sampled_from([0.001, 0.02, 0.3])
    peers = book(**{name: draw(rtts) for name in names if draw(st.booleans())})
    peers.coordinates = draw(st.sampled_from([None, (0.01, 0.0, 0.0, 0.002)]))
    return servers, peers


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


def seconds(hops: Sequence[RouteHop], prices: Prices) -> float:
    places = [prices.holders.ids.index(hop.server.record.peer_id) for hop in hops]
    extra = sum(prices.extra_between(*pair) for pair in pairwise(places))
    return extra + sum(
        float(prices.fixed[place] + prices.per_block[place] * len(hop.blocks))
        for place, hop in zip(places, hops, strict=True)
    )


@settings(max_examples=150, deadline=None)
@given(
    swarms(),
    spans,
    st.sampled_from([(0, 1), (1000, 1), (16, 64)]),
    st.sets(st.sampled_from([*NAMES, "server-f"]), max_size=2),
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
    chains = list(all_chains(usable, wanted.blocks))
    if not chains:
        with pytest.raises(NoRoute):
            find_route(servers, wanted, peers, now=0.0)
        return
    prices = Prices(Chart(servers).holders(MODEL, NUMERICS), wanted, peers, 0.0, 0.0)
    best = min(seconds(hops, prices) for hops in chains)
    hops = find_route(servers, wanted, peers, now=0.0)
    assert seconds(hops, prices) == pytest.approx(best)
    borders = [wanted.blocks.start, *(hop.blocks.end for hop in hops)]
    assert [hop.blocks.start for hop in hops] == borders[:-1]
    assert borders[-1] == wanted.blocks.end
    for hop in hops:
        assert hop.server.record.blocks.contains(hop.blocks)
        assert hop.server.record.peer_id not in excluded
