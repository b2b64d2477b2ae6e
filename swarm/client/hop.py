"""One server's part in a session: its stream, what it has confirmed, and why it was lost."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Protocol

from swarm.dht.records import SignedRecord
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError, SwarmError
from swarm.identity import Access, opening_transcript
from swarm.messages import (
    Message,
    Open,
    Opened,
    Output,
    PushFailed,
    PushTarget,
    Redirect,
    Refused,
    Sync,
    Synced,
)
from swarm.protocol import REPLIES, Conversation
from swarm.transport import Endpoint, Stream, Transport
from swarm.types import BlockRange, ModelId, Numerics
from swarm.wire import decode, encode


@dataclass(frozen=True, slots=True)
class Terms:
    """What every hop of a session is opened with; `max_length` is in positions."""

    model: ModelId
    numerics: Numerics
    hidden_size: int
    batch_size: int
    max_length: int
    trace_id: str = ""


class Listener(Protocol):
    """Whom a hop tells what its server says."""

    async def on_output(self, hop: Hop, output: Output) -> None: ...
    def on_push_failed(self, hop: Hop, message: PushFailed) -> None: ...
    def on_lost(self, hop: Hop) -> None: ...


class Hop:
    """Blocks `[blocks.start, blocks.end)` of the route, on one server."""

    def __init__(self, server: SignedRecord, blocks: BlockRange, terms: Terms) -> None:
        record = server.record
        self.blocks = blocks
        self.peer_id = record.peer_id
        self.position = 0  # what the server's cache is known to hold
        self.last_step = -1  # the last step it is known to have applied
        self.blamed = False
        self.failure: SwarmError | None = None
        self.window = 1
        self.max_step_tokens = 1
        self.endpoint = Endpoint(
            record.host, record.port, record.peer_id, record.certificate_digest
        )
        self.target = PushTarget(
            record=server.data, session_id=secrets.token_bytes(16), ticket=secrets.token_bytes(16)
        )
        self.pushes_to: PushTarget | None = None
        self.cannot_push_to: PushTarget | None = None
        self._terms = terms
        self._stream: Stream | None = None
        self._reader: asyncio.Task[None] | None = None
        self._synced: asyncio.Future[Synced] | None = None

    def __str__(self) -> str:
        return f"{self.blocks} at {self.endpoint}"

    @property
    def alive(self) -> bool:
        return self._stream is not None and self.failure is None

    async def open(
        self,
        transport: Transport,
        access: Access,
        next_target: PushTarget | None,
        listener: Listener,
        timeout: float,
    ) -> None:
        """Reserve the server's cache; a failure is kept in `failure`, not raised."""
        try:
            async with asyncio.timeout(timeout):
                stream = await transport.open_stream(self.endpoint, "session", timeout)
                self._stream = stream
                await stream.send(encode(self._opening(access, next_target)))
                conversation = Conversation(REPLIES)
                message = conversation.receive(await _next(stream))
        except TimeoutError:
            self.lose(PeerUnavailable(f"{self.endpoint} did not answer within {timeout:g} s"))
            return
        except SwarmError as error:
            self.lose(error)
            return
        if isinstance(message, Refused):
            self.lose(_refusal(message))
            return
        assert isinstance(message, Opened)
        self.window = message.window
        self.max_step_tokens = message.max_step_tokens
        self.pushes_to = next_target
        self._reader = asyncio.create_task(self._read(stream, conversation, listener))

    def _opening(self, access: Access, next_target: PushTarget | None) -> Open:
        terms, session_id = self._terms, self.target.session_id
        transcript = opening_transcript(
            self.peer_id,
            self.endpoint.certificate_digest,
            session_id,
            access.identity.public_key,
        )
        return Open(
            model=terms.model.name,
            fingerprint=terms.model.fingerprint,
            dtype=terms.numerics.dtype,
            quantization=terms.numerics.quantization,
            codec=terms.numerics.codec,
            session_id=session_id,
            ticket=self.target.ticket,
            start=self.blocks.start,
            end=self.blocks.end,
            batch_size=terms.batch_size,
            max_length=terms.max_length,
            next=next_target,
            trace_id=terms.trace_id,
            credentials=access.sign_opening(transcript),
        )

    async def send(self, message: Message) -> None:
        """A failure is kept in `failure`, not raised."""
        if not self.alive:
            return
        assert self._stream is not None
        try:
            await self._stream.send(encode(message))
        except PeerUnavailable as error:
            self.lose(error)

    async def sync(self, epoch: int, timeout: float) -> None:
        """Learn where the server stands; one that does not answer counts as dead."""
        self._synced = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self.send(Sync(epoch=epoch))
                if not self.alive:
                    return
                synced = await self._synced
        except TimeoutError:
            self.lose(PeerUnavailable(f"{self.endpoint} is silent for {timeout:g} s"))
        except SwarmError as error:
            self.lose(error)
        else:
            self.position = synced.position
            self.last_step = max(self.last_step, synced.last_step)

    async def redirect(self, target: PushTarget | None) -> None:
        if target != self.pushes_to:
            self.pushes_to = target
            await self.send(Redirect(next=target))

    def lose(self, failure: SwarmError) -> None:
        """Give the server up: free the session there, remember why."""
        if self.failure is None:
            self.failure = failure
        if self._stream is not None:
            self._stream.cancel()
        if self._synced is not None and not self._synced.done():
            self._synced.set_exception(failure)
            self._synced.exception()  # whoever waits sees it; nobody has to

    async def close(self) -> None:
        """Free the session; ends the reader too."""
        self.lose(PeerUnavailable("the session was closed"))
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _read(self, stream: Stream, conversation: Conversation, listener: Listener) -> None:
        try:
            while True:
                match conversation.receive(await _next(stream)):
                    case Output() as output:
                        await listener.on_output(self, output)
                    case Synced() as synced:
                        if self._synced is not None and not self._synced.done():
                            self._synced.set_result(synced)
                    case PushFailed() as message:
                        listener.on_push_failed(self, message)
                    case Refused() as refused:
                        raise _refusal(refused)
                    case _:
                        raise AssertionError
        except SwarmError as error:
            self.lose(error)
            listener.on_lost(self)


async def _next(stream: Stream) -> Message:
    frame = await stream.receive()
    if frame is None:
        raise PeerUnavailable("the server ended the session")
    return decode(frame)


def _refusal(message: Refused) -> RemoteProtocolError:
    return RemoteProtocolError(
        ErrorCode(message.code),
        message.message,
        position=message.position,
        retry_after=message.retry_after,
    )
