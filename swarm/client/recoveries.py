"""What went wrong in a client's sessions: each recovery's cause and time, and sums by cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from swarm.errors import ErrorCode, PeerSilent, RemoteProtocolError, SessionClosed, SwarmError
from swarm.metrics import SECONDS, Family, Histogram
from swarm.types import BlockRange

_KEPT = 256  # of one session


class Cause(StrEnum):
    """Why somebody had to be replaced."""

    BROKE = "broke"  # its stream or its link: it died, or was cut off
    DEADLINE = "deadline"  # it did not answer in time: frozen, unplugged or overloaded
    REFUSED = "refused"  # it said why, with a code
    DRAINING = "draining"  # it left, and no other server could take the session over
    OURS = "ours"  # nobody failed: the session outgrew what was reserved, or had to be cut short


@dataclass(frozen=True, slots=True)
class Loss:
    """A server that had to be replaced; `code` if it refused."""

    cause: Cause
    blocks: BlockRange
    peer_id: str
    code: ErrorCode | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """One step that somebody was lost in, until it was done all the same.

    `seconds` begin when the loss was noticed. The time before that, in which nothing came, is in
    `silence`: who waits for the token waits for both. `cause` is that of the first loss.
    """

    losses: tuple[Loss, ...]
    position: int  # at which the step began
    silence: float
    seconds: float

    @property
    def cause(self) -> Cause:
        return self.losses[0].cause


class Lost(Protocol):
    """What is asked of a hop."""

    @property
    def blocks(self) -> BlockRange: ...
    @property
    def peer_id(self) -> str: ...
    @property
    def failure(self) -> SwarmError | None: ...


class Recoveries:
    """Of one session, newest last; `total` sums those of all sessions of this process."""

    def __init__(self) -> None:
        self._kept: deque[Recovery] = deque(maxlen=_KEPT)
        self._losses: dict[Lost, Loss] = {}
        self._noticed: float | None = None
        self._silence = 0.0

    def __iter__(self) -> Iterator[Recovery]:
        return iter(tuple(self._kept))

    def noticed(self, now: float, silence: float = 0.0) -> None:
        """Something is wrong since now, or since before. `silence`: nothing came for so long."""
        if self._noticed is None:
            self._noticed, self._silence = now, silence

    def lost(self, hops: Iterable[Lost]) -> None:
        """They are about to be replaced; who is named again counts once."""
        self._losses |= {hop: loss_of(hop) for hop in hops}

    def repeats(self, hop: Lost) -> bool:
        """Whether the same server was lost before, for the same blocks and in the same step."""
        place = hop.peer_id, hop.blocks
        return any((loss.peer_id, loss.blocks) == place for loss in self._losses.values())

    def done(self, now: float, position: int) -> Recovery | None:
        """The step that began at `position` has its answer; what that took, if there was a loss."""
        losses, self._losses = tuple(self._losses.values()), {}
        noticed, self._noticed = self._noticed, None
        if not losses or noticed is None:
            return None
        recovery = Recovery(losses, position, self._silence, now - noticed)
        self._kept.append(recovery)
        total.add(recovery)
        return recovery


class Total:
    """Sums over all sessions of a process, for whoever shows metrics."""

    def __init__(self) -> None:
        self.seconds = {cause: Histogram(SECONDS) for cause in Cause}
        self.losses: dict[tuple[Cause, str], int] = {}

    def add(self, recovery: Recovery) -> None:
        self.seconds[recovery.cause].observe(recovery.silence + recovery.seconds)
        for loss in recovery.losses:
            key = loss.cause, str(loss.code or "")
            self.losses[key] = self.losses.get(key, 0) + 1

    def families(self) -> Iterator[Family]:
        yield Family(
            "swarm_client_recovery_seconds",
            "histogram",
            "Steps that a server was lost in, with the silence before: until they were done.",
            [({"cause": str(cause)}, h) for cause, h in self.seconds.items()],
        )
        losses = sorted(dict(self.losses).items())
        yield Family(
            "swarm_client_losses_total",
            "counter",
            "Servers that had to be replaced in the middle of a text.",
            [({"cause": str(cause), "code": code}, n) for (cause, code), n in losses],
        )


total = Total()


def loss_of(hop: Lost) -> Loss:
    cause, code = cause_of(hop.failure)
    return Loss(cause, hop.blocks, hop.peer_id, code)


def cause_of(failure: SwarmError | None) -> tuple[Cause, ErrorCode | None]:
    match failure:
        case RemoteProtocolError(code=ErrorCode.DRAINING):
            return Cause.DRAINING, ErrorCode.DRAINING
        case RemoteProtocolError(code=code):
            return Cause.REFUSED, code
        case SessionClosed():
            return Cause.OURS, None
        case PeerSilent():
            return Cause.DEADLINE, None
        case _:
            return Cause.BROKE, None
