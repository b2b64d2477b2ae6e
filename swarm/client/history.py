"""The client's half of the dual caches: all that ever went over a border, ready to replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from swarm.errors import LocalProtocolError
from swarm.messages import TensorFrame
from swarm.tensors import from_frame, to_frame
from swarm.types import Codec

_LOOSE_FRAMES = 64  # kept as they came, since tensors are dear: copied into the buffer together


class History:
    """Tensors [B, T, ...] appended along time, growing in place; beams are reordered lazily."""

    def __init__(self, base: int = 0) -> None:
        self._base = base  # positions before it were never wanted
        self.length = base
        self._buffer: torch.Tensor | None = None  # [capacity, B, ...], from position `base` on
        self._rows: torch.Tensor | None = None  # int64 [capacity, B]: where a row's data lie
        self._loose: list[TensorFrame] = []  # the latest positions, not yet in the buffer
        self._loose_bytes = 0

    @property
    def nbytes(self) -> int:
        return self._loose_bytes + (0 if self._buffer is None else self._buffer.nbytes)

    def add(self, start: int, frame: TensorFrame) -> None:
        """As `append`, for what comes from the wire or goes there; cheap for single positions."""
        time_major = 1 in frame.shape[:2] and frame.codec == "none"
        if start != self.length or not time_major:
            self.append(start, from_frame(frame))
            return
        self._loose.append(frame)
        self._loose_bytes += len(frame.data)
        self.length += frame.shape[1]
        if len(self._loose) == _LOOSE_FRAMES:
            self._collect()

    def append(self, start: int, tensor: torch.Tensor) -> None:
        """Positions `[start, start + T)`; those that are here already are left as they are."""
        if start > self.length:
            raise LocalProtocolError(f"history has {self.length} positions, got {start} onwards")
        self._collect()
        new = tensor[:, self.length - start :].transpose(0, 1)
        if new.shape[0]:
            self._write(new)

    def crop(self, length: int) -> None:
        if length < self.length:
            self._collect()
            self.length = length

    def reorder(self, rows: Sequence[int]) -> None:
        """From now on row i is what row `rows[i]` was."""
        self._collect()
        if self._buffer is None:
            return
        if self._rows is None:
            capacity, batch = self._buffer.shape[:2]
            self._rows = torch.arange(batch).repeat(capacity, 1)
        used = self.length - self._base
        self._rows[:used] = self._rows[:used, list(rows)]

    def read(self, begin: int, end: int) -> torch.Tensor:
        """[B, end - begin, ...], a copy or a view that must not be written to."""
        if not self._base <= begin <= end <= self.length:
            raise LocalProtocolError(f"history has {self.length} positions, not {begin}:{end}")
        if self._buffer is None and len(self._loose) == 1:
            return from_frame(self._loose[0])[:, begin - self._base : end - self._base]
        self._collect()
        if self._buffer is None:
            raise LocalProtocolError("an empty history was read")
        begin, end = begin - self._base, end - self._base
        part = self._buffer[begin:end]
        if self._rows is not None:
            part = part[torch.arange(end - begin)[:, None], self._rows[begin:end]]
        return part.transpose(0, 1)

    def _collect(self) -> None:
        """Copy what lies loose into the buffer."""
        loose, self._loose, self._loose_bytes = self._loose, [], 0
        if loose:
            rows, _, *rest = loose[0].shape
            count = sum(frame.shape[1] for frame in loose)
            data = b"".join(frame.data for frame in loose)
            frame = TensorFrame(dtype=loose[0].dtype, shape=(count, rows, *rest), data=data)
            self.length -= count
            self._write(from_frame(frame))

    def _write(self, new: torch.Tensor) -> None:
        """`new` is [T, B, ...], of positions from `length` on."""
        used, count = self.length - self._base, new.shape[0]
        buffer = self._reserve(used + count, new)
        buffer[used : used + count] = new
        if self._rows is not None:
            self._rows[used : used + count] = torch.arange(new.shape[1])
        self.length += count

    def _reserve(self, wanted: int, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffer
        if buffer is not None and buffer.shape[0] >= wanted:
            return buffer
        used = self.length - self._base
        capacity = max(wanted, 64, 2 * used)
        grown = torch.empty((capacity, *like.shape[1:]), dtype=like.dtype)
        if buffer is not None:
            grown[:used] = buffer[:used]
        if self._rows is not None:
            rows = torch.arange(like.shape[1]).repeat(capacity, 1)
            rows[:used] = self._rows[:used]
            self._rows = rows
        self._buffer = grown
        return grown


class InputHistory:
    """What travelled beside the hidden states: `position_ids` and `padding`, only if ever given."""

    def __init__(self, batch_size: int) -> None:
        self._batch = batch_size
        self._histories: dict[str, History] = {}

    @property
    def nbytes(self) -> int:
        return sum(history.nbytes for history in self._histories.values())

    def append(self, start: int, tokens: int, inputs: Mapping[str, torch.Tensor]) -> None:
        """A name that comes late, or stays away once, is filled with what its absence means."""
        for name, tensor in inputs.items():
            if name not in self._histories:
                self._histories[name] = history = History()
                history.append(0, self._default(name, 0, start, tensor))
        for name, history in self._histories.items():
            given = inputs.get(name)
            if given is None:
                given = self._default(name, start, tokens, history.read(0, min(1, history.length)))
            history.append(start, given)

    def crop(self, length: int) -> None:
        for history in self._histories.values():
            history.crop(length)

    def reorder(self, rows: Sequence[int]) -> None:
        for history in self._histories.values():
            history.reorder(rows)

    def read(self, begin: int, end: int) -> dict[str, torch.Tensor]:
        return {name: history.read(begin, end) for name, history in self._histories.items()}

    def _default(self, name: str, start: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
        shape = (self._batch, tokens, *like.shape[2:])
        if name == "padding":
            return torch.ones(shape, dtype=torch.bool)
        positions = torch.arange(start, start + tokens)
        return positions.view(1, tokens, *[1] * (len(shape) - 2)).expand(shape)


class Borders:
    """All that ever went over every border of a route, and what travelled beside it.

    `borders[b]` is what entered block b there. The first one is always complete, so whatever dies,
    the blocks behind a gap can be fed again from the last border that is.
    """

    def __init__(self, start: int, batch_size: int) -> None:
        self.inputs = InputHistory(batch_size)
        self._start = start
        self._histories = {start: History()}

    def __getitem__(self, block: int) -> History:
        return self._histories[block]

    @property
    def nbytes(self) -> int:
        return sum(history.nbytes for history in (*self._histories.values(), self.inputs))

    @property
    def shortest(self) -> int:
        """Positions that have crossed all of them."""
        return min(history.length for history in self._histories.values())

    @property
    def longest(self) -> int:
        return max(history.length for history in self._histories.values())

    def begin(
        self, start: int, frame: TensorFrame, tokens: int, inputs: Mapping[str, torch.Tensor]
    ) -> None:
        """A step of so many positions enters the route."""
        self._histories[self._start].add(start, frame)
        self.inputs.append(start, tokens, inputs)

    def crop(self, length: int) -> None:
        for history in (*self._histories.values(), self.inputs):
            history.crop(length)

    def reorder(self, rows: Sequence[int]) -> None:
        for history in (*self._histories.values(), self.inputs):
            history.reorder(rows)

    def move(self, blocks: Iterable[int]) -> None:
        """The route has its borders there now."""
        self._histories = {block: self._histories.get(block, History()) for block in blocks}

    def read(self, block: int, begin: int, end: int, codec: Codec) -> TensorFrame:
        """Positions `[begin, end)` of what enters a block, to be sent again."""
        return to_frame(self._histories[block].read(begin, end), codec)

    def read_inputs(self, begin: int, end: int) -> dict[str, TensorFrame]:
        return {name: to_frame(tensor) for name, tensor in self.inputs.read(begin, end).items()}
