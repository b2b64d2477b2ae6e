"""Which server a part of a batch goes to next, so that all parts together are done soonest.

Pure. Every part takes the chain that would be through first, given what is on its way to whom: so
servers get work in proportion to their speed, and no server waits for another one's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.dht.records import ServerRecord, SignedRecord
from swarm.types import BlockRange

_UNKNOWN = 1e-3  # seconds per token and block, of a server that says nothing about its speed
_SLOWEST = 100.0  # the same, that anybody may claim: what is infinite is never compared again
_HOP = 0.02  # seconds that a hop costs beside computing
_MEMORY = 0.7  # weight of what was known of a speed when a request has been measured
# Passes that going back takes. Weights are frozen, so that gradients cost as much as one forward...
RETURN = 1.0
BACKWARD = 2.0  # ...and where no graphs were kept, it is forward once more first.


@dataclass(frozen=True, slots=True)
class Leg:
    """`blocks` of what this server holds."""

    server: SignedRecord
    blocks: BlockRange


@dataclass(slots=True)
class _Worker:
    queued: float = 0.0  # seconds of work that is on its way
    pace: float | None = None  # seconds per token and block, as seen


class Workers:
    """What one client has given to whom, and how quick they were."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}

    def next_leg(
        self, servers: Sequence[SignedRecord], blocks: BlockRange, tokens: int
    ) -> Leg | None:
        """The first leg of the chain through `blocks` by which `tokens` are through soonest; None
        if there is none. Each server is used up to its last block."""
        best: dict[int, tuple[float, Leg | None]] = {blocks.start: (0.0, None)}
        borders = sorted({server.record.blocks.end for server in servers} | {blocks.start})
        for at in borders:
            if at not in best or at >= blocks.end:
                continue
            spent, first = best[at]
            for server in servers:
                held = server.record.blocks
                if not held.start <= at < held.end:
                    continue
                leg = Leg(server, BlockRange(at, min(held.end, blocks.end)))
                total = spent + self.expected(leg, tokens)
                if leg.blocks.end not in best or total < best[leg.blocks.end][0]:
                    best[leg.blocks.end] = total, first or leg
        return best.get(blocks.end, (0.0, None))[1]

    def holder(
        self, servers: Sequence[SignedRecord], blocks: BlockRange, tokens: float
    ) -> Leg | None:
        """Who has all of `blocks` and would be through with them first; None: nobody has."""
        legs = [Leg(s, blocks) for s in servers if s.record.blocks.contains(blocks)]
        return min(legs, key=lambda leg: self.expected(leg, tokens), default=None)

    def expected(self, leg: Leg, tokens: float) -> float:
        """Seconds until that would be done."""
        worker = self._workers.get(leg.server.record.peer_id, _Worker())
        return worker.queued + _HOP + self.work(leg, tokens)

    def give(self, leg: Leg, tokens: float) -> float:
        """It is on its way there. Returns what to `take` back when it was answered, or failed."""
        work = self.work(leg, tokens)
        self._workers.setdefault(leg.server.record.peer_id, _Worker()).queued += work
        return work

    def take(self, leg: Leg, work: float) -> None:
        worker = self._workers[leg.server.record.peer_id]
        worker.queued = max(0.0, worker.queued - work)

    def took(self, leg: Leg, tokens: float, seconds: float) -> None:
        """It answered so long after it was given that, with `queued` others before it."""
        worker = self._workers[leg.server.record.peer_id]
        own = self.work(leg, tokens)
        share = own / max(own, worker.queued)  # of what was there, ours among it
        seen = seconds * share / (tokens * len(leg.blocks))
        worker.pace = seen if worker.pace is None else _MEMORY * worker.pace + (1 - _MEMORY) * seen

    def work(self, leg: Leg, tokens: float) -> float:
        """Seconds that it has to compute for that."""
        record = leg.server.record
        worker = self._workers.get(record.peer_id)
        pace = worker.pace if worker is not None and worker.pace is not None else _claimed(record)
        return pace * tokens * len(leg.blocks)


def _claimed(record: ServerRecord) -> float:
    """Seconds per token and block, as it announces."""
    speed = max(record.throughput, record.batch_throughput)
    return min(_SLOWEST, 1 / (speed * len(record.blocks))) if speed > 0 else _UNKNOWN
