"""Adapters that servers announce are found by their names, and told apart by their hashes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from swarm.client.adapters import find_adapter
from swarm.dht.records import Adapter, ServerState, SignedRecord
from swarm.errors import PeerUnavailable, UsageError
from tests.client.market import server

POET, OTHER = bytes([7]) * 32, bytes([8]) * 32


class Town:
    """Servers `{name: {adapter: its hash}}`, which say so as well, but for those that are `dead`;
    `liars` say something else."""

    def __init__(self, **adapters: dict[str, bytes]) -> None:
        self.adapters = adapters
        self.dead, self.liars = set[str](), set[str]()
        self.leaving = set[str]()

    def server(self, name: str) -> SignedRecord:
        told = tuple(Adapter(own, digest[:8]) for own, digest in self.adapters[name].items())
        state = ServerState.DRAINING if name in self.leaving else ServerState.ONLINE
        return server(name, "0:8", adapters=told, state=state)

    def ask(self, record: SignedRecord) -> Any:
        name = record.record.peer_id
        if name in self.dead:
            raise PeerUnavailable("it is gone")
        liar = {"poet": POET[:8] + OTHER[:24]} if name in self.liars else None
        return SimpleNamespace(adapters=self.adapters[name] if liar is None else liar)

    def find(self, wanted: str | None) -> bytes | None:
        view: Any = SimpleNamespace(servers=tuple(map(self.server, self.adapters)))
        network: Any = self
        router: Any = SimpleNamespace(view=view)
        found = find_adapter(network, router, wanted)
        return None if found is None else found.id


def test_a_name_is_enough_and_a_server_says_the_whole_hash() -> None:
    town = Town(one={"poet": POET}, two={"poet": POET, "cook": OTHER}, three={})
    assert town.find(None) is None
    assert town.find("poet") == town.find("poet@07") == town.find(f"poet@{POET.hex()[:40]}") == POET
    assert town.find("cook") == OTHER
    town.dead = {"one"}
    assert town.find("poet") == POET
    town.dead = {"one", "two"}
    with pytest.raises(UsageError, match="answers as if it had it"):
        town.find("poet")


def test_a_whole_hash_is_believed_as_it_stands_if_somebody_announces_it() -> None:
    town = Town(one={"poet": POET})
    town.dead = {"one"}
    assert town.find(f"bard@{POET.hex()}") == POET
    with pytest.raises(UsageError, match="no server announces"):  # at once, not after a minute
        town.find(f"poet@{OTHER.hex()}")
    town.dead, town.liars = set(), {"one"}
    assert town.find(f"poet@{POET.hex()}") == POET
    with pytest.raises(UsageError, match="answers as if it had it"):
        town.find(f"poet@{POET.hex()[:40]}")


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("poet", r"several .*'poet': .* poet@0707070707070707 or poet@0808080808080808"),
        ("poet@09", r"announces .*'poet@09' \(they announce cook@07.*, poet@07.*, poet@08"),
        ("", "no server announces an adapter ''"),
        ("gone", "no server announces"),
    ],
)
def test_what_is_not_there_or_not_clear_is_said(wanted: str, why: str) -> None:
    town = Town(
        one={"poet": POET}, two={"poet": OTHER, "cook": POET}, three={"gone": bytes([9]) * 32}
    )
    town.leaving = {"three"}
    with pytest.raises(UsageError, match=why):
        town.find(wanted)
    assert town.find("poet@08") == OTHER
