"""Which clients' adapters a server keeps: by client and hash, within a budget. Pure bookkeeping.

What a loan holds stays. Of the rest, those that were not used for longest make room.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.messages_training import BundleSpec
from swarm.models.adapters import Adapter, BlockAdapter
from swarm.models.bundles import Resident, id_of
from swarm.server.holdings import Holdings
from swarm.types import BlockRange

_Key = tuple[str, bytes, int]  # client, digest, block


@dataclass(slots=True)
class _Kept:
    """A bundle that came, and how many loans have it."""

    adapter: BlockAdapter
    size: int
    loans: int = 0


@dataclass(slots=True, eq=False)
class Loan:
    """An adapter in some blocks, that a client may use as long as anybody holds the loan."""

    client: str
    id: bytes
    blocks: BlockRange
    missing: list[BundleSpec]  # which are to come
    size: int  # of what is not preloaded here
    keys: list[_Key] = field(default_factory=list[_Key])
    adapter: dict[int, BlockAdapter] = field(default_factory=dict[int, BlockAdapter])
    holders: int = 0


class Stock:
    """At most `budget` bytes are kept, those that come included; one client may have half of what
    no others hold."""

    def __init__(self, budget: int, residents: Sequence[Resident] = ()) -> None:
        self.budget = budget
        self.dropped = 0  # bundles that made room
        self._holdings = Holdings(budget)
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._loans: list[Loan] = []
        self._residents = {resident.id: resident for resident in residents}
        self._shared = {
            (digest, block): resident.adapter[block]
            for resident in residents
            for block, digest in resident.digests.items()
        }

    @property
    def kept_bytes(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    def __len__(self) -> int:
        """Loans that somebody holds."""
        return len(self._loans)

    @contextmanager
    def lent(self, client: str, blocks: BlockRange, specs: Iterable[BundleSpec]) -> Generator[Loan]:
        """Inside, what of an adapter with these bundles is here stays, and what is `missing` of it
        in `blocks` has room. Raises RemoteProtocolError BUSY, OVERSIZE."""
        every = tuple(specs)
        own = [spec for spec in every if blocks.start <= spec.block < blocks.end]
        shared = [spec for spec in own if (spec.digest, spec.block) in self._shared]
        bound = [spec for spec in own if spec not in shared]
        size, most = sum(spec.size for spec in bound), self.budget // 2
        if size > most:
            raise RemoteProtocolError(
                ErrorCode.OVERSIZE, f"adapters of {size:,} bytes; at most {most:,} can be kept"
            )
        loan = Loan(client, id_of(every), blocks, bound, size)
        loan.adapter |= {spec.block: self._shared[spec.digest, spec.block] for spec in shared}
        with self._held(loan):
            for spec in bound.copy():
                kept = self._kept.get((client, spec.digest, spec.block))
                if kept is not None and kept.size == spec.size:
                    self._hold(loan, spec, kept)
            self._make_room()
            yield loan

    def add(self, loan: Loan, spec: BundleSpec, adapter: BlockAdapter) -> None:
        """A bundle that was missing has come."""
        # Another loan of the same may have been quicker.
        key = loan.client, spec.digest, spec.block
        kept = self._kept.setdefault(key, _Kept(adapter, spec.size))
        self._hold(loan, spec, kept)

    @contextmanager
    def borrowed(
        self, client: str, name: bytes | None, blocks: BlockRange
    ) -> Generator[Adapter | None]:
        """What is preloaded or was lent under that hash, all that it has in `blocks`; inside, it is
        not taken back. Raises RemoteProtocolError UNKNOWN_ADAPTER."""
        if name is None:
            yield None
            return
        if (resident := self._residents.get(name)) is not None:
            yield resident.adapter
            return
        for loan in self._loans:
            whole = not loan.missing and loan.blocks.contains(blocks)
            if (loan.client, loan.id) == (client, name) and whole:
                with self._held(loan):
                    yield loan.adapter
                return
        raise RemoteProtocolError(
            ErrorCode.UNKNOWN_ADAPTER,
            f"adapter {name.hex()[:16]} is not here for blocks {blocks}: lend it first, or ask a "
            "server that announces it",
        )

    @contextmanager
    def _held(self, loan: Loan) -> Generator[None]:
        if not loan.holders:
            self._holdings.take(loan.client, loan.size)
            self._loans.append(loan)
        loan.holders += 1
        try:
            yield
        finally:
            loan.holders -= 1
            if not loan.holders:
                self._loans.remove(loan)
                self._holdings.give(loan.client, loan.size)
                for key in loan.keys:
                    self._kept[key].loans -= 1
                loan.keys.clear()
                loan.adapter = {}  # whoever still computes with the old one may finish

    def _hold(self, loan: Loan, spec: BundleSpec, kept: _Kept) -> None:
        key = loan.client, spec.digest, spec.block
        kept.loans += 1
        self._kept.move_to_end(key)
        loan.keys.append(key)
        loan.adapter[spec.block] = kept.adapter
        loan.missing.remove(spec)

    def _make_room(self) -> None:
        """All that is held has room, and what comes; of the others only as much as is left."""
        free = [key for key, kept in self._kept.items() if not kept.loans]
        room = self._holdings.left
        spare = sum(self._kept[key].size for key in free)
        for key in free:
            if spare <= room:
                break
            spare -= self._kept.pop(key).size
            self.dropped += 1

    def check_integrity(self) -> None:
        """Raises LocalProtocolError if what is kept, held and promised does not add up."""
        counts = Counter(key for loan in self._loans for key in loan.keys)
        if any(kept.loans != counts.pop(key, 0) for key, kept in self._kept.items()) or counts:
            raise LocalProtocolError("loans hold other bundles than are kept for them")
        promised = sum(loan.size for loan in self._loans)
        if self._holdings.left != self.budget - promised:
            raise LocalProtocolError(f"{promised} bytes are lent, {self._holdings.left} are left")
        coming = sum(spec.size for loan in self._loans for spec in loan.missing)
        if self.kept_bytes + coming > self.budget:
            raise LocalProtocolError(f"{self.kept_bytes} of {self.budget} bytes, {coming} to come")
