"""How those who average together find each other in the DHT, and know each other again.

They write records of the kind that servers write, so that every node keeps and checks them: the
"model" is what they average, its one block is served by nobody, and no registry names it. A record
is signed by its peer and, in a private swarm, sealed with the key: who shows one belongs to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarm.dht.memory import Dht
from swarm.dht.records import (
    MAX_LIFETIME,
    ServerRecord,
    ServerState,
    SignedRecord,
    dht_key,
    open_record,
    sign_record,
)
from swarm.errors import InvalidRecord
from swarm.identity import Identity
from swarm.types import BlockRange, ModelId

MAX_GATHER = MAX_LIFETIME - 60.0  # seconds for others to come: a record must outlive them
_NAME = "averaging"
_NOWHERE = {"host": "-", "port": 1, "certificate_digest": bytes(32)}  # nobody serves anything


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody in a round: with how many samples they weigh in, and whether others can dial them,
    so that they sum up a part for all."""

    peer_id: str
    samples: int
    listens: bool


class Meeting:
    """Where those meet who average the same `layout` (a hash of names and shapes) as `run_id`.

    `gather` is how long they wait for each other, in seconds. Of `dht` its clock and key are used.
    """

    def __init__(
        self, run_id: str, layout: bytes, identity: Identity, dht: Dht, gather: float
    ) -> None:
        self.layout = hashlib.sha256(f"averaging-1 {run_id}\n".encode() + layout).digest()
        self._model = ModelId(_NAME, hashlib.sha256(self.layout).hexdigest())
        self.key = dht_key(self._model, 0, "", dht.key)
        self._identity, self._dht = identity, dht
        self._lifetime = math.ceil(gather) + 30
        self._announced_at = 0

    def notice(self, until: float, *, looking: bool) -> SignedRecord:
        """That we wait for others, or do not any more, `until` then by the swarm's clock."""
        announced = round((until - self._lifetime) * 1000)
        self._announced_at = max(self._announced_at + 1, announced)  # nodes keep the newest
        state = ServerState.ONLINE if looking else ServerState.OFFLINE
        return self._sign(state, self._announced_at)

    def introduction(self) -> bytes:
        """Shown to those whom we meet; they know that it is ours by the connection's peer id."""
        return self._sign(ServerState.JOINING, round(self._dht.now() * 1000)).data

    def member(self, peer_id: str, samples: int, listens: bool, introduction: bytes) -> Member:
        """Raises InvalidRecord for who does not belong here."""
        record = open_record(introduction, key=self._dht.key, now=self._dht.now())
        if record.peer_id != peer_id or record.model != self._model:
            raise InvalidRecord(f"{peer_id} shows the introduction of others, or for another run")
        return Member(peer_id, samples, listens)

    def waiting(self, found: Sequence[bytes]) -> list[tuple[str, float]]:
        """Peer ids of who waits for others, and until when, by the swarm's clock (seconds)."""
        waiting: list[tuple[str, float]] = []
        for data in found:
            try:
                record = open_record(data, key=self._dht.key, now=self._dht.now())
            except InvalidRecord:
                continue
            if record.state is ServerState.ONLINE and record.model == self._model:
                waiting.append((record.peer_id, record.expires_at))
        return waiting

    def _sign(self, state: ServerState, announced_at: int) -> SignedRecord:
        record = ServerRecord(
            peer_id=self._identity.peer_id,
            model=self._model,
            blocks=BlockRange(0, 1),
            num_blocks=1,
            state=state,
            announced_at=announced_at,
            lifetime=self._lifetime,
            **_NOWHERE,  # pyright: ignore[reportArgumentType]
        )
        return sign_record(record, self._identity, self._dht.key)


def layout_of(parameters: Iterable[tuple[str, Sequence[int], object]]) -> bytes:
    """32 bytes that are the same only if names, shapes and dtypes are, and in this order."""
    told = "\n".join(f"{name} {list(shape)} {dtype}" for name, shape, dtype in parameters)
    return hashlib.sha256(told.encode()).digest()
