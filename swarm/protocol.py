"""The session protocol without I/O: which message may come when, and what a step means.

Both ends use these objects; `docs/protocol.md` draws the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.fields import Opening
from swarm.messages import (
    PROTOCOL_VERSION,
    Attach,
    Back,
    Bundle,
    Close,
    HandedOver,
    HandOver,
    Heritage,
    Inherit,
    Leaving,
    Lend,
    Lent,
    Message,
    Open,
    Opened,
    Output,
    Piece,
    PushFailed,
    Redirect,
    Refused,
    Step,
    Sync,
    Synced,
    Train,
    Trained,
)


class Phase(Enum):
    """Where one direction of a stream stands."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


Table = Mapping[Phase, Mapping[type[Message], Phase]]

SESSION: Table = {
    Phase.NEW: {Open: Phase.OPEN},
    Phase.OPEN: {
        Step: Phase.OPEN,
        Sync: Phase.OPEN,
        Redirect: Phase.OPEN,
        HandOver: Phase.OPEN,
        Close: Phase.CLOSED,
    },
    Phase.CLOSED: {},
}
"""Client to server, on a session stream."""

REPLIES: Table = {
    Phase.NEW: {Opened: Phase.OPEN, Refused: Phase.CLOSED},
    Phase.OPEN: {
        Output: Phase.OPEN,
        Synced: Phase.OPEN,
        PushFailed: Phase.OPEN,
        Leaving: Phase.OPEN,
        HandedOver: Phase.OPEN,
        Refused: Phase.CLOSED,
    },
    Phase.CLOSED: {},
}
"""Server to client, on a session stream."""

PUSH: Table = {
    Phase.NEW: {Attach: Phase.OPEN},
    Phase.OPEN: {Step: Phase.OPEN, Inherit: Phase.OPEN, Heritage: Phase.OPEN},
    Phase.CLOSED: {},
}
"""Server to server, on a push stream; the answers are Inherit, to heritage, and a last Refused."""

TRAINING: Table = {
    Phase.NEW: {Train: Phase.OPEN},
    Phase.OPEN: {Piece: Phase.OPEN, Back: Phase.OPEN, Close: Phase.CLOSED},
    Phase.CLOSED: {},
}
"""Client to server, on a session stream that begins with Train."""

TRAINED: Table = {
    Phase.NEW: {Opened: Phase.OPEN, Refused: Phase.CLOSED},
    Phase.OPEN: {Piece: Phase.OPEN, Trained: Phase.NEW, Refused: Phase.CLOSED},
    Phase.CLOSED: {},
}
"""Server to client, there: once, and once more if the client goes back."""

LENDING: Table = {
    Phase.NEW: {Lend: Phase.OPEN},
    Phase.OPEN: {Bundle: Phase.OPEN, Close: Phase.CLOSED},
    Phase.CLOSED: {},
}
"""Client to server, on a session stream that begins with Lend."""

LOANS: Table = {
    Phase.NEW: {Lent: Phase.OPEN, Refused: Phase.CLOSED},
    Phase.OPEN: {Lent: Phase.OPEN, Refused: Phase.CLOSED},
    Phase.CLOSED: {},
}
"""Server to client, there."""

INPUTS: Mapping[str, str] = {"position_ids": "int64", "padding": "bool"}
"""What may travel beside the hidden states, and its dtype; each is [B, T]."""

PLANES = ((3,), (4,))
"""What `position_ids` may have behind [B, T], for models that also look at pictures (mRoPE)."""


class Conversation:
    """Walks one direction of a stream through its table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.phase = Phase.NEW

    def receive(self, message: Message) -> Message:
        """The message itself, if it is legal now. Raises RemoteProtocolError OUT_OF_ORDER."""
        after = self._table[self.phase].get(type(message))
        if after is None:
            raise RemoteProtocolError(
                ErrorCode.OUT_OF_ORDER, f"'{message.kind}' is not allowed while {self.phase.value}"
            )
        self.phase = after
        return message


def agree_on_version(message: Opening) -> int:
    """The highest version both ends speak. Raises RemoteProtocolError BAD_VERSION."""
    if not message.protocol_min <= PROTOCOL_VERSION <= message.protocol_max:
        raise RemoteProtocolError(
            ErrorCode.BAD_VERSION,
            f"this server speaks protocol {PROTOCOL_VERSION}, you speak "
            f"{message.protocol_min} to {message.protocol_max}: update the older one",
        )
    return PROTOCOL_VERSION


class Verdict(Enum):
    """What to do with a step."""

    COMPUTE = "compute"
    REPEAT = "repeat"  # already applied: give the kept answer again
    STALE = "stale"  # of an older epoch, or overtaken: drop it silently


@dataclass(slots=True)
class Ledger:
    """What one session's cache holds, by which every step is judged before it costs anything."""

    batch_size: int
    max_length: int
    max_step_tokens: int
    hidden_size: int
    dtype: str
    epoch: int = 0
    position: int = 0
    last_step: int = -1
    last_start: int = 0
    last_epoch: int = -1

    def sync(self, epoch: int) -> None:
        """A new epoch. Raises RemoteProtocolError OUT_OF_ORDER if it is older than the present."""
        if epoch < self.epoch:
            raise RemoteProtocolError(
                ErrorCode.OUT_OF_ORDER, f"epoch {epoch} after epoch {self.epoch}"
            )
        self.epoch = epoch

    def inherited(self, length: int) -> None:
        """The cache, of which no step was known, now holds `length` tokens from elsewhere."""
        self.position = length

    def admit(self, step: Step) -> Verdict:
        """Judge a step; nothing but the epoch changes until `applied` is called.

        Raises RemoteProtocolError: BAD_TENSOR, OVERSIZE, GAP, TOO_LONG, OUT_OF_ORDER.
        """
        if step.epoch < self.epoch or step.step < self.last_step:
            return Verdict.STALE
        self._check_tensors(step)
        tokens = step.hidden.shape[1]
        if step.step == self.last_step:
            if (step.start, step.start + tokens) != (self.last_start, self.position):
                raise RemoteProtocolError(
                    ErrorCode.OUT_OF_ORDER, f"step {step.step} came again with other positions"
                )
            self.epoch = step.epoch
            return Verdict.REPEAT
        begin = self._position_after_crop(step)
        if step.start != begin:
            raise RemoteProtocolError(
                ErrorCode.GAP,
                f"expected {begin}, not {step.start}, as the first position",
                position=begin,
            )
        if begin + tokens > self.max_length:
            raise RemoteProtocolError(
                ErrorCode.TOO_LONG, f"the session was opened for {self.max_length} positions"
            )
        if step.reorder is not None and (
            len(step.reorder) != self.batch_size or max(step.reorder) >= self.batch_size
        ):
            raise RemoteProtocolError(
                ErrorCode.BAD_TENSOR, f"reorder must name {self.batch_size} of as many rows"
            )
        self.epoch = step.epoch
        return Verdict.COMPUTE

    def applied(self, step: Step) -> None:
        """The cache now holds this step."""
        self.last_step = step.step
        self.last_start = step.start
        self.last_epoch = step.epoch
        self.position = step.start + step.hidden.shape[1]

    def _position_after_crop(self, step: Step) -> int:
        if step.crop_to is None or step.crop_to == self.position:
            return self.position
        if step.crop_to > self.position:
            raise RemoteProtocolError(
                ErrorCode.GAP,
                f"cannot crop to {step.crop_to}: the cache holds {self.position}",
                position=self.position,
            )
        if step.epoch == self.last_epoch:
            raise RemoteProtocolError(
                ErrorCode.OUT_OF_ORDER, "cropping needs a new epoch, so that late steps are dropped"
            )
        return step.crop_to

    def _check_tensors(self, step: Step) -> None:
        shape = step.hidden.shape
        wanted = (self.batch_size, shape[1] if len(shape) == 3 else -1, self.hidden_size)
        if shape != wanted or step.hidden.dtype != self.dtype:
            raise RemoteProtocolError(
                ErrorCode.BAD_TENSOR,
                f"hidden is {step.hidden.dtype}{list(shape)}, not "
                f"{self.dtype}[{self.batch_size}, T, {self.hidden_size}]",
            )
        if shape[0] * shape[1] > self.max_step_tokens:
            raise RemoteProtocolError(
                ErrorCode.OVERSIZE, f"at most {self.max_step_tokens} tokens fit into one step"
            )
        for name, frame in step.inputs.items():
            planes = frame.shape[2:]
            fits = frame.shape[:2] == shape[:2] and (
                not planes or (name == "position_ids" and planes in PLANES)
            )
            if INPUTS.get(name) != frame.dtype or frame.codec != "none" or not fits:
                raise RemoteProtocolError(
                    ErrorCode.BAD_TENSOR, f"input '{name}' {frame.dtype}{list(frame.shape)}"
                )
