"""What is counted, after the warm-up: histograms, sums, and the swarm's throughput each minute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from simulation.rules import Server
from simulation.world import Floats
from swarm.dht.records import ServerState
from swarm.server.placement import Holder, can_give
from swarm.types import BlockRange

_LEAST, _FINE, _BINS = 1e-3, 1.02, 700  # seconds; bins of 2 %, up to a quarter of an hour
_HALVINGS = 20


class Histogram:
    """Of seconds, with weights; percentiles are exact to 2 %."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS)

    def add(self, seconds: Floats | float, weights: Floats | float = 1.0) -> None:
        values = np.atleast_1d(np.asarray(seconds, float))
        bins = np.log(np.maximum(values, _LEAST) / _LEAST) / np.log(_FINE)
        places = np.minimum(bins.astype(int), _BINS - 1)
        spread = np.broadcast_to(np.asarray(weights, float), values.shape)
        self.counts += np.bincount(places, spread, _BINS)

    def percentile(self, share: float) -> float:
        """Seconds; 0 if nothing was added."""
        total = self.counts.sum()
        if not total:
            return 0.0
        place = int(np.searchsorted(self.counts.cumsum(), share * total))
        return float(_LEAST * _FINE ** (place + 0.5))

    @property
    def edges(self) -> Floats:
        return _LEAST * np.power(_FINE, np.arange(_BINS, dtype=float))


@dataclass(frozen=True, slots=True)
class Audit:
    """One moment's throughput, in tokens per second of streams that are alone in their passes."""

    time: float
    whole: float  # if each server divides its time evenly over its blocks: min over blocks
    parts: float  # if it may prefer some of them: the most that any division gives
    ready: float  # of machines that have had the time to load their blocks once, ideally placed
    present: float  # of all that are up, ideally placed


@dataclass
class Measure:
    """Nothing counts before `begin`."""

    begin: float
    steps: Histogram = field(default_factory=Histogram)  # while nothing happens to the route
    all_steps: Histogram = field(default_factory=Histogram)  # with those in which one was mended
    first_tokens: Histogram = field(default_factory=Histogram)  # from a prompt to its answer
    pauses: Histogram = field(default_factory=Histogram)  # of steps in which a route was mended
    counts: Counter[str] = field(default_factory=Counter[str])
    tokens: float = 0.0
    blocked: float = 0.0  # client-seconds without any route
    wanting: float = 0.0  # client-seconds with a prompt under way
    audits: list[Audit] = field(default_factory=list[Audit])
    moves: list[float] = field(default_factory=list[float])

    def count(self, what: str, now: float, number: int = 1) -> None:
        if now >= self.begin:
            self.counts[what] += number

    def decoded(self, now: float, samples: Floats, tokens: Floats) -> None:
        if now >= self.begin:
            self.steps.add(samples, tokens)
            self.all_steps.add(samples, tokens)
            self.tokens += float(tokens.sum())

    def mended(self, now: float, seconds: float, *, moved: bool) -> None:
        """A route, after a loss, or as it was left for a better one, in the middle of an answer."""
        if now >= self.begin:
            self.counts["moves in answers" if moved else "recoveries"] += 1
            self.all_steps.add(seconds)
            if not moved:
                self.pauses.add(seconds)

    def answered(self, now: float, seconds: float) -> None:
        if now >= self.begin:
            self.first_tokens.add(seconds)

    def moved(self, now: float) -> None:
        self.count("moves", now)
        self.moves.append(now)

    def was_blocked(self, now: float, seconds: float) -> None:
        if now >= self.begin:
            self.blocked += seconds

    def waited(self, now: float, seconds: float) -> None:
        if now >= self.begin:
            self.wanting += seconds

    def audit(self, now: float, servers: Iterable[Server], num_blocks: int) -> None:
        if now < self.begin:
            return
        here = [server for server in servers if server.alive]
        online = [server for server in here if server.state is ServerState.ONLINE]
        spans = [(server.blocks, server.machine.speed) for server in online]
        ready = [s.machine for s in here if s.machine.born == 0 or now >= loaded_at(s)]
        self.audits.append(
            Audit(
                now,
                whole_throughput(num_blocks, spans),
                parts_throughput(num_blocks, spans),
                sum(machine.speed for machine in ready) / num_blocks,
                sum(server.machine.speed for server in here) / num_blocks,
            )
        )

    def mean(self, what: str) -> float:
        return float(np.mean([getattr(audit, what) for audit in self.audits]))


Spans = Sequence[tuple[BlockRange, float]]
"""What each server holds, and its block-tokens per second."""


def loaded_at(server: Server) -> float:
    """When it could serve at the earliest."""
    return server.machine.born + server.machine.start_seconds(server.machine.blocks)


def whole_throughput(num_blocks: int, spans: Spans) -> float:
    """Tokens per second of the rarest block, when each server serves all its blocks alike."""
    changes = np.zeros(num_blocks + 1)
    for blocks, speed in spans:
        changes[blocks.start] += speed / len(blocks)
        changes[blocks.end] -= speed / len(blocks)
    return max(0.0, float(changes.cumsum()[:-1].min()))


def parts_throughput(num_blocks: int, spans: Spans) -> float:
    """The most that sessions through parts of spans can have, by bisection."""
    holders = [Holder("", blocks, speed) for blocks, speed in spans]
    low, high = 0.0, sum(speed for _, speed in spans) / num_blocks
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if can_give(num_blocks, holders, middle) else (low, middle)
    return low
