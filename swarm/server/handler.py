"""What strangers may ask of a server: every word is checked here before it costs anything."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field

from swarm.config import ServerLimits
from swarm.errors import (
    AuthenticationError,
    ErrorCode,
    PeerUnavailable,
    RemoteProtocolError,
    UsageError,
)
from swarm.fields import Opening
from swarm.identity import Access, opening_transcript
from swarm.messages import (
    HAND_OVER,
    Attach,
    Credentials,
    Heritage,
    Info,
    InfoRequest,
    Inherit,
    Lend,
    Load,
    Message,
    Open,
    Opened,
    Refused,
    Step,
    Train,
)
from swarm.models.moving import can_move
from swarm.models.spans import Span, SpanCache
from swarm.protocol import PUSH, SESSION, Conversation, Ledger, agree_on_version
from swarm.server.executor import Executor
from swarm.server.holdings import Holdings
from swarm.server.memory import Admission
from swarm.server.pusher import Pusher, Resolve
from swarm.server.session import Counters, Guest, House, Session
from swarm.server.training import TrainingDesk
from swarm.server.training_loans import LoanDesk
from swarm.sparing import Sparing
from swarm.tensors import DTYPE_NAMES
from swarm.transport import Stream, Transport
from swarm.types import BlockRange, ModelId, Numerics
from swarm.wire import decode, encode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What this server offers, and how it proves who it is."""

    model: ModelId
    numerics: Numerics
    access: Access
    certificate_digest: Callable[[], bytes]  # changes when the certificate is rotated
    record: Callable[[], bytes]  # the signed record as it was last announced
    since: float = field(default_factory=time.monotonic)


class Handler:
    """The service behind the gRPC port (`transport.Service`)."""

    def __init__(
        self,
        served: Served,
        span: Span,
        executor: Executor,
        transport: Transport,
        resolve: Resolve,
        limits: ServerLimits,
    ) -> None:
        self._served = served
        self._span = span
        self._executor = executor
        self._transport = transport
        self._resolve = resolve
        self._limits = limits
        self._admission = Admission(span.store.budget, limits.kv_overcommit, limits.max_sessions)
        self._turns: dict[bytes, asyncio.Event] = {}  # of openings that wait
        self._sessions: dict[bytes, tuple[bytes, Session]] = {}  # id -> ticket, session
        self._house = House(executor, span.store, limits, Holdings(limits.waiting_bytes), self.load)
        self.store, self.meters = span.store, executor.meters
        self._complaints = Sparing(logger)
        identity = served.access.identity
        self.meters.tags = {"swarm.peer_id": identity.peer_id, "swarm.blocks": str(span.blocks)}
        self._loans = LoanDesk(span, limits, lambda: executor.run_soon(span.patches.forget))
        self._training = TrainingDesk(span, executor, limits, self._loans, self.load)
        self.draining = False

    def load(self) -> Load:
        return Load(
            queue=self._executor.queue_depth,
            step_ms=self._executor.median_step_ms,
            free_tokens=self._free_tokens(),
        )

    def _free_tokens(self) -> int:
        """What both promises and pages leave."""
        store = self._span.store
        free = min(self._admission.free, store.budget - store.used) // store.token_bytes
        return max(0, min(free, (1 << 31)))

    @property
    def counters(self) -> Counters:
        return self._house.counters

    def counts(self) -> dict[str, int]:
        """All counters since this span is served."""
        return asdict(self.counters) | self._executor.counters

    @property
    def sessions(self) -> int:
        """Training batches included."""
        return len(self._sessions) + len(self._training)

    async def leave(self) -> None:
        """Admit nobody any more, and tell clients, so that sessions can move."""
        self.draining = True
        sessions = [session for _, session in self._sessions.values()]
        told = await asyncio.gather(*(s.leave() for s in sessions), return_exceptions=True)
        for error in told:
            if isinstance(error, BaseException) and not isinstance(error, RemoteProtocolError):
                raise error

    async def session(self, stream: Stream) -> None:
        """A client's stream: Open, then steps until either side ends it; or Train."""
        async with self._refusing(stream):
            first = await self._first(stream)
            if isinstance(first, Train):
                await self._training.serve(stream, first, self._check(first))
            elif isinstance(first, Lend):
                await self._loans.serve(stream, first, self._check(first))
            else:
                await self._serve(stream, first)

    async def _serve(self, stream: Stream, first: Message) -> None:
        conversation = Conversation(SESSION)
        opening = conversation.receive(first)
        assert isinstance(opening, Open)
        client = self._check(opening)
        cache = self._cache(opening)
        with self._loans.borrowed(client, opening.adapter, cache.blocks) as cache.adapter:
            async with self._room(opening, client, cache):
                session = self._make(opening, client, cache)
                self._sessions[opening.session_id] = (opening.ticket, session)
                self.counters.sessions += 1
                await session.serve(stream, conversation, self._opened(opening))

    @asynccontextmanager
    async def _room(self, opening: Open, client: str, cache: SpanCache) -> AsyncGenerator[None]:
        """Memory for a session, after waiting for it. Raises RemoteProtocolError."""
        needed = self._span.store.session_bytes(
            cache.blocks, opening.batch_size, opening.max_length
        )
        admitted = self._admission.ask(opening.session_id, client, needed)
        try:
            if not admitted:
                await self._turn(opening.session_id)
            yield
        finally:
            self._sessions.pop(opening.session_id, None)
            self._executor.run_soon(cache.release)
            for session_id in self._admission.leave(opening.session_id):
                self._turns[session_id].set()

    async def _turn(self, session_id: bytes) -> None:
        """Wait for memory, in the order of openings. Raises RemoteProtocolError (BUSY)."""
        turn = self._turns[session_id] = asyncio.Event()
        try:
            async with asyncio.timeout(self._limits.kv_wait):
                await turn.wait()
        except TimeoutError:
            if not turn.is_set():  # it may have come at the last moment
                raise RemoteProtocolError(
                    ErrorCode.BUSY,
                    f"all {self._admission.limit:,} bytes of cache are promised",
                    retry_after=self._limits.kv_wait,
                ) from None
        finally:
            del self._turns[session_id]

    async def push(self, stream: Stream) -> None:
        """Another server's stream: Attach with a ticket, then steps for that session, or all that
        it held elsewhere."""
        async with self._refusing(stream):
            conversation = Conversation(PUSH)
            attach = conversation.receive(await self._first(stream))
            assert isinstance(attach, Attach)
            session_id = attach.session_id
            ticket, session = self._sessions.get(session_id, (b"", None))
            if session is None or not hmac.compare_digest(ticket, attach.ticket):
                raise RemoteProtocolError(
                    ErrorCode.UNKNOWN_SESSION, "no such session, or not your right to push into it"
                )
            session.attach(stream)
            while (frame := await stream.receive()) is not None:
                match conversation.receive(decode(frame)):
                    case Step() as step:
                        await session.accept_push(step)
                    case Inherit() | Heritage() as message:
                        if (answer := await session.inherit(message)) is not None:
                            await stream.send(encode(answer))
                    case _:  # the table lets nothing else through
                        raise AssertionError

    async def info(self, request: bytes) -> bytes:
        """Answers InfoRequest with Info or Refused."""
        try:
            message = decode(request)
            if not isinstance(message, InfoRequest):
                raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "expected 'info_request'")
            self._authenticate(message.nonce, message.credentials)
        except RemoteProtocolError as error:
            self._refused("question", error)
            return encode(_refusal(error))
        counters, store = self.counts(), self._span.store
        counters |= {"open_sessions": len(self._sessions), "tasks": len(asyncio.all_tasks())}
        counters |= {"trained": self._training.served, "training": len(self._training)}
        counters |= {"adapter_bytes": self._loans.stock.kept_bytes}
        counters |= {"graph_bytes": self._training.keeping.used}
        residents = self._span.residents
        counters |= {"resident_bytes": sum(resident.size for resident in residents)}
        counters |= {"kv_bytes": store.taken, "kv_used_bytes": store.used}
        counters |= {"uptime_seconds": int(time.monotonic() - self._served.since)}
        adapters = {resident.name: resident.id for resident in residents}
        record, load = self._served.record(), self.load()
        return encode(Info(record=record, load=load, counters=counters, adapters=adapters))

    @asynccontextmanager
    async def _refusing(self, stream: Stream) -> AsyncGenerator[None]:
        try:
            yield
        except RemoteProtocolError as error:
            self._refused("stream", error)
            with suppress(PeerUnavailable, TimeoutError):
                async with asyncio.timeout(self._limits.send_timeout):
                    await stream.send(encode(_refusal(error)))
                    await stream.finish()
        except PeerUnavailable as error:
            self.meters.broken += 1
            logger.info("a stream broke: %s", str(error))

    def _refused(self, what: str, error: RemoteProtocolError) -> None:
        self.counters.refusals += 1
        self.meters.refused[error.code] += 1
        # Not the error itself: its traceback holds caches.
        self._complaints.warning("refused a %s: %s", what, str(error), code=str(error.code))

    async def _first(self, stream: Stream) -> Message:
        try:
            async with asyncio.timeout(self._limits.open_timeout):
                frame = await stream.receive()
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, "a stream must say at once what it wants"
            ) from None
        if frame is None:
            raise PeerUnavailable("the stream ended before it began")
        return decode(frame)

    def _authenticate(self, nonce: bytes, credentials: Credentials) -> str:
        access = self._served.access
        transcript = opening_transcript(
            access.identity.peer_id,
            self._served.certificate_digest(),
            nonce,
            credentials.public_key,
        )
        try:
            return access.check_opening(transcript, credentials)
        except AuthenticationError as error:
            raise RemoteProtocolError(ErrorCode.UNAUTHORIZED, str(error)) from error

    def _check(self, opening: Opening) -> str:
        """The client's peer id. Raises RemoteProtocolError."""
        agree_on_version(opening)
        client = self._authenticate(opening.session_id, opening.credentials)
        if self.draining:
            raise RemoteProtocolError(ErrorCode.DRAINING, "this server is leaving; try another")
        served = self._served
        if (opening.model, opening.fingerprint) != (served.model.name, served.model.fingerprint):
            raise RemoteProtocolError(
                ErrorCode.WRONG_MODEL, f"this server serves {served.model}, not {opening.model}"
            )
        if (opening.dtype, opening.quantization) != astuple(served.numerics):
            raise RemoteProtocolError(
                ErrorCode.WRONG_MODEL, f"this server computes in {served.numerics}"
            )
        return client

    def _make(self, opening: Open, client: str, cache: SpanCache) -> Session:
        limits = self._limits
        ledger = Ledger(
            batch_size=opening.batch_size,
            max_length=opening.max_length,
            max_step_tokens=limits.max_step_tokens,
            hidden_size=self._span.hidden_size,
            dtype=DTYPE_NAMES[self._span.dtype],
        )
        pusher = Pusher(
            self._transport,
            self._resolve,
            opening.next,
            window=limits.window,
            timeout=limits.send_timeout,
        )
        guest = Guest(
            client,
            opening.priority,
            opening.codec,
            is_last=opening.next is None,
            moves=HAND_OVER in opening.capabilities and can_move(cache),
        )
        return Session(guest, ledger, cache, pusher, self._house)

    def _cache(self, opening: Open) -> SpanCache:
        try:
            blocks = BlockRange(opening.start, opening.end)
            if not self._span.blocks.contains(blocks):
                raise UsageError(f"blocks {blocks} asked for; {self._span.blocks} are here")
            return self._span.open_cache(blocks, opening.batch_size, opening.max_length)
        except UsageError as error:
            raise RemoteProtocolError(ErrorCode.BAD_SPAN, str(error)) from error

    def _opened(self, opening: Open) -> Opened:
        return Opened(
            protocol=agree_on_version(opening),
            capabilities=tuple(c for c in opening.capabilities if c == HAND_OVER),
            window=self._limits.window,
            max_step_tokens=self._limits.max_step_tokens,
            load=self.load(),
        )


def _refusal(error: RemoteProtocolError) -> Refused:
    return Refused(
        code=error.code,
        message=str(error.args[0])[:200],
        position=error.position,
        retry_after=error.retry_after,
    )
