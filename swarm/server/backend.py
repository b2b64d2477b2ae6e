"""One pass of the device: slices of several sessions' steps through the span they share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from swarm.errors import CannotRewind, ErrorCode, OutOfPages, RemoteProtocolError
from swarm.models.families import check_places
from swarm.models.spans import Span, SpanCache, SpanStep
from swarm.server.scheduler import Slice

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Work:
    """One step on its way through the device; `hidden` is [B, T, H] on the CPU."""

    key: int
    client: str
    cache: SpanCache
    hidden: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    crop_to: int | None = None
    reorder: Sequence[int] | None = None
    priority: int = 5
    deadline: float = 60.0  # seconds that it may wait for the device and be computed
    keep: int | None = None  # of the output, only so many positions at its end
    outputs: list[torch.Tensor] = field(default_factory=list)
    compute_ms: float = 0.0

    def wanted(self, piece: Slice) -> slice:
        """The part of a slice's output that is of use."""
        unwanted = 0 if self.keep is None else self.hidden.shape[1] - self.keep
        return slice(max(0, unwanted - piece.begin), None)

    def result(self) -> torch.Tensor:
        """[B, T, H] (or [B, keep, H]) on the CPU."""
        return self.outputs[0] if len(self.outputs) == 1 else torch.cat(self.outputs, dim=1)


Failures = dict[int, RemoteProtocolError | OutOfPages]
"""Why works failed, by key. One without pages can be run again from where its slice began."""


Run = tuple[SpanStep, slice]
"""A slice of a step, and the part of its output that is of use."""


class Backend:
    """Runs on the device thread only."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.passes = 0
        self.shared_passes = 0  # passes that held steps of several sessions
        self.steps = 0

    def run(self, slices: Sequence[Slice], works: Mapping[int, Work]) -> Failures:
        """Compute one pass; outputs land in the works. Returns why works failed, by key."""
        failures: Failures = {}
        pieces: list[Slice] = []
        ready: list[Run] = []
        alike: dict[int, int] = {}  # how many rows were made one, by key
        for piece in slices:
            work = works[piece.key]
            try:
                if piece.begin == 0:
                    self._rearrange(work)
                step = self._step(work, piece)
                if _all_rows_alike(step):
                    alike[piece.key] = work.cache.batch_size
                    step = _first_row(step)
                work.cache.make_room(piece.end - piece.begin)
                ready.append((step, work.wanted(piece)))
                pieces.append(piece)
            except OutOfPages as error:
                failures[piece.key] = error
            except CannotRewind as error:
                failures[piece.key] = RemoteProtocolError(
                    ErrorCode.CANNOT_REWIND, str(error), position=work.cache.length
                )
            except RemoteProtocolError as error:
                failures[piece.key] = error
        self.passes += 1
        self.shared_passes += len(ready) > 1
        self.steps += len(ready)
        outputs = self._compute(ready)
        for key, rows in alike.items():
            works[key].cache.reorder([0] * rows)
        for piece, output in zip(pieces, outputs, strict=True):
            if isinstance(output, RemoteProtocolError):
                failures[piece.key] = output
            else:
                rows = alike.get(piece.key, 1)
                works[piece.key].outputs.append(output.repeat(rows, 1, 1) if rows > 1 else output)
        return failures

    def _compute(self, ready: Sequence[Run]) -> list[torch.Tensor | RemoteProtocolError]:
        proof = self.span.proof
        if len(ready) > 1 and not (proof.can_batch or proof.can_align):
            # One after the other anyway: then one that fails cannot harm those before it.
            return [result for item in ready for result in self._compute([item])]
        steps = [step for step, _ in ready]
        lengths = [step.cache.length for step in steps]
        try:
            if self.span.device.type != "cpu":
                there = moved([step.hidden for step in steps], self.span.device)
                steps = [replace(step, hidden=it) for step, it in zip(steps, there, strict=True)]
            outputs = self.span.run(steps)
            wanted = [output[:, part] for output, (_, part) in zip(outputs, ready, strict=True)]
            return [*moved(wanted, torch.device("cpu"))]
        # Whatever torch throws here is our defect or lack of memory: it must cost only the
        # session that causes it, so each step is tried again alone.
        except Exception as error:
            logger.exception("a pass of %d steps failed", len(steps))
            if len(steps) == 1:
                return [RemoteProtocolError(ErrorCode.INTERNAL, f"{type(error).__name__} in pass")]
        results: list[torch.Tensor | RemoteProtocolError] = []
        for item, length in zip(ready, lengths, strict=True):
            try:
                item[0].cache.crop(length)
            except CannotRewind:
                results.append(RemoteProtocolError(ErrorCode.INTERNAL, "a shared pass failed"))
                continue
            results.extend(self._compute([item]))
        return results

    def _rearrange(self, work: Work) -> None:
        """Once, even if the step is run again because it found no page."""
        if work.crop_to is not None and work.crop_to != work.cache.length:
            work.cache.crop(work.crop_to)
        work.crop_to = None
        if work.reorder is not None:
            work.cache.reorder(work.reorder)
        work.reorder = None

    def _step(self, work: Work, piece: Slice) -> SpanStep:
        """Still on the CPU, where it is looked at, but for what the model alone is interested in.
        Positions with planes (mRoPE) travel as [B, T, 3 | 4], so that all inputs slice alike.
        Raises RemoteProtocolError."""
        inputs = {name: value[:, piece.begin : piece.end] for name, value in work.inputs.items()}
        padding = inputs.pop("padding", None)
        padded = padding is not None and not bool(padding.all())
        if padded and work.cache.length and not self.span.proof.can_resume:
            raise RemoteProtocolError(
                ErrorCode.BAD_TENSOR,
                "this family takes padding at the beginning of a text only, in its first piece: "
                "send texts of different lengths one by one",
            )
        end = work.cache.length + piece.end - piece.begin
        check_places(self.span.most_positions, inputs.get("position_ids"), end)
        inputs = {name: value.to(self.span.device) for name, value in inputs.items()}
        positions = inputs.pop("position_ids", None)
        if positions is not None and positions.ndim == 3:
            positions = positions.permute(2, 0, 1)
        return SpanStep(
            cache=work.cache,
            hidden=work.hidden[:, piece.begin : piece.end],
            position_ids=positions,
            padding=padding,
            extras=inputs,
        )


def moved(tensors: Sequence[torch.Tensor], device: torch.device) -> Sequence[torch.Tensor]:
    """`[…, H]` tensors on that device, by one transfer for them all: each one waits."""
    if all(tensor.device == device for tensor in tensors):
        return tensors
    packed = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=device.type == "cuda").split(
        [tensor[..., 0].numel() for tensor in tensors]
    )
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _all_rows_alike(step: SpanStep) -> bool:
    """Whether one row's work would do: several beams or samples of one prompt."""
    rows, tokens, _ = step.hidden.shape
    if rows == 1 or tokens <= 1 or step.extras or not step.cache.rows_are_one:
        return False
    parts = [step.hidden, *(part for part in (step.padding, step.position_ids) if part is not None)]
    if step.position_ids is not None and step.position_ids.ndim == 3:
        parts[-1] = step.position_ids.transpose(0, 1)
    return all(torch.equal(part, part[:1].expand_as(part)) for part in parts)


def _first_row(step: SpanStep) -> SpanStep:
    """The same work for it alone, also in its cache."""
    step.cache.reorder([0])
    positions = step.position_ids
    return replace(
        step,
        hidden=step.hidden[:1],
        padding=None if step.padding is None else step.padding[:1],
        position_ids=None if positions is None else positions[..., :1, :],
    )
