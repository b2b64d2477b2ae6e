"""What all sessions and all training of one model share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from typing import Protocol

from swarm.client.hop import Terms
from swarm.client.pace import Pace
from swarm.client.route import Router
from swarm.client.session import RemoteSession
from swarm.client.training import Market, TrainingClient
from swarm.client.training_hop import Post
from swarm.client.training_loans import Borrowing, Lender, Loans
from swarm.client.training_plan import Workers
from swarm.config import ClientConfig
from swarm.errors import UsageError
from swarm.identity import Access
from swarm.loop import BackgroundLoop
from swarm.messages import MAX_BATCH, MAX_TOKENS
from swarm.models.bundles import Bundles
from swarm.transport import Transport
from swarm.types import BlockRange


class Dispatcher(Router, Market, Protocol):
    """Where sessions go, and what is trained with."""


@dataclass(frozen=True, slots=True)
class Connection:
    """What all sessions of one model share; `router`'s methods are called on the loop only."""

    terms: Terms  # of a session with one row and one position
    router: Dispatcher
    transport: Transport
    access: Access
    config: ClientConfig
    pace: Pace = field(default_factory=Pace)
    workers: Workers = field(default_factory=Workers)  # who train for us
    loans: Loans = field(default_factory=Loans)  # of our adapters

    @property
    def loop(self) -> BackgroundLoop:
        return BackgroundLoop.shared()

    @property
    def lender(self) -> Lender:
        patience = self.config.timeouts.step
        return Lender(self.terms, self.transport, self.access, patience)

    @property
    def training(self) -> TrainingClient:
        post = Post(self.terms, self.transport, self.access, self.config)
        return TrainingClient(post, self.router, self.workers, self.lender, self.loans)

    def open(
        self, blocks: BlockRange, batch_size: int, max_length: int, bundles: Bundles | None = None
    ) -> RemoteSession:
        """A session; with `bundles` whoever serves it has this adapter. Raises UsageError."""
        if batch_size > MAX_BATCH:
            raise UsageError(f"{batch_size} rows; a session may have {MAX_BATCH}: ask for fewer")
        terms = replace(
            self.terms,
            batch_size=batch_size,
            max_length=min(max_length, MAX_TOKENS),
            trace_id=secrets.token_hex(8),
            adapter=Borrowing(bundles, self.lender, self.loans) if bundles else None,
        )
        return RemoteSession(
            blocks, terms, self.router, self.transport, self.access, self.config, self.pace
        )
