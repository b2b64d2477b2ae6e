"""What the protocol needs of a network: `rpc.py` is the real one, `fakes.py` the fake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer listens, and the certificate digest (sha256 of DER) that its record pins."""

    host: str
    port: int
    peer_id: str
    certificate_digest: bytes

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Stream(Protocol):
    """A bidirectional stream of frames, in order, each at most wire.MAX_FRAME_BYTES.

    Several tasks may send, one may receive. Cancelling a `receive` loses nothing; a cancelled
    `send` may have sent its frame all the same.
    """

    async def send(self, frame: bytes) -> None:
        """Waits while too much has not left yet. Raises PeerUnavailable, LocalProtocolError.

        After that `receive` may still give what the peer had said, a refusal for example.
        """
        ...

    def send_nowait(self, frame: bytes) -> bool:
        """Whether there was room to take it at once; else `send` waits, or says what is wrong."""
        ...

    async def receive(self) -> bytes | None:
        """The next frame; None when the peer has ended politely.

        Raises PeerUnavailable; RemoteProtocolError if the peer broke the rules of framing.
        """
        ...

    async def finish(self) -> None:
        """No more frames will be sent; what was sent still arrives."""
        ...

    def cancel(self) -> None:
        """Break the stream at once, in both directions."""
        ...


class Transport(Protocol):
    """Dials peers whose certificates are pinned; connections are shared and reused."""

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        """Method `session` or `push`. Raises PeerUnavailable, AuthenticationError."""
        ...

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        """One question, one answer (`info`). Raises PeerUnavailable, AuthenticationError."""
        ...

    async def close(self) -> None: ...


StreamHandler = Callable[[Stream], Awaitable[None]]
CallHandler = Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Service:
    """What a server answers: one coroutine per incoming stream, one per call."""

    session: StreamHandler
    push: StreamHandler
    info: CallHandler
