"""One step as the client sees it: what may be sent, in which pieces, and what may come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from swarm.client.history import History
from swarm.client.hop import Hop, Terms
from swarm.config import ClientConfig
from swarm.errors import UsageError
from swarm.messages import MAX_TOKENS, Output, Step
from swarm.protocol import INPUTS
from swarm.tensors import DTYPE_NAMES
from swarm.types import DTYPE_BYTES
from swarm.wire import MAX_FRAME_BYTES

_INPUTS_BYTES = 64  # of positions and padding, per token
_WORDS_BYTES = 1 << 14  # room in a frame for all the rest


@dataclass(slots=True)
class Pending:
    """The step that the caller waits for: positions `[start, end)`."""

    start: int
    end: int
    reorder: tuple[int, ...] | None
    first_number: int
    answer: History = field(init=False)

    def __post_init__(self) -> None:
        self.answer = History(base=self.start)


@dataclass(frozen=True, slots=True)
class Sent:
    """A step on its way, and the hops that will yet say what became of it."""

    step: Step
    awaited: set[Hop]


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
    begin: int, end: int, terms: Terms, max_step_tokens: int, chunk_bytes: int
) -> list[tuple[int, int]]:
    """Pieces of `[begin, end)` that may travel as one step; none if it is empty."""
    rows = terms.batch_size
    width = max(1, min(max_step_tokens, chunk_bytes // _row_bytes(terms)) // rows)
    return [(low, min(end, low + width)) for low in range(begin, end, width)]


def problem_with(output: Output, step: Step, border: History | None) -> str | None:
    """Why an output cannot be what we asked for; `border` is where it would be kept."""
    rows, tokens, size = step.hidden.shape
    wanted = (rows, 0 if step.quiet else tokens, size)
    if output.hidden.shape != wanted or output.hidden.dtype != step.hidden.dtype:
        return f"answered {output.hidden.dtype}{list(output.hidden.shape)}"
    if border is not None and not step.quiet and step.start > border.length:
        return f"answered position {step.start} before {border.length}"
    return None


def _row_bytes(terms: Terms) -> int:
    return terms.hidden_size * DTYPE_BYTES[terms.numerics.dtype]
