"""Somebody who speaks to servers frame by frame, as well or as badly as a test wants."""

from __future__ import annotations

import itertools
import secrets
from typing import Any

import torch

from swarm.errors import ErrorCode
from swarm.identity import Access, SwarmKey, opening_transcript
from swarm.messages import (
    Attach,
    Credentials,
    Message,
    Open,
    Opened,
    Output,
    PushTarget,
    Refused,
    Step,
)
from swarm.models.spans import Span, SpanStep
from swarm.tensors import from_frame, to_frame
from swarm.transport import Stream
from swarm.wire import decode, encode
from tests.inprocess import MODEL, InProcessSwarm, Server, identity


class Stranger:
    """All methods that are coroutines run on the swarm's loop."""

    def __init__(self, swarm: InProcessSwarm, *, client: int = 97, key: SwarmKey | None = None):
        self.access = Access(identity(client), key)
        self.name = f"stranger {client}"
        self.transport = swarm.network.transport(self.name)

    async def dial(self, server: Server, method: str = "session") -> Stream:
        return await self.transport.open_stream(server.endpoint, method, 10.0)

    def credentials(self, server: Server, nonce: bytes) -> Credentials:
        transcript = opening_transcript(
            server.peer_id,
            server.endpoint.certificate_digest,
            nonce,
            self.access.identity.public_key,
        )
        return self.access.sign_opening(transcript)

    def opening(self, server: Server, **changes: Any) -> Open:
        """An opening that the server would accept, but for the changes."""
        session_id = changes.get("session_id", secrets.token_bytes(16))
        blocks = server.record.record.blocks
        fields: dict[str, Any] = {
            "model": MODEL.name,
            "fingerprint": MODEL.fingerprint,
            "dtype": "float32",
            "session_id": session_id,
            "ticket": secrets.token_bytes(16),
            "start": blocks.start,
            "end": blocks.end,
            "batch_size": 1,
            "max_length": 64,
            "credentials": self.credentials(server, session_id),
        }
        return Open(**fields | changes)

    async def open(self, server: Server, **changes: Any) -> Talk:
        """A session; it is an error if the server refuses."""
        talk = Talk(await self.dial(server), self.opening(server, **changes))
        await talk.send(talk.opening)
        opened = await talk.receive()
        assert isinstance(opened, Opened), opened
        return talk

    async def attach(self, server: Server, session_id: bytes, ticket: bytes) -> Stream:
        stream = await self.dial(server, "push")
        await stream.send(encode(Attach(session_id=session_id, ticket=ticket)))
        return stream


class Talk:
    """One session stream, and what its steps must give."""

    def __init__(self, stream: Stream, opening: Open) -> None:
        self.stream = stream
        self.opening = opening
        self.numbers = itertools.count()
        self.position = 0

    @property
    def target(self) -> tuple[bytes, bytes]:
        return self.opening.session_id, self.opening.ticket

    def push_target(self, server: Server) -> PushTarget:
        session_id, ticket = self.target
        return PushTarget(record=server.record.data, session_id=session_id, ticket=ticket)

    async def send(self, message: Message) -> None:
        await self.stream.send(encode(message))

    async def receive(self) -> Message:
        frame = await self.stream.receive()
        assert frame is not None, "the stream ended"
        return decode(frame)

    def step(self, hidden: torch.Tensor, **changes: Any) -> Step:
        """The next step in order, but for the changes."""
        fields: dict[str, Any] = {"epoch": 0, "step": next(self.numbers), "start": self.position}
        self.position += hidden.shape[1]
        return Step(hidden=to_frame(hidden), **fields | changes)

    async def ask(self, hidden: torch.Tensor, **changes: Any) -> torch.Tensor:
        """What the server makes of hidden states."""
        await self.send(self.step(hidden, **changes))
        output = await self.receive()
        assert isinstance(output, Output), output
        return from_frame(output.hidden)

    async def refusal(self) -> ErrorCode:
        """Why the server ends this stream, after whatever else it says."""
        while not isinstance(message := await self.receive(), Refused):
            pass
        assert await self.stream.receive() is None
        return message.code


def hidden_of(span: Span, tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, span.hidden_size, generator=generator)


def expected_of(span: Span, *pieces: torch.Tensor) -> torch.Tensor:
    """What those hidden states, one after the other, become in the last step."""
    cache = span.open_cache(span.blocks, pieces[0].shape[0], 1 << 12)
    return [span.run([SpanStep(cache, piece)])[0] for piece in pieces][-1]


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
