"""The DHT's cost: searches find what they should, and what must not grow does not."""

from __future__ import annotations

import numpy as np
import pytest

from simulation.kademlia import BUCKET, REPLICAS, Overlay, Traffic, traffic


@pytest.mark.parametrize("nodes", [1, 7, 50, 2000])
def test_a_search_finds_the_nearest_nodes(nodes: int) -> None:
    overlay, rng = Overlay(nodes, 1), np.random.default_rng(2)
    for _ in range(20):
        start, key = int(rng.integers(nodes)), int(rng.integers(0, 1 << 63))
        nearest = np.argsort(overlay.ids ^ np.uint64(key))[:REPLICAS]
        asked = overlay.search(start, key)
        assert len(asked) == len(set(asked))
        assert set(nearest.tolist()) - {start} <= set(asked)


def test_nobody_knows_itself_or_more_than_a_bucket_per_distance() -> None:
    overlay = Overlay(500, 3)
    for place in (0, 17, 499):
        table = overlay.table(place)
        assert overlay.ids[place] not in table
        distances = np.floor(np.log2((table ^ overlay.ids[place]).astype(float)))
        assert np.unique(distances, return_counts=True)[1].max() == BUCKET


def test_nothing_grows_from_a_thousand_servers_to_ten_thousand() -> None:
    """Issue 4: announcements and look-ups per server at 10,000 servers are bounded."""
    small, large = traffic(1000, 2000, 80), traffic(10_000, 20_000, 80)
    for field in Traffic.__slots__:
        assert getattr(large, field) < 1.5 * getattr(small, field), field
    assert large.announcing < 3e3  # bytes/s
    assert max(large.looking, large.client) < 50e3
    assert large.keeping < 400e3
