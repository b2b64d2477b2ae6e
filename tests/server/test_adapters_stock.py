"""Adapters that servers keep: within their budget, never taken from who uses them, each client's
own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.messages_training import BundleSpec
from swarm.models.adapters import BlockAdapter
from swarm.models.bundles import Resident, id_of
from swarm.server.adapters_stock import Loan, Stock
from swarm.types import BlockRange

WHOLE = BlockRange(0, 4)
BUDGET = 100


def specs(kind: int, size: int = 10) -> tuple[BundleSpec, ...]:
    """Adapter number `kind`, of two blocks."""
    return tuple(BundleSpec(block=b, digest=bytes([kind, b] * 16), size=size) for b in (1, 2))


def fill(stock: Stock, loan: Loan) -> None:
    for spec in list(loan.missing):
        stock.add(loan, spec, BlockAdapter({}))


class Clients(RuleBasedStateMachine):
    """Any number of clients lend, use and leave, in any order, some before all has come."""

    def __init__(self) -> None:
        super().__init__()
        self.stock = Stock(BUDGET)
        self.loans: list[tuple[ExitStack, Loan, int]] = []
        self.uses: list[tuple[ExitStack, Any]] = []

    @rule(
        client=st.sampled_from("abc"),
        kind=st.integers(0, 5),
        size=st.integers(1, 40),
        end=st.integers(1, 4),
        comes=st.booleans(),
    )
    def lend(self, client: str, kind: int, size: int, end: int, comes: bool) -> None:
        stack = ExitStack()
        kind += 6 * size  # what has another size has another hash
        try:
            loan = stack.enter_context(
                self.stock.lent(client, BlockRange(0, end), specs(kind, size))
            )
        except RemoteProtocolError as error:
            # Whether it comes to that is the history's doing.
            assert error.code in (ErrorCode.BUSY, ErrorCode.OVERSIZE)  # noqa: PT017
            return
        if comes:
            fill(self.stock, loan)
        self.loans.append((stack, loan, kind))

    @rule(place=st.integers(0, 9))
    def come(self, place: int) -> None:
        if self.loans:
            fill(self.stock, self.loans[place % len(self.loans)][1])

    @rule(place=st.integers(0, 9))
    def end(self, place: int) -> None:
        if self.loans:
            self.loans.pop(place % len(self.loans))[0].close()

    @rule(place=st.integers(0, 9))
    def use(self, place: int) -> None:
        if self.loans:
            _, loan, _ = self.loans[place % len(self.loans)]
            stack = ExitStack()
            try:
                borrowed = self.stock.borrowed(loan.client, loan.id, loan.blocks)
                adapter = stack.enter_context(borrowed)
            except RemoteProtocolError as error:
                assert error.code is ErrorCode.UNKNOWN_ADAPTER  # noqa: PT017
                assert loan.missing
            else:
                self.uses.append((stack, adapter))

    @rule(place=st.integers(0, 9))
    def stop(self, place: int) -> None:
        if self.uses:
            self.uses.pop(place % len(self.uses))[0].close()

    @invariant()
    def adds_up(self) -> None:
        self.stock.check_integrity()
        assert self.stock.kept_bytes <= BUDGET
        for _, loan, _ in self.loans:
            assert len(loan.adapter) == len(loan.keys)

    def teardown(self) -> None:
        for stack, *_ in (*self.loans, *self.uses):
            stack.close()
        self.stock.check_integrity()
        assert len(self.stock) == 0


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_what_is_used_outlives_its_loan_and_the_least_used_goes_first() -> None:
    stock = Stock(BUDGET)
    with ExitStack() as using:
        with stock.lent("a", WHOLE, specs(0)) as loan:
            fill(stock, loan)
            adapter = using.enter_context(stock.borrowed("a", loan.id, WHOLE))
        for kind in range(1, 9):  # which want more than there is
            with stock.lent("b", WHOLE, specs(kind)) as other:
                fill(stock, other)
        assert adapter is not None
        assert set(adapter) == {1, 2}
        assert stock.dropped == 8
    with stock.lent("a", WHOLE, specs(0)) as loan:
        assert not loan.missing
    with stock.lent("b", WHOLE, specs(8)) as last, stock.lent("b", WHOLE, specs(1)) as first:
        assert not last.missing
        assert first.missing


def test_half_of_an_adapter_is_not_lent() -> None:
    stock = Stock(BUDGET)
    with stock.lent("a", WHOLE, specs(0)) as loan:
        borrowed = stock.borrowed("a", loan.id, WHOLE)
        with pytest.raises(RemoteProtocolError, match="lend it first") as error, borrowed:
            pass
        assert error.value.code is ErrorCode.UNKNOWN_ADAPTER
        fill(stock, loan)
        with pytest.raises(RemoteProtocolError), stock.borrowed("b", loan.id, WHOLE):
            pass
        with stock.borrowed("a", loan.id, BlockRange(1, 2)):
            pass
    with pytest.raises(RemoteProtocolError), stock.borrowed("a", loan.id, WHOLE):
        pass


def test_what_the_owner_preloaded_is_everybody_s_and_never_goes() -> None:
    parts = specs(0, size=1000)
    factors = {"q_proj": (torch.ones(1, 2), torch.ones(2, 1))}
    own = {spec.block: BlockAdapter(factors) for spec in parts}
    digests = {spec.block: spec.digest for spec in parts}
    resident = Resident("poet", id_of(parts), digests, own, 2000)
    stock = Stock(BUDGET, [resident])
    with stock.borrowed("anybody", resident.id, BlockRange(1, 3)) as adapter:
        assert adapter == own
    with stock.lent("a", WHOLE, parts) as loan:  # who has it sends nothing, and takes no room
        assert not loan.missing
        assert loan.adapter == own
        stock.check_integrity()
    assert stock.kept_bytes == 0
    changed = (parts[0], parts[1].model_copy(update={"digest": bytes(32), "size": 10}))
    with stock.lent("a", WHOLE, changed) as loan:
        assert [spec.block for spec in loan.missing] == [2]
        assert loan.id != resident.id
