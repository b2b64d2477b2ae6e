"""The DHT's cost: searches find what they should, and what must not grow does not."""

from __future__ import annotations

import numpy as np
import pytest

from simulation.kademlia import BUCKET, REPLICAS, Overlay, traffic


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


def test_a_search_hardly_grows_with_the_swarm() -> None:
    small, large = traffic(300, 300, 80), traffic(3000, 3000, 80)
    assert large.messages < 1.3 * small.messages
    assert large.announcing < 1.3 * small.announcing
