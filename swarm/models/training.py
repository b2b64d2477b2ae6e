"""A batch through a span, or gradients back through it: block by block, within a memory budget.

Generators, so that whoever owns the device may do something more urgent between two blocks.
Weights are frozen: only what the batch brought with it has gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from swarm.models.adapters import Adapter, BlockAdapter
from swarm.models.spans import Span
from swarm.types import BlockRange

_GUESS = 32  # numbers of the hidden size that a token leaves in a block's graph, until measured
_SCORES = 4  # numbers that attention which is written out leaves for each pair of positions

_PROMPTS = "prompts"

Units = Generator[bool, None, Mapping[str, Tensor]]
"""Yields after each block: True when nothing of the batch is on the device just then."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a request brought; tensors are on the CPU and in the span's dtype.

    hidden: `[B, T, H]`. gradient: likewise, of what the blocks make of it; None: forward only.
    position_ids: int64 `[B, T]` or `[B, T, 3 | 4]`. padding: bool `[B, T]`, True for real tokens.
    prompts: `[blocks, P, H]`, P <= T. adapter: has gradients, too, by the names `BLOCK.TENSOR` of
    what is in its bundles.
    """

    blocks: BlockRange
    hidden: Tensor
    gradient: Tensor | None = None
    position_ids: Tensor | None = None
    padding: Tensor | None = None
    prompts: Tensor | None = None
    adapter: Adapter = field(default_factory=dict[int, BlockAdapter])

    @property
    def nbytes(self) -> int:
        """Of all tensors, those of the adapter included."""
        given = [self.hidden, self.gradient, self.position_ids, self.padding, self.prompts]
        for block in self.adapter.values():
            given.extend(block.tensors.values())
        return sum(tensor.nbytes for tensor in given if tensor is not None)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some rows of a batch, on the device."""

    blocks: BlockRange
    hidden: Tensor
    inputs: Mapping[str, Tensor | None]
    prompts: Sequence[Tensor]  # one for each block, or none
    adapter: Adapter

    @property
    def nbytes(self) -> int:
        given = (self.hidden, *self.inputs.values(), *self.prompts)
        return sum(tensor.nbytes for tensor in given if tensor is not None)


@dataclass(frozen=True, slots=True)
class _Graph:
    """What a block computed, ready to go back through: `output` came of what entered the block, and
    of `leaves` with these names."""

    entered: Tensor
    leaves: Mapping[str, Tensor]
    output: Tensor


@dataclass(slots=True)
class _Climb:
    """A slice that went forward: of each block its graph, or what entered it."""

    part: _Slice
    steps: list[_Graph | Tensor]
    nbytes: float  # of all that

    @property
    def rows(self) -> int:
        return self.part.hidden.shape[0]


@dataclass(slots=True)
class Kept:
    """What is kept of a batch that went forward, for its way back: graphs of its first rows, of at
    most `room` bytes."""

    room: int = 0
    nbytes: float = 0.0
    climbs: deque[_Climb] = field(default_factory=deque[_Climb])

    def add(self, climb: _Climb) -> None:
        """The next slice."""
        self.climbs.append(climb)
        self.nbytes += climb.nbytes

    def take(self, most: int) -> _Climb | None:
        """The next slice. None: there is none of at most that many rows, and nothing is kept."""
        if not self.climbs or self.climbs[0].rows > most:
            self.clear()
            return None
        climb = self.climbs.popleft()
        self.nbytes -= climb.nbytes
        return climb

    def clear(self) -> None:
        """Free all, and keep nothing from now on."""
        self.climbs.clear()
        self.room, self.nbytes = 0, 0.0


class SpanTraining:
    """`budget` is in bytes: what graphs of one slice of a batch may take on the device."""

    def __init__(self, span: Span, budget: int) -> None:
        self._span = span
        self._budget = budget
        config: Any = span.config
        heads = getattr(config, "num_attention_heads", None) or 1
        size = span.dtype.itemsize
        self._linear = float(_GUESS * span.hidden_size * size)  # bytes of a token in one graph...
        # ...and for each position that it can see.
        self._square = float(_SCORES * heads * size) if span.own_attention == "eager" else 0.0
        self._weights = {weight.untyped_storage().data_ptr() for weight in span.weights()}

    def fits(self, tokens: int) -> bool:
        """Whether one text of so many tokens can go back through one block."""
        return self._bytes(1, tokens) <= self._budget

    def keeping(self, batch: Batch) -> int:
        """About how many bytes are to be kept of a batch for its way back, itself included."""
        rows, tokens, _ = batch.hidden.shape
        blocks = len(batch.blocks)
        inputs = batch.nbytes + (blocks + 1) * batch.hidden.nbytes
        return batch.nbytes + inputs + int((blocks + 1) * self._bytes(rows, tokens))

    def run(self, batch: Batch, width: Callable[[], int], kept: Kept | None = None) -> Units:
        """`hidden` forwards; else `gradient` of the input, and of `prompts` if there are any.

        Asks `width` before each slice how many tokens it should have; a slice has one text at
        least. Forwards fills `kept`, and backwards empties it. Must be advanced outside of
        inference mode.
        """
        output = torch.empty_like(batch.hidden)
        learnt: dict[str, Tensor] = {}
        rows, tokens, _ = batch.hidden.shape
        kept = kept or Kept()
        begin = 0
        while begin < rows:
            most = self._most(rows - begin, tokens, width())
            if batch.gradient is None:
                found = yield from self._forward(self._slice(batch, begin, most), kept)
            else:
                climb = kept.take(most)
                if climb is None:
                    part = self._slice(batch, begin, most)
                    climb, _ = yield from self._climb(part, self._budget)
                gradient = batch.gradient[begin : begin + climb.rows].to(self._span.device)
                found = yield from self._descend(climb, gradient, learnt)
                del climb
            output[begin : begin + len(found)] = found
            begin += len(found)
            yield True
        if batch.gradient is None:
            return {"hidden": output}
        prompts = [learnt.pop(f"{block}.{_PROMPTS}") for block in _some(batch)]
        if prompts:
            learnt["prompts"] = torch.stack(prompts)
        found = {name: tensor.cpu() for name, tensor in learnt.items()}
        return {"gradient": output} | found

    def _most(self, left: int, tokens: int, width: int) -> int:
        """Texts of a slice, of `left` ones."""
        if self._span.takes_whole_steps:  # its numbers follow the longest of all rows
            return left
        return max(1, min(left, width // tokens))

    def _bytes(self, rows: int, tokens: int) -> float:
        """Of the graph of one block."""
        return rows * tokens * (self._linear + self._square * tokens)

    def _slice(self, batch: Batch, begin: int, most: int) -> _Slice:
        """At most so many rows: as many of them as have room for a block's graph."""
        device, end = self._span.device, begin + most
        if not self._span.takes_whole_steps:
            fitting = int(self._budget // self._bytes(1, batch.hidden.shape[1]))
            end = begin + max(1, min(most, fitting))

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[begin:end].to(device)

        positions, padding = part(batch.position_ids), part(batch.padding)
        if positions is not None and positions.ndim == 3:
            positions = positions.permute(2, 0, 1)
        mask = None if padding is None or bool(padding.all()) else padding.long()
        prompts = () if batch.prompts is None else tuple(batch.prompts.to(device))
        inputs = {"attention_mask": mask, "position_ids": positions}
        hidden = cast(Tensor, part(batch.hidden))
        return _Slice(batch.blocks, hidden, inputs, prompts, batch.adapter)

    def _forward(self, part: _Slice, kept: Kept) -> Generator[bool, None, Tensor]:
        hidden = part.hidden
        if kept.room > kept.nbytes:
            climb, hidden = yield from self._climb(part, min(self._budget, kept.room - kept.nbytes))
            if any(isinstance(step, _Graph) for step in climb.steps):
                kept.add(climb)
            else:  # it is full; what is kept has to be of the first rows
                kept.room = 0
            return hidden
        for index in range(len(part.blocks)):
            hidden = self._block(part, index, hidden)
            yield False
        return hidden

    @torch.no_grad()
    def _block(self, part: _Slice, index: int, hidden: Tensor) -> Tensor:
        prompts = part.prompts[index] if part.prompts else None
        block = part.blocks.start + index
        return self._compute(part, block, hidden, prompts, part.adapter.get(block))

    def _compute(
        self,
        part: _Slice,
        block: int,
        hidden: Tensor,
        prompts: Tensor | None,
        adapter: BlockAdapter | None,
    ) -> Tensor:
        if prompts is not None:
            rest = hidden.shape[1] - prompts.shape[0]
            hidden = hidden + torch.nn.functional.pad(prompts, (0, 0, 0, rest))
        return self._span.run_freely(block, hidden, adapter, **part.inputs)

    def _climb(self, part: _Slice, room: float) -> Generator[bool, None, tuple[_Climb, Tensor]]:
        """Forward, and what that gives, with graphs of as many blocks as fit into `room` bytes; of
        the others only the input is kept, and they are computed again."""
        hidden, last = part.hidden, len(part.blocks) - 1
        rows, tokens, _ = hidden.shape
        climb = _Climb(part, [], part.nbytes + (last + 1) * hidden.nbytes)
        for index in range(last + 1):
            climb.steps.append(hidden)
            graphs = 1 if index == last else 2  # one is free for those that are computed again
            if climb.nbytes + graphs * self._bytes(rows, tokens) <= room:
                graph, size = self._graph(part, index, hidden)
                if climb.nbytes + size <= room:
                    climb.nbytes += size
                    climb.steps[-1] = graph
                hidden = graph.output.detach()
                del graph
            else:
                hidden = self._block(part, index, hidden)
            yield False
        return climb, hidden

    def _descend(
        self, climb: _Climb, gradient: Tensor, learnt: dict[str, Tensor]
    ) -> Generator[bool, None, Tensor]:
        """Back, adding gradients of leaves to what was learnt."""
        part = climb.part
        while climb.steps:
            graph, index = climb.steps.pop(), len(climb.steps)
            if isinstance(graph, Tensor):
                graph, _ = self._graph(part, index, graph)
            wanted = [graph.entered, *graph.leaves.values()]
            gradient, *others = torch.autograd.grad(graph.output, wanted, gradient)
            for name, other in zip(graph.leaves, others, strict=True):
                name = f"{part.blocks.start + index}.{name}"
                learnt[name] = learnt[name] + other if name in learnt else other
            del graph, wanted
            yield False
        return gradient

    def _graph(self, part: _Slice, index: int, hidden: Tensor) -> tuple[_Graph, float]:
        """One block with its graph, and how many bytes that keeps."""
        block = part.blocks.start + index
        entered, leaves = hidden.detach().requires_grad_(), dict[str, Tensor]()
        adapter = part.adapter.get(block)
        if adapter is not None:
            factors = {path: (_leaf(a), _leaf(b)) for path, (a, b) in adapter.factors.items()}
            adapter = BlockAdapter(factors)
            leaves = adapter.tensors
        if part.prompts:
            leaves[_PROMPTS] = _leaf(part.prompts[index])
        given = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        seen, size = self._weights | given, 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal size
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                size += storage.nbytes()
            return tensor.detach()

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            output = self._compute(part, block, entered, leaves.get(_PROMPTS), adapter)
        rows, tokens, _ = hidden.shape
        self._linear = max(1.0, size / (rows * tokens) - self._square * tokens)
        return _Graph(entered, leaves, output), size


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _some(batch: Batch) -> Sequence[int]:
    """Blocks with prompts."""
    return () if batch.prompts is None else range(batch.blocks.start, batch.blocks.end)
