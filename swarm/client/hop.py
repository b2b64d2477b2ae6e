"""One server's part in a session: its stream, what it has confirmed, and why it was lost."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from swarm.dht.records import ServerRecord, SignedRecord
from swarm.errors import (
    ErrorCode,
    PeerSilent,
    PeerUnavailable,
    RemoteProtocolError,
    SessionClosed,
    SwarmError,
    afresh,
)
from swarm.identity import Access
from swarm.messages import (
    HAND_OVER,
    MAX_TOKENS,
    HandedOver,
    HandOver,
    Leaving,
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
from swarm.types import BlockRange, Codec, ModelId, Numerics
from swarm.wire import decode, encode

_MAX_WINDOW = 32  # steps that we keep until they are answered, whatever a server would take


class Adapting(Protocol):
    """The adapter that a session has wherever it goes."""

    @property
    def id(self) -> bytes:
        """Its hash."""
        ...

    @property
    def block_bytes(self) -> float | None:
        """What has to be sent for a block; None: it is not ours, only those who have it will do."""
        ...

    def lent(
        self, server: ServerRecord, blocks: BlockRange
    ) -> AbstractAsyncContextManager[bytes | None]:
        """Inside, that server has it, by this hash; None: it changes none of `blocks`.

        Raises PeerUnavailable, RemoteProtocolError, AdapterRefused.
        """
        ...

    def lost(self, peer_id: str) -> bool:
        """That server does not have it. Whether it can be lent."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What every hop of a session is opened with; `max_length` is in positions.

    `whole_steps`: the model's numbers depend on how a text was cut (`depends_on_pass`), so that
    replays must cut it as before.
    """

    model: ModelId
    numerics: Numerics
    hidden_size: int
    batch_size: int
    max_length: int
    whole_steps: bool = False
    codec: Codec = "none"
    trace_id: str = ""
    adapter: Adapting | None = None

    def opening(
        self, access: Access, endpoint: Endpoint, session_id: bytes, blocks: BlockRange
    ) -> dict[str, Any]:
        """The fields of an `Opening`."""
        certificate = endpoint.certificate_digest
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": self.numerics.dtype,
            "quantization": self.numerics.quantization,
            "session_id": session_id,
            "start": blocks.start,
            "end": blocks.end,
            "trace_id": self.trace_id,
            "credentials": access.sign_for(endpoint.peer_id, certificate, session_id),
        }


class Listener(Protocol):
    """Whom a hop tells what its server says."""

    def on_output(self, hop: Hop, output: Output) -> None: ...
    def on_push_failed(self, hop: Hop, message: PushFailed) -> None: ...
    def on_leaving(self, hop: Hop) -> None: ...
    def on_lost(self, hop: Hop) -> None: ...


class Hop:
    """Blocks `[blocks.start, blocks.end)` of the route, on one server."""

    def __init__(self, server: SignedRecord, blocks: BlockRange, terms: Terms) -> None:
        self._record = record = server.record
        self.blocks = blocks
        self.peer_id = record.peer_id
        self.name = record.public_name  # chosen by a stranger
        self.position = 0  # what the server's cache is known to hold...
        self.trusted = MAX_TOKENS  # ...of which what comes from here on is of another text
        self.last_step = -1  # the last step it is known to have applied
        self.rtt: float | None = None  # seconds from Open to Opened
        self.blamed = False
        self.failure: SwarmError | None = None
        self.window = 1
        self.max_step_tokens = 1
        self.hands_over = False  # it knows these messages
        self.endpoint = endpoint_of(record)
        self.target = PushTarget(
            record=server.data, session_id=secrets.token_bytes(16), ticket=secrets.token_bytes(16)
        )
        self.pushes_to: PushTarget | None = None
        self.cannot_push_to: PushTarget | None = None
        self.listener: Listener  # since it was opened
        self._terms = terms
        self._stream: Stream | None = None
        # Bounded by the window: nobody sends more than may be unanswered.
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._redirected = False  # which it was not told, or did not say yet that it knows
        self._idle = False  # nothing waits for the stream
        self._tasks: list[asyncio.Task[None]] = []
        self._synced: asyncio.Future[Synced] | None = None
        self._sync_epoch = self._answers = 0  # which is asked for, and how often
        self._handed_over: asyncio.Future[HandedOver] | None = None

    def __str__(self) -> str:
        return f"{self.blocks} at {self.endpoint}"

    @property
    def alive(self) -> bool:
        return bool(self._tasks) and self.failure is None

    async def open(
        self,
        transport: Transport,
        access: Access,
        next_target: PushTarget | None,
        listener: Listener,
        timeout: float,
    ) -> None:
        """Reserve the server's cache; a failure is kept in `failure`, not raised."""
        self.listener = listener
        try:
            for again in (True, False):
                async with self._adapter() as adapter, asyncio.timeout(timeout):
                    self._stream = stream = await transport.open_stream(
                        self.endpoint, "session", timeout
                    )
                    conversation, asked = Conversation(REPLIES), time.perf_counter()
                    await stream.send(encode(self._opening(access, next_target, adapter)))
                    message = conversation.receive(await _next(stream))
                if not (again and self._lacks_adapter(message)):
                    break
                stream.cancel()
        except TimeoutError:
            self.lose(PeerSilent(f"{self.endpoint} did not answer within {timeout:g} s"))
            return
        except SwarmError as error:
            self.lose(error)
            return
        except asyncio.CancelledError:
            self.lose(SessionClosed("nobody waits for it any more"))
            raise
        if isinstance(message, Refused):
            self.lose(refusal(message))
        if self.failure is not None:  # perhaps lost while it was opened
            stream.cancel()
            return
        assert isinstance(message, Opened)
        self.rtt = time.perf_counter() - asked
        self.window = min(message.window, _MAX_WINDOW)
        self.max_step_tokens = message.max_step_tokens
        self.hands_over = HAND_OVER in message.capabilities
        self.pushes_to = next_target
        self._tasks = [
            asyncio.create_task(self._read(stream, conversation)),
            asyncio.create_task(self._write(stream)),
        ]

    @asynccontextmanager
    async def _adapter(self) -> AsyncGenerator[bytes | None]:
        """Inside, the server has the adapter that it is to be opened with."""
        if self._terms.adapter is None:
            yield None
        else:
            async with self._terms.adapter.lent(self._record, self.blocks) as adapter:
                yield adapter

    def _lacks_adapter(self, message: Message) -> bool:
        """Whether it does not have what we have, so that it can be lent again."""
        lacks = isinstance(message, Refused) and message.code is ErrorCode.UNKNOWN_ADAPTER
        adapter = self._terms.adapter
        return lacks and adapter is not None and adapter.lost(self.peer_id)

    def _opening(
        self, access: Access, next_target: PushTarget | None, adapter: bytes | None
    ) -> Open:
        terms, session_id = self._terms, self.target.session_id
        return Open(
            **terms.opening(access, self.endpoint, session_id, self.blocks),
            codec=terms.codec,
            ticket=self.target.ticket,
            batch_size=terms.batch_size,
            max_length=terms.max_length,
            next=next_target,
            capabilities=(HAND_OVER,),
            adapter=adapter,
        )

    def send(self, message: Message) -> None:
        """Never waits: whoever reads what this server says may also be the one who sends to it."""
        frame = encode(message)
        if self._idle and self._stream is not None and self._stream.send_nowait(frame):
            return
        self._idle = False
        self._outgoing.put_nowait(frame)

    async def sync(self, epoch: int, timeout: float) -> None:
        """Learn where the server stands; one that does not answer counts as dead."""
        while not self._outgoing.empty():  # of an older epoch, and perhaps large
            self._outgoing.get_nowait()
        if self._redirected:  # not before it drops older steps, which are not for the new target
            self.send(Sync(epoch=epoch))
            self.send(Redirect(next=self.pushes_to))
        await self._ask(epoch, timeout, answers=2 if self._redirected else 1)

    def point_to(self, target: PushTarget | None) -> None:
        """Have it push to `target`, since the next `sync`."""
        target = None if target == self.cannot_push_to else target
        self._redirected |= target != self.pushes_to
        self.pushes_to = target

    async def redirect(self, target: PushTarget | None, epoch: int, timeout: float) -> None:
        """Have it push to `target`, before any step of the new epoch can reach it."""
        self.point_to(target)
        if self._redirected:
            await self.sync(epoch, timeout)

    async def hand_over(
        self, target: PushTarget, stage: Literal["ahead", "rest"], timeout: float
    ) -> int:
        """Have it give what it holds to a session elsewhere: `ahead`, or the `rest` of it when no
        step is unanswered. Returns how many positions that session has now.

        Raises SwarmError: it cannot be used, but this one still may.
        """
        if self.failure is not None:
            raise afresh(self.failure)
        self._handed_over = asyncio.get_running_loop().create_future()
        self.send(HandOver(next=target, stage=stage))
        try:
            async with asyncio.timeout(timeout):
                answer = await self._handed_over
        except TimeoutError:
            raise PeerUnavailable(f"{self.endpoint} handed nothing over in {timeout:g} s") from None
        finally:
            self._handed_over = None
        if answer.position is None:
            raise PeerUnavailable(f"{self.endpoint} handed nothing over: {answer.message}")
        return answer.position

    async def _ask(self, epoch: int, timeout: float, answers: int) -> None:
        if not self.alive:
            return
        self._answers = answers
        self._synced = asyncio.get_running_loop().create_future()
        self._sync_epoch = epoch
        self.send(Sync(epoch=epoch))
        try:
            async with asyncio.timeout(timeout):
                synced = await self._synced
        except TimeoutError:
            self.lose(PeerSilent(f"{self.endpoint} is silent for {timeout:g} s"))
        except SwarmError as error:
            self.lose(error)
        else:
            self._redirected = False
            self.position = synced.position
            self.last_step = max(self.last_step, synced.last_step)

    def lose(self, failure: SwarmError) -> None:
        """Give the server up: free the session there, remember why."""
        if self.failure is None:
            self.failure = failure
        if self._stream is not None:
            self._stream.cancel()
        for asked in (self._synced, self._handed_over):
            if asked is not None and not asked.done():
                asked.set_exception(failure)
                asked.exception()  # whoever waits sees it; nobody has to

    async def close(self) -> None:
        """Free the session; ends its tasks too."""
        self.lose(SessionClosed("the session was closed"))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _write(self, stream: Stream) -> None:
        with suppress(PeerUnavailable):  # reading says why, perhaps with a last word of the server
            while True:
                self._idle = self._outgoing.empty()
                frame = await self._outgoing.get()
                await stream.send(frame)

    async def _read(self, stream: Stream, conversation: Conversation) -> None:
        try:
            while True:
                message = conversation.receive(await _next(stream))
                listener = self.listener
                match message:
                    case Output() as output:
                        listener.on_output(self, output)
                    case Synced() as synced:
                        self._on_synced(synced)
                    case PushFailed() as message:
                        listener.on_push_failed(self, message)
                    case Leaving():
                        listener.on_leaving(self)
                    case HandedOver() as answer:
                        if self._handed_over is not None and not self._handed_over.done():
                            self._handed_over.set_result(answer)
                    case Refused() as refused:
                        raise refusal(refused)
                    case _:
                        raise AssertionError
        except SwarmError as error:
            self.lose(error)
            self.listener.on_lost(self)

    def _on_synced(self, synced: Synced) -> None:
        asked = self._synced
        if asked is not None and not asked.done() and synced.epoch == self._sync_epoch:
            self._answers -= 1
            if not self._answers:
                asked.set_result(synced)


def endpoint_of(record: ServerRecord) -> Endpoint:
    """Where a server listens, and the certificate that it must show."""
    return Endpoint(record.host, record.port, record.peer_id, record.certificate_digest)


async def _next(stream: Stream) -> Message:
    frame = await stream.receive()
    if frame is None:
        raise PeerUnavailable("the server ended the session")
    return decode(frame)


def refusal(message: Refused) -> RemoteProtocolError:
    """What a server said, as an error of ours."""
    return RemoteProtocolError(
        ErrorCode(message.code),
        message.message,
        position=message.position,
        retry_after=message.retry_after,
    )
