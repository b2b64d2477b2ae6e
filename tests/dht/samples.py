"""Peers and records that the DHT's tests talk about."""

from typing import Any

from swarm.dht.records import ServerRecord, SignedRecord, sign_record
from swarm.identity import Identity, SwarmKey
from swarm.types import BlockRange, ModelId

ALICE, BOB, EVE = Identity.ephemeral(), Identity.ephemeral(), Identity.ephemeral()
KEY, OTHER_KEY = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)
MODEL = ModelId("demo", "ab" * 32)
NOW = 1_800_000_000.0  # seconds


def record(
    identity: Identity, blocks: str = "0:8", now: float = NOW, **fields: Any
) -> ServerRecord:
    usual: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "model": MODEL,
        "blocks": BlockRange.parse(blocks),
        "num_blocks": 24,
        "host": "127.0.0.1",
        "port": 4000,
        "certificate_digest": b"d" * 32,
        "announced_at": int(now * 1000),
    }
    return ServerRecord.model_validate(usual | fields)


def signed(
    identity: Identity,
    blocks: str = "0:8",
    now: float = NOW,
    key: SwarmKey | None = None,
    **fields: Any,
) -> SignedRecord:
    return sign_record(record(identity, blocks, now, **fields), identity, key)
