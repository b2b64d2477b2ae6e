"""One step as the client sees it: what may be sent, in which pieces, and what may come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil

import torch

from swarm.client.history import History
from swarm.client.hop import Hop, Terms
from swarm.client.route import Silent
from swarm.config import ClientConfig
from swarm.errors import UsageError
from swarm.messages import MAX_TOKENS, Output, Step, TensorFrame
from swarm.protocol import INPUTS
from swarm.tensors import DTYPE_NAMES, from_frame
from swarm.types import DTYPE_BYTES
from swarm.wire import MAX_FRAME_BYTES

_INPUTS_BYTES = 64  # of positions and padding, per token
_WORDS_BYTES = 1 << 14  # room in a frame for all the rest
# Of 1,024 tokens through three servers on two cores, pieces of 128 came back first: those of 256
# left servers idle at both ends, those of 32 were slow to compute (docs/benchmarks.md, prefill).
_PIECES_PER_HOP = 3
_PIECE_TOKENS = 64  # of all rows; smaller ones only where frames have no room


@dataclass(slots=True)
class Pending:
    """The step that the caller waits for: positions `[start, end)`."""

    start: int
    end: int
    hidden: TensorFrame  # all of it
    reorder: tuple[int, ...] | None
    first_number: int
    answer: History = field(init=False)

    def __post_init__(self) -> None:
        self.answer = History(base=self.start)


@dataclass(slots=True)
class Sent:
    """A step on its way, and the hops that will yet say what became of it."""

    step: Step
    awaited: set[Hop]
    until: int  # outputs from here on are not wanted any more


class Bell:
    """Wakes the one task that waits for what hops say; a decode step sets no timer of its own."""

    def __init__(self) -> None:
        self._reached: Callable[[], bool] = bool
        self._waiter: asyncio.Future[None] | None = None
        self._rung = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def until(self, reached: Callable[[], bool], silence: float) -> None:
        """Until a ring after which it is `reached`, or a `wake`. Raises Silent after so many
        seconds without either."""
        loop = asyncio.get_running_loop()
        self._reached, self._rung = reached, loop.time()
        self._waiter = waiter = loop.create_future()
        if self._timer is None:
            self._timer = loop.call_later(silence, self._listen, loop, silence)
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

    def _listen(self, loop: asyncio.AbstractEventLoop, silence: float) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        left = self._rung + silence - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._listen, loop, silence)
        else:
            self._waiter.set_exception(Silent(f"nothing came for {silence:g} s"))


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


def chunks_of(
    begin: int, end: int, terms: Terms, most: int, chunk_bytes: int, pipelined: int = 1
) -> list[tuple[int, int]]:
    """Pieces of `[begin, end)` that may travel as one step; none if it is empty.

    Of at most `most` tokens (over all rows) and about `chunk_bytes`. If they go through several
    hops, they are small enough for all of them to work at the same time.
    """
    rows = terms.batch_size
    width = max(1, min(most, chunk_bytes // _row_bytes(terms)) // rows)
    if pipelined > 1:
        overlapping = ceil((end - begin) / (_PIECES_PER_HOP * pipelined))
        width = min(width, max(overlapping, _PIECE_TOKENS // rows))
    return [(low, min(end, low + width)) for low in range(begin, end, width)]


def keep(border: History, sent: Sent, frame: TensorFrame) -> None:
    """Put what a step became where it belongs, as far as it is still wanted."""
    start, tokens = sent.step.start, sent.until - sent.step.start
    if tokens >= frame.shape[1]:
        border.add(start, frame)
    elif tokens > 0:
        border.append(start, from_frame(frame)[:, :tokens])


def problem_with(output: Output, sent: Sent, border: History | None) -> str | None:
    """Why an output cannot be what we asked for; `border` is where it would be kept."""
    step = sent.step
    rows, tokens, size = step.hidden.shape
    wanted = (rows, 0 if step.quiet else tokens, size)
    if output.hidden.shape != wanted or output.hidden.dtype != step.hidden.dtype:
        return f"answered {output.hidden.dtype}{list(output.hidden.shape)}"
    wanted_yet = border is not None and not step.quiet and step.start < sent.until
    if border is not None and wanted_yet and step.start > border.length:
        return f"answered position {step.start} before {border.length}"
    return None


def _row_bytes(terms: Terms) -> int:
    return terms.hidden_size * DTYPE_BYTES[terms.numerics.dtype]
