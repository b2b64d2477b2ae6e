"""The last day of a model, minute by minute, and who served how much of it: bounded, in memory.

Pure: `ledger.py` keeps it on the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm.monitor.roster import Event

DAY = 86_400.0
COLUMNS = 128  # blocks are squeezed into so many at most
_MINUTE = 60
_EVENTS = 500  # of a day, the newest
_SERVERS = 2000  # whose served blocks are counted, the latest
_FORGOTTEN = 30 * DAY  # after so long without serving
_LONGEST_GAP = 120.0  # seconds between two looks; what was in a longer one nobody knows


@dataclass(slots=True)
class Minute:
    """`low` has the least number of servers that each column of blocks had, up to 255."""

    at: int  # seconds since 1970
    tokens: float  # per second, the mean of the looks
    servers: int  # the least
    low: bytes
    looks: int = 1

    def merge(self, tokens: float, servers: int, low: bytes) -> None:
        self.tokens += (tokens - self.tokens) / (self.looks + 1)
        self.looks += 1
        self.servers = min(self.servers, servers)
        self.low = bytes(map(min, self.low, low))


@dataclass(slots=True)
class Served:
    """What one server has given. Times in seconds since 1970."""

    name: str
    block_seconds: float
    first: float
    last: float


@dataclass(slots=True)
class History:
    """Of one model."""

    minutes: deque[Minute] = field(default_factory=lambda: deque[Minute](maxlen=int(DAY / _MINUTE)))
    events: deque[Event] = field(default_factory=lambda: deque[Event](maxlen=_EVENTS))
    served: dict[str, Served] = field(default_factory=dict[str, Served])
    _looked: float | None = None

    def look(
        self,
        now: float,
        tokens: float,
        replicas: Sequence[int],
        serving: Iterable[tuple[str, str, int]],
    ) -> None:
        """`serving`: peer id, name and number of blocks of all who serve at the moment."""
        present = list(serving)
        low, at = squeeze(replicas), int(now) // _MINUTE * _MINUTE
        if self.minutes and self.minutes[-1].at == at and len(self.minutes[-1].low) == len(low):
            self.minutes[-1].merge(tokens, len(present), low)
        else:
            self.minutes.append(Minute(at, tokens, len(present), low))
        gap = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        self._count(now, gap if 0 <= gap <= _LONGEST_GAP else 0.0, present)
        self.prune(now)

    def _count(self, now: float, seconds: float, present: list[tuple[str, str, int]]) -> None:
        for peer_id, name, blocks in present:
            served = self.served.get(peer_id)
            if served is None:  # nobody knows for how much of that time
                self.served[peer_id] = Served(name, 0.0, now, now)
                continue
            served.name, served.last = name, now
            served.block_seconds += seconds * blocks

    def prune(self, now: float) -> None:
        """Forget what is too old, or too much."""
        while self.minutes and self.minutes[0].at <= now - DAY:
            self.minutes.popleft()
        while self.events and self.events[0].at <= now - DAY:
            self.events.popleft()
        for peer_id in [p for p, s in self.served.items() if s.last < now - _FORGOTTEN]:
            del self.served[peer_id]
        if len(self.served) > _SERVERS:
            latest = sorted(self.served, key=lambda p: self.served[p].last, reverse=True)
            self.served = {peer_id: self.served[peer_id] for peer_id in latest[:_SERVERS]}


def squeeze(replicas: Sequence[int]) -> bytes:
    """As bytes, at most `COLUMNS`; where several blocks share one, the least counts."""
    size = -(-len(replicas) // COLUMNS)
    return bytes(
        min(255, *replicas[start : start + size], 255) for start in range(0, len(replicas), size)
    )


def thin(minutes: Sequence[Minute], now: float, most: int = 288) -> dict[str, Any]:
    """At most so many steps, from the first minute to `now`: of each the mean of the tokens per
    second, the least of the servers and of each block's; nulls where nobody looked."""
    if not minutes:
        return {"start": int(now) // _MINUTE * _MINUTE, "step": _MINUTE, "steps": []}
    start = minutes[0].at
    count = max(1, int(now - start) // _MINUTE + 1)
    step = -(-count // most)
    steps: list[Minute | None] = [None] * -(-count // step)
    for minute in minutes:
        index = (minute.at - start) // _MINUTE // step
        if not 0 <= index < len(steps):
            continue
        here = steps[index]
        if here is None or len(here.low) != len(minute.low):
            steps[index] = Minute(minute.at, minute.tokens, minute.servers, minute.low)
        else:
            here.merge(minute.tokens, minute.servers, minute.low)
    return {
        "start": start,
        "step": step * _MINUTE,
        "steps": [
            [round(here.tokens, 1), here.servers, here.low.hex()] if here else None
            for here in steps
        ],
    }


def contributors(served: dict[str, Served], most: int = 50) -> list[dict[str, Any]]:
    """Who gave most, in block-hours; servers that bear one name count together, as far as names
    can be believed."""
    together: dict[str, dict[str, Any]] = {}
    for peer_id, one in served.items():
        here = together.setdefault(
            one.name or peer_id, {"name": one.name, "hours": 0.0, "peers": [], "last": 0}
        )
        here["hours"] += one.block_seconds / 3600
        here["peers"].append(peer_id)
        here["last"] = max(here["last"], int(one.last))
    ranked = sorted(together.values(), key=lambda here: -here["hours"])[:most]
    for here in ranked:
        here["servers"], here["peers"] = len(here["peers"]), here["peers"][:8]
        here["hours"] = round(here["hours"], 2)
    return ranked
