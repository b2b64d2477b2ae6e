"""How batches that are trained with share servers, where computing is a wait: in a clock that jumps
from one event to the next, so that it depends on no machine."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from swarm.client.training import Batch, TrainingClient
from swarm.client.training_loans import Loans
from swarm.client.training_plan import BACKWARD, RETURN, Leg, Workers
from swarm.types import BlockRange

_SECONDS = 2e-4  # that a server computes for a token and block: a row of 128 takes four 0.1 s
_REQUEST = 0.01  # seconds that a request costs besides


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Nothing is waited for but time, and that passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


@dataclass(slots=True)
class _Servers:
    """Post and market of a `TrainingClient`, with servers that compute one request at a time."""

    spans: Sequence[BlockRange]
    rows: list[Any] = field(default_factory=list[Any])
    busy: dict[str, asyncio.Lock] = field(default_factory=dict[str, asyncio.Lock])
    terms: Any = field(default_factory=lambda: SimpleNamespace(whole_steps=False))

    def __post_init__(self) -> None:
        for index, blocks in enumerate(self.spans):
            record = SimpleNamespace(
                peer_id=str(index), blocks=blocks, throughput=0.0, batch_throughput=0.0
            )
            self.rows.append(SimpleNamespace(record=record))
            self.busy[str(index)] = asyncio.Lock()

    def holders(self, _: Any) -> Sequence[Any]:
        return self.rows

    async def ask(
        self,
        leg: Leg,
        tensors: Mapping[str, Tensor],
        _loan: bytes | None,
        answer: Mapping[str, Any],
        *,
        keep: bool,
    ) -> tuple[Mapping[str, Tensor], _Held | None]:
        passes = BACKWARD if "gradient" in tensors else 1.0
        found = await self.compute(leg, passes * tensors["hidden"][..., 0].numel(), answer)
        return found, _Held(self, leg) if keep else None

    async def compute(
        self, leg: Leg, tokens: float, answer: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        async with self.busy[leg.server.record.peer_id]:
            await asyncio.sleep(tokens * len(leg.blocks) * _SECONDS)
        await asyncio.sleep(_REQUEST)
        return {name: torch.zeros(spec.shape) for name, spec in answer.items()}


@dataclass(frozen=True, slots=True)
class _Held:
    """What a `training_hop.Held` does, once."""

    servers: _Servers
    leg: Leg
    asked: bool = False

    async def back(self, gradient: Tensor, answer: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return await self.servers.compute(self.leg, RETURN * gradient[..., 0].numel(), answer)


def tokens_per_second(
    spans: Sequence[BlockRange], rows: int, length: int, batches: int = 8
) -> float:
    """Forward and back through all blocks, once it is known how quick everybody is."""
    loop = asyncio.SelectorEventLoop(selector := _Jumping())
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    servers: Any = _Servers(spans)
    client = TrainingClient(servers, servers, Workers(), servers, Loans())
    whole = BlockRange(0, max(span.end for span in spans))
    batch = Batch(whole, torch.zeros(rows, length, 8), returns=True)

    async def train() -> None:
        _, trails = await client.forward(batch)
        await client.backward(trails, batch.hidden)

    try:
        for _ in range(batches):
            loop.run_until_complete(train())
        begin = loop.time()
        for _ in range(batches):
            loop.run_until_complete(train())
        return batches * rows * length / (loop.time() - begin)
    finally:
        loop.close()
