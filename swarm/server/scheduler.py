"""Which waiting steps share the next pass: decode first, by priority, and clients in turn.

Pure: it knows sizes and owners, no tensors, and the clock's time is an argument.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

from swarm.server.pace import ACTIVE, Pace, Pass

_MISSED = 4  # times its usual gap after which a stream is taken to have ended
_LEARNT = 5  # gaps of a stream that must have been seen: all its servers keep quiet for so long
_FORGET = 1.02  # by which the least gap between two steps may have grown with each step
PATIENCE = 16  # passes after which whoever waits goes first, whatever their priority


class Waiting(NamedTuple):  # thrice as quick to make as a frozen dataclass
    """A step in the queue: `rows` x `tokens` positions for one session of one client.

    A `whole` one is never cut, since its numbers depend on what it is computed with. Tokens before
    `begin` were computed already. No session has two steps in the queue at a time.
    """

    key: int
    client: str
    rows: int
    tokens: int
    whole: bool = False
    priority: int = 5
    session: int = 0
    begin: int = 0


class Slice(NamedTuple):
    """Tokens `[begin, end)` of every row of a waiting step; the last slice finishes it."""

    key: int
    begin: int
    end: int
    last: bool


class Lull(NamedTuple):
    """Seconds `left` until the next step of a stream is due, of `gap` that are between two of them
    at their quickest (0: not known yet), in which this server computes for `takes`."""

    left: float
    gap: float
    takes: float = 0.0


class Scheduler:
    """`pass_tokens` bounds rows x tokens in a pass; a quarter of it is left to prefill.

    A step wider than the whole budget still gets one token per row, so everything advances. While
    decode streams are active, prefill and decode of lower priorities are bulk: `pace` bounds
    what a pass takes of that, and how soon the next one may.
    """

    def __init__(self, pass_tokens: int) -> None:
        self.pace = Pace()
        self._pass_tokens = pass_tokens
        self._steps: dict[int, Waiting] = {}
        # What waits, by priority (high ones first) and kind (decode before prefill).
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._ready = self._prefills = 0  # rows that wait to decode, and steps of the other kind
        self._streams: dict[int, _Rhythm] = {}  # by session
        self._held_since: float | None = None
        self._pass: tuple[dict[int, int], int] = {}, 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Waiting) -> None:
        self._steps[step.key] = step
        place = (-step.priority, int(step.tokens > 1))
        if place not in self._lanes:
            self._lanes[place] = _Lane()
        self._lanes[place].add(step)
        self._count(step, 1)

    def drop(self, key: int) -> None:
        """Forget a step whose session has gone; unknown keys are ignored."""
        step = self._steps.pop(key, None)
        if step is not None:
            place = (-step.priority, int(step.tokens > 1))
            self._lanes[place].drop(step)
            if not len(self._lanes[place]):
                del self._lanes[place]
            self._count(step, -1)

    def _count(self, step: Waiting, by: int) -> None:
        if step.tokens > 1:
            self._prefills += by
        else:
            self._ready += by * step.rows

    def hold(self, now: float) -> float:
        """Seconds that the next pass had better wait: for more decode streams to be ready, or, if
        others decode, for bulk work to have rested."""
        rest = self.pace.rested - now
        if rest > 0 and all(self._rests(minus, prefill, now) for minus, prefill in self._lanes):
            return rest
        if not self._ready or self._prefills or self._ready >= self.pace.cut.fewest:
            return 0.0
        self._held_since = now if self._held_since is None else self._held_since
        return max(0.0, self._held_since + self.pace.hold - now)

    def next_pass(self, now: float) -> list[Slice]:
        """What to run now, at `now` seconds; empty if nothing waits, or all of it is to be held.
        Then `passed` must follow."""
        order = sorted((lane.haste, *place) for place, lane in self._lanes.items())
        top = min((minus for _, minus, _ in order), default=0)
        slices: list[Slice] = []
        decode: dict[int, int] = {}
        bulk, budget = 0, self._pass_tokens
        for _, minus, prefill in order:
            lane, room = self._lanes[minus, prefill], budget
            if not prefill:
                room -= self._pass_tokens // 4 if (minus, 1) in self._lanes else 0
                room = min(room, self.pace.cut.most - sum(decode.values()))
            is_bulk = bool(prefill)
            if self._rests(minus, prefill, now):
                continue
            if self._is_active(-minus + 1 - prefill, now):
                is_bulk, room = True, min(room, self.pace.bulk_tokens - bulk)
            for step, piece in lane.take(room, first=not slices or minus == top):
                size = step.rows * (piece.end - piece.begin)
                budget, bulk = budget - size, bulk + size * is_bulk
                slices.append(piece)
                if not prefill:
                    decode[step.session] = step.rows
                    self._streams[step.session] = self._rhythm(step, now)
                if piece.last:
                    del self._steps[step.key]
                    self._count(step, -1)
            if not len(lane):
                del self._lanes[minus, prefill]
        self._pass, self._held_since = (decode, bulk), None
        return slices

    def passed(self, begin: float, end: float) -> None:
        """The last pass ran from `begin` to `end`, in seconds."""
        self.pace.measured(Pass(*self._pass, begin, end))

    def lull(self, now: float) -> Lull | None:
        """How long the streams that decode these days want nothing; None: there are none."""
        if not self._is_active(0, now):
            return None
        streams = self._streams.values()
        if any(stream.seen < _LEARNT for stream in streams):
            return Lull(0.0, 0.0)
        due = min(stream.last + stream.least for stream in streams)
        gap = min(stream.least for stream in streams)
        return Lull(max(0.0, due - now), gap, self.pace.usual)

    def disturbed(self) -> None:
        """The device has done something else."""
        for session, stream in self._streams.items():
            self._streams[session] = stream._replace(clean=False)

    def _rhythm(self, step: Waiting, now: float) -> _Rhythm:
        known = self._streams.get(step.session)
        if known is None:
            return _Rhythm(step.priority, now, 0.0, 0.0, 0)
        gap, least = now - known.last, known.least
        if known.clean:  # else what was in its way may have made it longer
            least = _FORGET * least or gap
        # A stream that prefill slows down does not look dead for that.
        return _Rhythm(
            step.priority, now, max(gap, 0.8 * known.gap), min(gap, least), known.seen + 1
        )

    def _rests(self, minus: int, prefill: int, now: float) -> bool:
        """Whether a lane holds bulk work that streams which decode had better not wait for now."""
        return now < self.pace.rested and self._is_active(-minus + 1 - prefill, now)

    def _is_active(self, priority: int, now: float) -> bool:
        """Whether streams of at least this priority decode these days; the others are forgotten."""
        for session, stream in list(self._streams.items()):
            if now - stream.last >= min(ACTIVE, _MISSED * (stream.gap or ACTIVE / 16)):
                del self._streams[session]
        return any(stream.priority >= priority for stream in self._streams.values())


class _Rhythm(NamedTuple):
    """When a stream had its last step, and seconds between two of them (0: not known yet): these
    days, and when nothing was in its way."""

    priority: int
    last: float
    gap: float
    least: float
    seen: int  # gaps
    clean: bool = True  # nothing was since `last`


class _Lane:
    """Steps of one priority and kind. The client that has had least comes first.

    That is start-time fair queuing: who comes anew has had as much as who was served last.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Waiting]] = {}
        self._turns: list[tuple[int, int, str]] = []  # a heap: tokens had, order, client
        self._level = 0  # tokens that the client had that was served last
        self._order = 0
        self._waited = 0  # passes without a turn
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def haste(self) -> int:
        """Negative for those who have waited too long."""
        return -self._waited if self._waited >= PATIENCE else 0

    def add(self, step: Waiting) -> None:
        if step.client not in self._queues:
            self._queues[step.client] = deque()
            self._order += 1
            heapq.heappush(self._turns, (self._level, self._order, step.client))
        self._queues[step.client].append(step)
        self._length += 1

    def drop(self, step: Waiting) -> None:
        queue = self._queues[step.client]
        queue.remove(next(other for other in queue if other.key == step.key))
        self._length -= 1

    def take(self, room: int, *, first: bool) -> list[tuple[Waiting, Slice]]:
        """Steps and parts of steps for `room` tokens; one at least if they go `first`."""
        taken: list[tuple[Waiting, Slice]] = []
        while self._turns and (room > 0 or first):
            had, _, client = self._turns[0]
            queue = self._queues[client]
            if not queue:
                heapq.heappop(self._turns)
                del self._queues[client]
                continue
            step = queue[0]
            width = step.tokens - step.begin
            if not step.whole:
                width = min(width, max(1, room // step.rows))
            size = width * step.rows
            if size > room and not first:
                break
            end = step.begin + width
            taken.append((step, Slice(step.key, step.begin, end, last=end == step.tokens)))
            queue.popleft()
            if end < step.tokens:
                queue.appendleft(step._replace(begin=end))
            else:
                self._length -= 1
            self._order += 1
            heapq.heapreplace(self._turns, (had + max(1, size), self._order, client))
            self._level, room, first = had, room - size, False
        self._waited = 0 if taken else self._waited + 1
        return taken
