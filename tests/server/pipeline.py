"""A chain of servers in simulated time: real schedulers, made-up pass times, no waiting."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.server.scheduler import Scheduler, Slice, Waiting


@dataclass(frozen=True)
class Cost:
    """Milliseconds: of a pass, per decoded row and per prefilled token in it; +- `noise` of it."""

    fixed: float = 1.2
    row: float = 0.15
    token: float = 0.08
    noise: float = 0.05


@dataclass
class _Stage:
    cost: Cost
    scheduler: Scheduler
    busy: float = 0.0
    running: bool = False
    passes: int = 0
    held: int = 0


@dataclass
class Pipeline:
    """`streams` sessions decode through all stages, round and round; times in milliseconds.

    Between the last stage and the first there is one client process, which spends `client` on each
    token, one after the other. `latency` is that of each link, one way.
    """

    costs: list[Cost]
    streams: int
    latency: float = 0.2
    client: float = 0.05
    seed: int = 0
    cuts: bool = True  # else passes take all that is ready
    steps: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.stages = [_Stage(cost, Scheduler(512)) for cost in self.costs]
        self.now = self._client_free = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial, self._keys = itertools.count(), itertools.count()
        self._waiting: dict[int, tuple[int, Waiting]] = {}  # by key: stream and step
        self._prefilling = 0  # chunks
        self._began: dict[int, float] = {}
        for stream in range(self.streams):
            self._at(0.0, lambda stream=stream: self._send(stream))

    def prefill(self, tokens: int, chunk: int = 256) -> None:
        """Another client sends a prompt, all chunks at once."""
        for _ in range(tokens // chunk):
            self._prefilling += 1
            self._at(self.now + self.latency, lambda: self._arrive(0, -1, chunk))

    @property
    def prefilling(self) -> bool:
        return self._prefilling > 0

    def run(self, milliseconds: float) -> None:
        end = self.now + milliseconds
        while self._events and self._events[0][0] <= end:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = end

    def rate(self, since: float) -> float:
        """Tokens per second that came out after `since`."""
        done = sum(at > since for steps in self.steps.values() for at, _ in steps)
        return 1e3 * done / (self.now - since)

    def delays(self, since: float, streams: int | None = None) -> list[float]:
        """How long each step took that came out after `since`, sorted; of the first streams."""
        chosen = range(self.streams if streams is None else streams)
        return sorted(took for stream in chosen for at, took in self.steps[stream] if at > since)

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._serial), event))

    def _send(self, stream: int) -> None:
        self._began[stream] = self.now
        self._at(self.now + self.latency, lambda: self._arrive(0, stream, 1))

    def _arrive(self, number: int, stream: int, tokens: int) -> None:
        key = next(self._keys)
        step = Waiting(key, "a" if stream >= 0 else "b", 1, tokens, session=stream)
        self._waiting[key] = (stream, step)
        self.stages[number].scheduler.add(step)
        if not self.stages[number].running:
            self._start(number)

    def _start(self, number: int) -> None:
        stage = self.stages[number]
        if not self.cuts:
            stage.scheduler.pace.cut.parts = 0
        stage.running = False
        hold = stage.scheduler.hold(self.now / 1e3)
        if hold > 1e-6:
            stage.held += 1
            self._at(self.now + hold * 1e3, lambda held=stage.held: self._wake(number, held))
            return
        stage.held += 1
        slices = stage.scheduler.next_pass(self.now / 1e3)
        stage.running = bool(slices)
        if not slices:
            return
        cost, taken = stage.cost, stage.cost.fixed
        for piece in slices:
            tokens = piece.end - piece.begin
            decodes = self._waiting[piece.key][1].tokens == 1
            taken += cost.row if decodes else cost.token * tokens
        taken *= 1 + cost.noise * self.random.uniform(-1, 1)
        stage.busy += taken
        stage.passes += 1
        begin = self.now
        self._at(begin + taken, lambda: self._finish(number, slices, begin))

    def _wake(self, number: int, held: int) -> None:
        stage = self.stages[number]
        if not stage.running and stage.held == held:
            self._start(number)

    def _finish(self, number: int, slices: list[Slice], begin: float) -> None:
        self.stages[number].scheduler.passed(begin / 1e3, self.now / 1e3)
        for piece in slices:
            if not piece.last:
                continue
            stream, step = self._waiting.pop(piece.key)
            if number + 1 < len(self.stages):
                self._at(
                    self.now + self.latency,
                    lambda s=stream, t=step.tokens: self._arrive(number + 1, s, t),
                )
            elif stream < 0:
                self._prefilling -= 1
            elif stream < self.streams:
                self._at(self.now + self.latency, lambda s=stream: self._answered(s))
        self._start(number)

    def _answered(self, stream: int) -> None:
        self._client_free = max(self._client_free, self.now) + self.client
        self.steps[stream].append((self._client_free, self._client_free - self._began[stream]))
        self._at(self._client_free, lambda: self._send(stream))
