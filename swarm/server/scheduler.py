"""Which waiting steps share the next pass of the device: decode first, prefill in slices.

Pure: it knows sizes and owners, no tensors and no clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A step in the queue: `rows` x `tokens` positions for one session of one client.

    A `whole` one is never cut, since its numbers depend on what it is computed with.
    """

    key: int
    client: str
    rows: int
    tokens: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens `[begin, end)` of every row of a waiting step; the last slice finishes it."""

    key: int
    begin: int
    end: int
    last: bool


class Scheduler:
    """`pass_tokens` bounds rows x tokens in a pass; a quarter of it is always left to prefill.

    A step wider than the whole budget still gets one token per row, so everything advances.
    """

    def __init__(self, pass_tokens: int) -> None:
        self._pass_tokens = pass_tokens
        self._decode: deque[Waiting] = deque()
        # One queue per client; the client served least recently comes first.
        self._prefill: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._done: dict[int, int] = {}  # tokens of a prefill that earlier passes took

    def __len__(self) -> int:
        return len(self._decode) + sum(len(queue) for queue in self._prefill.values())

    def add(self, step: Waiting) -> None:
        if step.tokens <= 1:
            self._decode.append(step)
        else:
            self._prefill.setdefault(step.client, deque()).append(step)

    def drop(self, key: int) -> None:
        """Forget a step whose session has gone; unknown keys are ignored."""
        self._decode = deque(step for step in self._decode if step.key != key)
        for client in list(self._prefill):
            queue = deque(step for step in self._prefill[client] if step.key != key)
            if queue:
                self._prefill[client] = queue
            else:
                del self._prefill[client]
        self._done.pop(key, None)

    def next_pass(self) -> list[Slice]:
        """What to run now; empty if nothing waits."""
        slices: list[Slice] = []
        budget = self._pass_tokens
        floor = self._pass_tokens // 4 if self._prefill else 0
        while self._decode and (not slices or budget - self._decode[0].rows >= floor):
            step = self._decode.popleft()
            budget -= step.rows
            slices.append(Slice(step.key, 0, step.tokens, last=True))
        first = next(iter(self._prefill), None)
        for client in list(self._prefill):
            step = self._prefill[client][0]
            if budget < step.rows and client != first:
                break
            begin = self._done.get(step.key, 0)
            width = step.tokens if step.whole else max(1, budget // step.rows)
            end = min(step.tokens, begin + width)
            piece = Slice(step.key, begin, end, last=end == step.tokens)
            slices.append(piece)
            budget -= (end - begin) * step.rows
            self._took(client, piece)
        return slices

    def _took(self, client: str, piece: Slice) -> None:
        queue = self._prefill.pop(client)
        if piece.last:
            queue.popleft()
            self._done.pop(piece.key, None)
        else:
            self._done[piece.key] = piece.end
        if queue:
            self._prefill[client] = queue
