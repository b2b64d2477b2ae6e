"""One step as the client sees it: what may be sent, in which pieces, and what may come back."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch

from swarm.client.history import History
from swarm.client.hop import Hop, Terms
from swarm.client.pace import Flight, Leg, Pace, Piece
from swarm.client.route import Silent
from swarm.config import ClientConfig, ClientTimeouts
from swarm.errors import UsageError
from swarm.messages import MAX_TOKENS, Output, Step, TensorFrame
from swarm.protocol import INPUTS
from swarm.tensors import DTYPE_NAMES, from_frame
from swarm.types import DTYPE_BYTES, mxint8_bytes
from swarm.wire import MAX_FRAME_BYTES

_INPUTS_BYTES = 64  # of positions and padding, per token
_WORDS_BYTES = 1 << 14  # room in a frame for all the rest
_RECENT_STEPS = 16


@dataclass(slots=True)
class Pending:
    """The step that the caller waits for: positions `[start, end)`."""

    start: int
    end: int
    wanted: int  # from here on what comes behind the last block is of use
    hidden: TensorFrame  # all of it
    reorder: tuple[int, ...] | None
    first_number: int
    answer: History = field(init=False)

    def __post_init__(self) -> None:
        self.answer = History(base=self.wanted)

    def is_new_to(self, hop: Hop) -> bool:
        """There is a reorder that the hop has not applied."""
        return self.reorder is not None and hop.last_step < self.first_number

    def is_next_for(self, hops: Sequence[Hop], borders: Sequence[History]) -> bool:
        """All servers stand at the same place and know the same reorders: one flow serves all."""
        first = hops[0]
        return first.position >= self.start and all(
            hop.position == first.position
            and hop.trusted >= self.start
            and self.is_new_to(hop) == self.is_new_to(first)
            and border.length >= self.start
            for hop, border in zip(hops, borders, strict=True)
        )

    def keep(self, begin: int, end: int) -> int | None:
        """How much the last hop is to answer of a piece; None: all."""
        return max(0, end - self.wanted) if begin < self.wanted else None


@dataclass(slots=True)
class Sent:
    """A step on its way, and the hops that will yet say what became of it."""

    step: Step
    awaited: set[Hop]
    until: int  # outputs from here on are not wanted any more
    flight: Flight | None = None  # whose piece it is
    times: dict[int, float] = field(default_factory=dict[int, float])  # of answers, by hop

    def __post_init__(self) -> None:
        self.times[-1] = time.perf_counter()  # the loop's clock may count whole milliseconds

    def elapsed(self, hop: int) -> float:
        """Seconds between the answer of the hop before (or sending) and that of this one, which is
        here now; 0 if it overtook the other one, so that nobody knows."""
        now = self.times[hop] = time.perf_counter()
        return now - self.times.get(hop - 1, now)

    def arrived(self, hop: int, output: Output, now: float) -> None:
        """Let later pieces know how this one fared."""
        assert self.flight is not None
        rows, tokens, _ = self.step.hidden.shape
        size, crowded = len(self.step.hidden.data), output.load.queue > 0
        self.flight.arrived(hop, Piece(rows * tokens, size, output.compute_ms / 1e3, crowded), now)


class Patience:
    """How long to wait before somebody may be dead, learnt from the last steps of one position.

    Two stages, as a frozen server says nothing, and one that is only busy answers `Sync` beside
    its device: a step that takes `least` seconds longer than all of the last ones makes us ask, and
    who does not answer soon is given up. What is not known yet is taken from the configuration.
    """

    def __init__(self, timeouts: ClientTimeouts) -> None:
        self._timeouts = timeouts
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.silence = timeouts.step
        self._asks_soon = False

    @property
    def is_short(self) -> bool:
        """Whether silence proves nothing yet."""
        return self.silence < self._timeouts.step

    def begin(self, pending: Pending) -> None:
        self.silence = self._timeouts.step
        if len(self._recent) == _RECENT_STEPS and pending.end == pending.start + 1:
            self.silence = min(self.silence, max(self._recent) + self._timeouts.least)

    def ask(self, *, silent: bool) -> None:
        """All are about to be asked; `silent`: as nothing came. From now on silence is long."""
        self._asks_soon = silent and self.is_short
        self.silence = self._timeouts.step

    def sync(self) -> float:
        """How long `Sync` may take. Short only once, if we ask because somebody is silent: while
        replacements are looked for, or start beside us, those who live may be slow."""
        timeouts, soon = self._timeouts, self._asks_soon
        self._asks_soon = False
        if not soon:
            return timeouts.sync
        return min(timeouts.sync, max(2 * timeouts.least, 1.5 * max(self._recent)))

    def learn(self, pending: Pending, seconds: float) -> None:
        """A step was done, and nobody had to be replaced for it."""
        if pending.end == pending.start + 1:
            self._recent.append(seconds)


class Bell:
    """Wakes the one task that waits for what hops say; a decode step sets no timer of its own."""

    def __init__(self) -> None:
        self._reached: Callable[[], bool] = bool
        self._waiter: asyncio.Future[None] | None = None
        self._rung = self._silence = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def until(self, reached: Callable[[], bool], silence: float) -> None:
        """Until a ring after which it is `reached`, or a `wake`. Raises Silent after so many
        seconds without either."""
        loop = asyncio.get_running_loop()
        self._reached, self._rung = reached, loop.time()
        self._waiter = waiter = loop.create_future()
        if self._timer is not None and silence < self._silence:
            self._timer.cancel()
            self._timer = None
        self._silence = silence
        if self._timer is None:
            self._timer = loop.call_later(silence, self._listen, loop)
        try:
            await waiter
        finally:
            self._waiter, self._reached = None, bool

    def ring(self) -> None:
        """Something came."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._rung = waiter.get_loop().time()
            if self._reached():
                waiter.set_result(None)

    def wake(self) -> None:
        """Something happened that whoever waits has to look at."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        left = self._rung + self._silence - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._listen, loop)
        else:
            self._waiter.set_exception(Silent(f"nothing came for {self._silence:.3g} s"))


def composed(before: tuple[int, ...] | None, rows: Sequence[int], count: int) -> tuple[int, ...]:
    """One reorder after another. Raises ValueError if `rows` are not `count` of as many."""
    if len(rows) != count or not all(0 <= row < count for row in rows):
        raise ValueError(f"reorder must name {count} of as many rows, not {list(rows)}")
    return tuple(rows) if before is None else tuple(before[row] for row in rows)


def check_step(
    hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor], end: int, terms: Terms
) -> None:
    """What servers would refuse is refused here, lest they be blamed. Raises UsageError."""
    rows, size = terms.batch_size, terms.hidden_size
    if hidden.ndim != 3 or hidden.shape != (rows, hidden.shape[1], size):
        raise UsageError(f"hidden states are {list(hidden.shape)}, not [{rows}, T, {size}]")
    for name, tensor in inputs.items():
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if INPUTS.get(name) != dtype or tensor.shape[:2] != hidden.shape[:2]:
            raise UsageError(
                f"'{name}' is {tensor.dtype}{list(tensor.shape)}, which cannot travel with "
                f"hidden states {list(hidden.shape)}"
            )
    if end > MAX_TOKENS:
        raise UsageError(f"{end} positions; a session may have {MAX_TOKENS}")
    if rows * (_row_bytes(terms) + _INPUTS_BYTES) + _WORDS_BYTES > MAX_FRAME_BYTES:
        raise UsageError(f"one position of {rows} rows is too large to send: use fewer rows")


def check_memory(held: int, config: ClientConfig) -> None:
    """Raises UsageError if histories of `held` bytes are more than was allowed."""
    if held > config.history_bytes:
        raise UsageError(
            f"the session's history takes {held >> 20} MiB, more than history_bytes allows; "
            "raise it in ClientConfig, or use fewer or shorter sequences"
        )


class Cutter:
    """Into which pieces the steps of a session are cut; they are made when they are asked for."""

    def __init__(self, terms: Terms, chunk_bytes: int, pace: Pace) -> None:
        self._terms = terms
        self._most = chunk_bytes // _row_bytes(terms)  # rows x positions
        self._pace = pace
        self._starts: list[int] = []  # of whole steps: replays must cut where they began

    def begin(self, start: int) -> None:
        """A new step; later ones never were."""
        if self._terms.whole_steps:
            del self._starts[bisect_left(self._starts, start) :]
            self._starts.append(start)

    def pieces(self, begin: int, end: int, hops: Sequence[Hop]) -> Iterator[tuple[int, int]]:
        """Parts of `[begin, end)` that may travel as one step each; none if it is empty."""
        if end - begin == 1:
            return iter([(begin, end)])
        rows, route = self._terms.batch_size, _legs(hops)
        most = min(hop.max_step_tokens for hop in hops)
        if self._terms.whole_steps:
            return self._whole(begin, end, most // rows)
        most, size = min(most, self._most) // rows, _wire_bytes(self._terms)
        return _cut(begin, end, lambda: min(most, self._pace.width(route, end - begin, rows, size)))

    def _whole(self, begin: int, end: int, most: int) -> Iterator[tuple[int, int]]:
        cuts = self._starts[bisect_right(self._starts, begin) : bisect_left(self._starts, end)]
        most = min(most, MAX_FRAME_BYTES // 2 // _row_bytes(self._terms) // self._terms.batch_size)
        return chain(*(_cut(*pair, lambda: most) for pair in pairwise([begin, *cuts, end])))

    def flight(self, pending: Pending, hops: Sequence[Hop]) -> Flight | None:
        """By which the next pieces learn from those before; a single position teaches nothing."""
        return Flight(self._pace, _legs(hops)) if pending.end > pending.start + 1 else None


def _cut(begin: int, end: int, width: Callable[[], int]) -> Iterator[tuple[int, int]]:
    while begin < end:
        low, begin = begin, min(end, begin + max(1, width()))
        yield low, begin


def _legs(hops: Sequence[Hop]) -> list[Leg]:
    return [(hop.peer_id, len(hop.blocks)) for hop in hops]


def store(border: History, sent: Sent, frame: TensorFrame) -> None:
    """Put what a step became where it belongs, as far as it is still wanted."""
    start = _end(sent.step) - frame.shape[1]
    tokens = sent.until - start
    if tokens >= frame.shape[1]:
        border.add(start, frame)
    elif tokens > 0:
        border.append(start, from_frame(frame)[:, :tokens])


def problem_with(
    output: Output, sent: Sent, border: History | None, *, is_last: bool
) -> str | None:
    """Why an output cannot be what we asked for; `border` is where it would be kept."""
    step = sent.step
    rows, tokens, size = step.hidden.shape
    if step.keep is not None and (is_last or not step.push):
        tokens = min(step.keep, tokens)
    if step.quiet:
        tokens = 0
    if output.hidden.shape != (rows, tokens, size) or output.hidden.dtype != step.hidden.dtype:
        return f"answered {output.hidden.dtype}{list(output.hidden.shape)}"
    start = _end(step) - tokens
    if border is not None and tokens and border.length < start < sent.until:
        return f"answered position {start} before {border.length}"
    return None


def _end(step: Step) -> int:
    return step.start + step.hidden.shape[1]


def _row_bytes(terms: Terms) -> int:
    """Of one position of one row, before any codec."""
    return terms.hidden_size * DTYPE_BYTES[terms.numerics.dtype]


def _wire_bytes(terms: Terms) -> int:
    """The same on a link."""
    return _row_bytes(terms) if terms.codec == "none" else mxint8_bytes((terms.hidden_size,))
