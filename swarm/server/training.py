"""Training for strangers: a batch comes, goes through a span or back, and is forgotten.

Memory for what a request says it will send is promised before it sends it. Graphs of what went
forward are kept for the way back while its stream lasts, if there is room: they only save time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from swarm.config import ServerLimits
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.messages import (
    MAX_BATCH,
    MAX_TOKENS,
    Back,
    Close,
    Load,
    Message,
    Opened,
    Piece,
    Refused,
    Train,
    Trained,
)
from swarm.messages_training import KEEP, TensorSpec
from swarm.models.families import check_places
from swarm.models.spans import Span
from swarm.models.training import Batch, Kept, SpanTraining
from swarm.pieces import Gathering, in_pieces
from swarm.protocol import INPUTS, PLANES, TRAINING, Conversation, agree_on_version
from swarm.server.executor import Executor
from swarm.server.memory import Admission
from swarm.server.throughput import free_bytes
from swarm.server.training_kept import Keeping, Place
from swarm.server.training_loans import LoanDesk
from swarm.tensors import DTYPE_NAMES, check_positions
from swarm.transport import Stream
from swarm.types import BlockRange
from swarm.wire import decode, encode

_KEPT_SHARE = 8  # at most that part of free memory for graphs between two requests


@dataclass(frozen=True, slots=True)
class _Visit:
    """A stream that began with `train`; `client` has proven who it is."""

    stream: Stream
    conversation: Conversation
    request: Train
    client: str

    @property
    def keeps(self) -> bool:
        """Whether the client may want to go back by it."""
        return KEEP in self.request.capabilities and not self.request.backward


@dataclass(frozen=True, slots=True)
class _Stay:
    """A batch that went forward, and may go back."""

    batch: Batch
    kept: Kept
    place: Place


class TrainingDesk:
    """What a handler does with streams that begin with `train`."""

    def __init__(
        self,
        span: Span,
        executor: Executor,
        limits: ServerLimits,
        loans: LoanDesk,
        load: Callable[[], Load],
    ) -> None:
        self._loans = loans
        self._span = span
        self._executor = executor
        self._limits = limits
        self._load = load
        self._work = SpanTraining(span, limits.graph_bytes)
        self._admission = Admission(limits.training_bytes, 1.0, limits.max_sessions)
        self._turns: dict[bytes, asyncio.Event] = {}
        budget = min(limits.kept_bytes, free_bytes(span.device) // _KEPT_SHARE)
        self.keeping = Keeping(budget, limits.max_sessions)
        self.served = 0  # answers

    def __len__(self) -> int:
        """Requests that are here now."""
        return len(self._admission)

    async def serve(self, stream: Stream, request: Train, client: str) -> None:
        """Until all is answered; `client` has proven who it is. Raises RemoteProtocolError."""
        visit = _Visit(stream, Conversation(TRAINING), request, client)
        visit.conversation.receive(request)
        needed = self._check(request)
        with ExitStack() as leaving:
            with self._loans.borrowed(client, request.adapter, _blocks(request)) as adapter:
                async with self._room(request.session_id, client, needed):
                    await self._open(visit)
                    tensors = await self._gather(visit, request.tensors)
                    batch = replace(_batch(request, tensors, self._span), adapter=adapter or {})
                    stay = self._stay(visit, batch, leaving)
                    await self._answer(visit, batch, request.deadline_ms, stay)
            back = await self._until_back(visit, stay) if stay else None
            if stay is None or back is None:
                return
            async with self._room(request.session_id, client, needed):
                await self._open(visit)
                tensors = await self._gather(visit, {"gradient": request.tensors["hidden"]})
                batch = replace(batch, gradient=tensors["gradient"])
                await self._answer(visit, batch, back.deadline_ms, stay)

    def _stay(self, visit: _Visit, batch: Batch, leaving: ExitStack) -> _Stay | None:
        """Until `leaving` there is room to keep something of it; None: the client wants nothing."""
        if not visit.keeps:
            return None
        stay = _Stay(batch, Kept(), self.keeping.ask(visit.client, self._work.keeping(batch)))
        leaving.callback(self._executor.run_soon, stay.kept.clear)
        leaving.callback(self.keeping.free, stay.place)
        stay.kept.room = stay.place.nbytes - batch.nbytes
        return stay

    async def _until_back(self, visit: _Visit, stay: _Stay) -> Back | None:
        """What the client says when it goes back; None if it does not, or has to come anew."""
        try:
            async with asyncio.timeout(self._limits.kept_seconds) as patience:

                def leave() -> None:
                    self._executor.run_soon(stay.kept.clear)
                    if not patience.expired():
                        patience.reschedule(0)

                if stay.kept.nbytes:
                    nbytes = stay.batch.nbytes + int(stay.kept.nbytes)
                    self.keeping.settle(stay.place, nbytes, leave)
                else:
                    patience.reschedule(0)
                frame = await visit.stream.receive()
        except TimeoutError:
            why = "what went forward is not kept any more: send it again"
            await self._send(visit, Refused(code=ErrorCode.UNKNOWN_SESSION, message=why))
            return None
        self.keeping.use(stay.place)
        message = None if frame is None else visit.conversation.receive(decode(frame))
        if message is None or isinstance(message, Close):
            return None
        if not isinstance(message, Back):
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "all of the batch had come")
        return message

    async def _open(self, visit: _Visit) -> None:
        opened = Opened(
            protocol=agree_on_version(visit.request),
            capabilities=(KEEP,) if visit.keeps else (),
            window=self._limits.window,
            max_step_tokens=self._limits.max_step_tokens,
            load=self._load(),
        )
        await self._send(visit, opened)

    async def _answer(
        self, visit: _Visit, batch: Batch, deadline_ms: int, stay: _Stay | None
    ) -> None:
        kept = None if stay is None else stay.kept
        clock = asyncio.get_running_loop().time
        begin = clock()
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                result = await self._executor.train(
                    visit.client, lambda width: self._work.run(batch, width, kept)
                )
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, f"not computed within {deadline_ms} ms"
            ) from None
        for piece in in_pieces(result, visit.request.codec):
            await self._send(visit, piece)
        self.served += 1
        elapsed = 1e3 * (clock() - begin)
        await self._send(visit, Trained(compute_ms=elapsed, load=self._load()))

    def _check(self, request: Train) -> int:
        """Bytes that it will take here. Raises RemoteProtocolError."""
        if not (request.start < request.end and self._span.blocks.contains(_blocks(request))):
            raise RemoteProtocolError(
                ErrorCode.BAD_SPAN,
                f"blocks {request.start}:{request.end} asked for; {self._span.blocks} are here",
            )
        _check_tensors(request, DTYPE_NAMES[self._span.dtype], self._span.hidden_size)
        sizes = {name: spec.nbytes for name, spec in request.tensors.items()}
        needed = sum(sizes.values()) + sizes["hidden"] + sizes.get("prompts", 0)
        tokens = request.tensors["hidden"].shape[1]
        if needed > self._limits.training_bytes or not self._work.fits(tokens):
            raise RemoteProtocolError(
                ErrorCode.OVERSIZE,
                f"a batch of {needed:,} bytes, texts of {tokens} tokens; send fewer rows at a "
                f"time, or shorter texts: there is room for {self._limits.training_bytes:,} bytes",
            )
        return needed

    @asynccontextmanager
    async def _room(self, session_id: bytes, client: str, needed: int) -> AsyncGenerator[None]:
        """Memory for a request, after waiting for it. Raises RemoteProtocolError BUSY."""
        admitted = self._admission.ask(session_id, client, needed)
        try:
            if not admitted:
                turn = self._turns[session_id] = asyncio.Event()
                async with asyncio.timeout(self._limits.training_wait):
                    await turn.wait()
            yield
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.BUSY, "others train here; try again later", retry_after=5.0
            ) from None
        finally:
            self._turns.pop(session_id, None)
            for other in self._admission.leave(session_id):
                self._turns[other].set()

    async def _gather(self, visit: _Visit, specs: Mapping[str, TensorSpec]) -> Mapping[str, Tensor]:
        gathering = Gathering(specs)
        while not gathering.complete:
            try:
                async with asyncio.timeout(self._limits.send_timeout):
                    frame = await visit.stream.receive()
            except TimeoutError:
                raise RemoteProtocolError(
                    ErrorCode.DEADLINE, "the batch was announced and did not come"
                ) from None
            message = None if frame is None else visit.conversation.receive(decode(frame))
            if not isinstance(message, Piece):
                raise PeerUnavailable("the client gave up")
            gathering.add(message)
        return gathering.tensors

    async def _send(self, visit: _Visit, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                await visit.stream.send(encode(message))
        except TimeoutError:
            raise PeerUnavailable("the client does not read its answers") from None


def _blocks(request: Train) -> BlockRange:
    return BlockRange(request.start, request.end)


def _batch(request: Train, tensors: Mapping[str, Tensor], span: Span) -> Batch:
    positions = tensors.get("position_ids")
    if positions is not None:
        check_positions(positions)
    check_places(span.most_positions, positions, tensors["hidden"].shape[1])
    return Batch(
        _blocks(request),
        tensors["hidden"],
        tensors.get("gradient"),
        positions,
        tensors.get("padding"),
        tensors.get("prompts"),
    )


def _check_tensors(request: Train, dtype: str, size: int) -> None:
    """Names, dtypes and shapes of what is to come. Raises RemoteProtocolError BAD_TENSOR."""
    tensors = request.tensors
    shape = tensors["hidden"].shape if "hidden" in tensors else ()
    if len(shape) != 3 or not (0 < shape[0] <= MAX_BATCH and 0 < shape[1] <= MAX_TOKENS):
        raise RemoteProtocolError(ErrorCode.BAD_TENSOR, f"'hidden' {list(shape)} is no batch")
    if ("gradient" in tensors) != request.backward:
        raise RemoteProtocolError(
            ErrorCode.BAD_TENSOR, "'gradient' is for going backward, and only then"
        )
    rows, tokens, _ = shape
    for name, spec in tensors.items():
        if name in ("hidden", "gradient"):
            fits = spec.dtype == dtype and spec.shape == (rows, tokens, size)
        elif name == "prompts":
            count = request.end - request.start
            width = spec.shape[1] if len(spec.shape) == 3 else 0
            known = spec.dtype == dtype and 0 < width <= tokens
            fits = known and spec.shape == (count, width, size)
        else:
            planes = spec.shape[2:]
            may = not planes or (name == "position_ids" and planes in PLANES)
            fits = INPUTS.get(name) == spec.dtype and spec.shape[:2] == (rows, tokens) and may
        if not fits or prod(spec.shape) == 0:
            raise RemoteProtocolError(
                ErrorCode.BAD_TENSOR, f"'{name[:40]}' {spec.dtype}{list(spec.shape)}"
            )
