"""A session through a swarm beside the same blocks on this machine: every step must agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from swarm.client.remote import RemoteBlocks
from swarm.config import ServerLimits
from swarm.models.spans import Span, SpanStep
from swarm.types import BlockRange
from tests.inprocess import STEADY, InProcessSwarm, Server, span_of
from tests.models.tiny import LAYERS, tiny_model

THIRDS = ((0, 2), (2, 4), (4, 6))
WHOLE = BlockRange(0, LAYERS)


class House:
    """Six blocks of a tiny model: whole on this machine, in pieces on servers of a swarm."""

    def __init__(
        self,
        family: str = "llama",
        spans: Sequence[tuple[int, int]] = THIRDS * 2,
        limits: ServerLimits | None = None,
    ) -> None:
        self.model = tiny_model(family)
        self.whole = self.local()
        self.swarm = InProcessSwarm(limits=limits)
        self.servers = [self.add(*ends) for ends in spans]

    def add(self, start: int, end: int, **options: bool) -> Server:
        return self.swarm.add(span_of(self.model, start, end), **options)

    def twin(self, batch: int = 1, max_length: int = 128, **options: Any) -> Twin:
        options.setdefault("timeouts", STEADY)
        blocks = self.swarm.blocks(self.whole, WHOLE, **options)
        return Twin(self, blocks, batch, max_length)

    def local(self) -> Span:
        """All blocks once more, for another thread."""
        return span_of(self.model, 0, LAYERS)

    def __enter__(self) -> House:
        return self

    def __exit__(self, *error: object) -> None:
        self.swarm.no_trap()
        try:
            if error[0] is None:
                self.swarm.assert_quiet()
        finally:
            self.swarm.__exit__()


class Twin:
    """`batch` rows; closes its session at the end of a `with`."""

    def __init__(self, house: House, blocks: RemoteBlocks, batch: int, max_length: int) -> None:
        self.swarm = house.swarm
        self.session = blocks.inference_session(max_length)
        self.span: Span = house.whole
        self.cache = self.span.open_cache(WHOLE, batch, 1 << 12)
        self.batch = batch
        self.random = torch.Generator().manual_seed(batch)

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def step(
        self, tokens: int = 1, padding: torch.Tensor | None = None, keep: int | None = None
    ) -> None:
        """New random hidden states of `tokens` positions through both; they agree within 1e-4."""
        shape = (self.batch, tokens, self.span.hidden_size)
        hidden = torch.randn(shape, generator=self.random)
        step = SpanStep(self.cache, hidden, padding=padding)
        expected = self.span.run([step])[0]
        got = self.session.step(hidden, padding=padding, keep=keep)
        real = torch.ones(shape[:2], dtype=torch.bool) if padding is None else padding.bool()
        if keep is not None:
            expected, real = expected[:, -keep:], real[:, -keep:]
        assert got.shape == expected.shape
        torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)

    def rollback(self, position: int) -> None:
        self.session.rollback(position)
        self.cache.crop(position)

    def reorder(self, *rows: int) -> None:
        self.session.reorder(rows)
        self.cache.reorder(rows)

    def serving(self, hop: int) -> Server:
        """Who serves that hop of the present route."""
        peer_id = self.session.hops[hop].peer_id
        return next(server for server in self.swarm.servers if server.peer_id == peer_id)

    def kill(self, hop: int) -> Server:
        server = self.serving(hop)
        self.swarm.cut(server)
        return server
