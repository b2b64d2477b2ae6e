"""Swarms that are only said to be: what a monitor sees, without keys, processes or a DHT."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm.dht.directory import SwarmView
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.types import BlockRange, ModelId, Numerics

NOW = 1_800_000_000.0  # seconds since 1970
MODEL = ModelId("Qwen/Qwen3-8B", "9040a435" * 8)
NAMES = ("Ada's attic", "库房", "garage-3", "", "lab 4090", "Ω-node", "مختبر", "basement", "")


def record(index: int, blocks: str = "0:8", num_blocks: int = 24, **fields: Any) -> ServerRecord:
    """A record of a server that nobody runs. `fields` are not judged, so that they may be bad."""
    usual: dict[str, Any] = {
        "peer_id": f"QmSimulated{index:035}",
        "model": MODEL,
        "blocks": BlockRange.parse(blocks),
        "num_blocks": num_blocks,
        "host": "192.0.2.7",
        "port": 4000,
        "certificate_digest": b"d" * 32,
        "numerics": Numerics("bfloat16"),
        "state": ServerState.ONLINE,
        "throughput": 60.0,
        "batch_throughput": 240.0,
        "free_tokens": 100_000,
        "version": "0.1.0",
        "public_name": NAMES[index % len(NAMES)],
        "announced_at": int(NOW * 1000),
        "lifetime": 90,
    }
    return ServerRecord.model_construct(**(usual | fields))


def records(count: int, num_blocks: int, seed: int = 0) -> list[ServerRecord]:
    """Servers of all sizes, in any state, that hold most of a model."""
    rng = random.Random(seed)
    found: list[ServerRecord] = []
    for index in range(count):
        length = min(num_blocks, rng.choice((4, 4, 8, 8, 12, 16)))
        start = rng.randrange(0, num_blocks - length + 1)
        lot = rng.random()
        state = ServerState.ONLINE if lot < 0.94 else ServerState.JOINING
        state = ServerState.DRAINING if lot > 0.98 else state
        speed = rng.lognormvariate(6.0, 0.6)
        found.append(
            record(
                index,
                f"{start}:{start + length}",
                num_blocks,
                state=state,
                throughput=speed / length,
                batch_throughput=4 * speed / length,
                queue=rng.randrange(0, 4),
                free_tokens=rng.randrange(0, 500_000),
            )
        )
    return found


@dataclass
class Records:
    """Stands in for a `Directory`, and for the DHT behind it: tests change `records`."""

    records: Sequence[ServerRecord] = ()
    silent: frozenset[str] = frozenset()
    model: ModelId = MODEL
    num_blocks: int = 24
    time: float = NOW
    views: list[SwarmView] = field(default_factory=list[SwarmView])

    @property
    def view(self) -> SwarmView:
        signed = tuple(SignedRecord(record, b"") for record in self.records)
        return SwarmView(self.model, self.num_blocks, signed, self.silent)

    async def refresh(self) -> SwarmView:
        return self.view
