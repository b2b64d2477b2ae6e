"""Asks servers how they are, in turn: the first to notice that one is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from swarm.asking import ask
from swarm.dht.records import ServerRecord, open_record
from swarm.errors import AuthenticationError, InvalidRecord, PeerUnavailable, RemoteProtocolError
from swarm.identity import Access
from swarm.messages import Info, Load
from swarm.transport import Endpoint, Transport

logger = logging.getLogger(__name__)

_PERIOD = 3.0  # seconds between two questions to one server, in a small swarm
_AT_ONCE = 16  # questions; so many a second in a swarm of up to...
_CONNECTED = 200  # ...this many servers. Of more, connections would take too much memory...
_SLOWLY = 2  # ...so there only so many a second
_FIRST = 3600.0  # seconds by which the doubtful come before others
_ANSWER_SECONDS = 3.0
_FAILURES = 2  # in a row, after which a server counts as unreachable
_AGAIN = 1.0  # seconds after the first of them
_STEADY = 0.2  # a shown time stays until the measured one differs by more than that share
_PATIENCE = 4  # so often the time to the next question doubles while it does not answer


@dataclass(slots=True)
class Answer:
    """What a server told when it was asked. Times are monotonic."""

    asked: float = float("-inf")
    failures: int = 0
    connected: bool = False
    rtt: float | None = None  # seconds there and back
    up: float | None = None  # since when it says it is, in seconds since 1970
    load: Load | None = None
    counters: Mapping[str, int] = field(default_factory=dict[str, int])
    record: ServerRecord | None = None  # its newest, which the DHT may not have yet
    _rtts: deque[float] = field(default_factory=lambda: deque[float](maxlen=5))

    @property
    def reachable(self) -> bool | None:
        """None: not asked yet, or only once and in vain."""
        if self.failures >= _FAILURES:
            return False
        return True if self.connected else None

    def measured(self, rtt: float) -> None:
        """Seconds of one question. What is shown changes only when the usual has changed."""
        self._rtts.append(rtt)
        usual = median_low(self._rtts)
        if self.rtt is None or abs(usual - self.rtt) > _STEADY * self.rtt:
            self.rtt = usual

    def told(self, info: Info, now: float) -> None:
        self.failures, self.connected = 0, True
        self.load, self.counters = info.load, info.counters
        up = now - info.counters.get("uptime_seconds", 0)
        if "uptime_seconds" in info.counters and (self.up is None or abs(up - self.up) > 5):
            self.up = up


class Pulse:
    """`answers` by peer id. `now` is the swarm's clock, by which records are judged."""

    def __init__(
        self,
        transport: Transport,
        access: Access,
        now: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.answers: dict[str, Answer] = {}
        self._transport, self._access, self._now, self._clock = transport, access, now, clock

    async def beat(self, servers: Sequence[ServerRecord], doubtful: frozenset[str]) -> int:
        """Ask those whose turn it is, which takes some seconds at most. How many were asked."""
        known = {record.peer_id for record in servers}
        for peer_id in self.answers.keys() - known:
            del self.answers[peer_id]
        due = {
            record.peer_id: self._due(record.peer_id, record.peer_id in doubtful)
            for record in servers
        }
        turn = whose_turn(due, self._clock())
        await asyncio.gather(*(self._ask(r) for r in servers if r.peer_id in turn))
        return len(turn)

    @property
    def unreachable(self) -> frozenset[str]:
        return frozenset(p for p, answer in self.answers.items() if answer.reachable is False)

    def _of(self, peer_id: str) -> Answer:
        return self.answers.setdefault(peer_id, Answer())

    def _due(self, peer_id: str, doubtful: bool) -> float:
        answer = self._of(peer_id)
        wait = _AGAIN if answer.failures == 1 else _PERIOD * 2 ** min(answer.failures, _PATIENCE)
        return answer.asked + wait - (_FIRST if doubtful and answer.failures < _FAILURES else 0.0)

    async def _ask(self, record: ServerRecord) -> None:
        answer = self._of(record.peer_id)
        answer.asked = self._clock()
        endpoint = Endpoint(record.host, record.port, record.peer_id, record.certificate_digest)
        try:
            if not answer.connected:  # the first question also dials
                self._take(record.peer_id, answer, await self._question(endpoint))
            begin = time.perf_counter()
            info = await self._question(endpoint)
            answer.measured(time.perf_counter() - begin)
            self._take(record.peer_id, answer, info)
        except RemoteProtocolError as error:  # it is there, and busy with loading
            logger.debug("%s: %s", record.peer_id, error)
            answer.failures, answer.connected = 0, True
        except (PeerUnavailable, AuthenticationError) as error:
            logger.debug("%s: %s", record.peer_id, error)
            answer.failures, answer.connected = answer.failures + 1, False

    async def _question(self, endpoint: Endpoint) -> Info:
        return await ask(self._transport, self._access, endpoint, _ANSWER_SECONDS)

    def _take(self, peer_id: str, answer: Answer, info: Info) -> None:
        answer.told(info, self._now())
        try:
            record = open_record(info.record, key=self._access.swarm_key, now=self._now())
        except InvalidRecord as error:
            logger.info("ignored %s", error)
        else:
            if record.peer_id == peer_id:
                answer.record = record


def whose_turn(due: Mapping[str, float], now: float) -> frozenset[str]:
    """Who is asked next, by when each should be: those first that wait longest.

    Called once a second.
    """
    waiting = sorted((peer_id for peer_id in due if due[peer_id] <= now), key=lambda p: due[p])
    return frozenset(waiting[: _AT_ONCE if len(due) <= _CONNECTED else _SLOWLY])
