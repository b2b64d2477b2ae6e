"""What announcer and directory need of a DHT, and a DHT in memory for tests of all who use one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swarm.errors import PeerUnavailable
from swarm.identity import SwarmKey


class Dht(Protocol):
    """`swarm.dht.node.DhtNode` seen from above; see there."""

    key: SwarmKey | None

    def now(self) -> float: ...
    async def store(self, keys: Sequence[str], value: bytes, kept_until: float) -> bool: ...
    async def get_many(
        self, keys: Sequence[str], replicas: int | None = None
    ) -> dict[str, list[bytes]]: ...


Values = dict[str, dict[str, tuple[bytes, float]]]


class MemoryDht:
    """One peer's view of `values`, which several may share. Its clock stands until it is set."""

    def __init__(
        self, peer_id: str, values: Values | None = None, key: SwarmKey | None = None
    ) -> None:
        self.key, self.values = key, values if values is not None else {}
        self.time = 1_800_000_000.0
        self.down = False  # True: nobody answers
        self.asked: list[list[str]] = []  # the keys of each look
        self._peer_id = peer_id

    def now(self) -> float:
        return self.time

    async def store(self, keys: Sequence[str], value: bytes, kept_until: float) -> bool:
        self._check_up()
        stored = True
        for key in keys:
            subkeys = self.values.setdefault(key, {})
            if self._peer_id in subkeys and subkeys[self._peer_id][1] >= kept_until:
                stored = False  # as Kademlia nodes do: what is kept longest stays
            else:
                subkeys[self._peer_id] = (value, kept_until)
        return stored

    async def get_many(
        self, keys: Sequence[str], replicas: int | None = None
    ) -> dict[str, list[bytes]]:
        self._check_up()
        self.asked.append(list(keys))
        return {
            key: [value for value, until in self.values.get(key, {}).values() if until > self.time]
            for key in keys
        }

    def _check_up(self) -> None:
        if self.down:
            raise PeerUnavailable("no peer of the swarm answers any more")
