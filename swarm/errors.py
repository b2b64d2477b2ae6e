"""The tree of errors: ours, theirs, and what people did; each message says what to do next."""

from enum import StrEnum
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class ErrorCode(StrEnum):
    """Codes that travel on the wire; clients decide by them, people read the message."""

    BAD_FRAME = "bad_frame"  # does not parse, or does not validate
    OVERSIZE = "oversize"  # a frame, tensor or count beyond the announced limits
    BAD_VERSION = "bad_version"  # no protocol version in common
    BAD_TENSOR = "bad_tensor"  # dtype or shape is not what the session agreed on
    OUT_OF_ORDER = "out_of_order"  # a message that is illegal in this state
    GAP = "gap"  # a step does not begin where the cache ends
    UNKNOWN_SESSION = "unknown_session"  # also for a wrong ticket: strangers learn nothing
    UNAUTHORIZED = "unauthorized"  # no swarm key, or not who they say they are
    WRONG_MODEL = "wrong_model"  # another model, fingerprint or numerics
    BAD_SPAN = "bad_span"  # blocks that this server does not hold
    CANNOT_REWIND = "cannot_rewind"  # the cache cannot go back that far: replay
    BUSY = "busy"  # no memory or no place in the queue; try elsewhere or later
    TOO_LONG = "too_long"  # the session would outgrow its reservation
    DEADLINE = "deadline"  # the answer was not ready in time
    DRAINING = "draining"  # the server is leaving
    BAD_ADAPTER = "bad_adapter"  # its names, shapes or numbers do not fit, or not its hash
    UNKNOWN_ADAPTER = "unknown_adapter"  # it is not lent here, nor announced: lend it
    INTERNAL = "internal"  # a defect on the server's side


class SwarmError(Exception):
    """Base of all errors that this package raises on purpose."""


class UsageError(SwarmError):
    """People asked for something that cannot be; one sentence that names it and the next step."""


class ProtocolError(SwarmError):
    """Base of violations of the session protocol (docs/protocol.md)."""


class LocalProtocolError(ProtocolError):
    """Our own side broke the protocol: a defect here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol forbids, or refused what we sent.

    `position` is the cache length the server expected, with code GAP or CANNOT_REWIND;
    `retry_after` is in seconds, with code BUSY.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        position: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.position = position
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.args[0]} [{self.code}]"


class PeerUnavailable(SwarmError):
    """A peer cannot be reached, closed its stream or missed its deadline: somebody else may do."""


class PeerSilent(PeerUnavailable):
    """A peer missed its deadline: it may be frozen, unplugged or only slow."""


class AuthenticationError(SwarmError):
    """A signature, certificate or swarm key does not hold."""


class InvalidRecord(SwarmError):
    """A record from the DHT that must be treated as if it did not exist."""


class AdapterRefused(UsageError):
    """A server will never take this adapter of ours: it is too large for it, or does not fit."""


class CheckpointError(UsageError):
    """A model cannot be found, read or trusted."""


class UnsupportedModel(UsageError):
    """A model that cannot be cut into spans (or not there), found out at start and refused."""


class CannotRewind(SwarmError):
    """A span's cache cannot be cropped that far back; the caller must replay."""


class OutOfPages(SwarmError):
    """No page of the cache is free for a step now; it may be tried again when others leave."""


class NoRoute(SwarmError):
    """No servers hold these blocks: the message names them."""


class SessionClosed(SwarmError):
    """The inference session was closed; open another one."""


def afresh(error: E) -> E:
    """A copy to raise of an error that is kept: else whoever raises it hangs its frames, and with
    them all that a session holds, on what is kept."""
    copy = type(error).__new__(type(error), *error.args)
    vars(copy).update(vars(error))
    return copy
