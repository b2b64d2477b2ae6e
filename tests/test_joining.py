"""However people write down the peers of their swarm, they are found."""

from __future__ import annotations

import pytest

from swarm.joining import initial_peers_of


def test_peers_come_as_a_list_as_one_text_or_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWARM_PEERS", "/ip4/1, /ip4/2\n/ip4/3 ")
    assert initial_peers_of(None) == initial_peers_of([]) == ("/ip4/1", "/ip4/2", "/ip4/3")
    assert initial_peers_of(["/ip4/4,/ip4/5", "/ip4/6"]) == ("/ip4/4", "/ip4/5", "/ip4/6")
    assert initial_peers_of("/ip4/4,/ip4/5") == ("/ip4/4", "/ip4/5")
