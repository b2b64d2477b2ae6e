"""Adapters that clients lend us: kept by client and hash within a budget, and never executed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swarm.config import ServerLimits
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.loop import in_thread
from swarm.messages import Bundle, Close, Lend, Lent, Message
from swarm.models.adapters import Adapter, BlockAdapter, digest_of, from_bundle
from swarm.models.spans import Span
from swarm.protocol import LENDING, Conversation
from swarm.server.holdings import Holdings
from swarm.transport import Stream
from swarm.wire import decode, encode

_Key = tuple[str, bytes, int]  # client, digest, block


@dataclass(slots=True)
class _Kept:
    """A bundle that came, and how many loans have it."""

    adapter: BlockAdapter
    size: int
    loans: int = 0


@dataclass(slots=True, eq=False)
class Loan:
    """Adapters that a client may use, as long as anybody holds the loan."""

    client: str
    size: int
    keys: list[_Key] = field(default_factory=list[_Key])
    adapter: dict[int, BlockAdapter] = field(default_factory=dict[int, BlockAdapter])
    holders: int = 0


class LoanDesk:
    """What a handler does with streams that begin with `lend`.

    `forget` is called, soon, when an adapter is dropped: on the device may be traces of it.
    """

    def __init__(self, span: Span, limits: ServerLimits, forget: Callable[[], None]) -> None:
        self._span = span
        self._limits = limits
        self._forget = forget
        self._holdings = Holdings(limits.adapter_bytes)
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._loans: dict[tuple[str, bytes], Loan] = {}

    @property
    def kept_bytes(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    async def serve(self, stream: Stream, request: Lend, client: str) -> None:
        """Until the client ends the stream. Raises RemoteProtocolError, PeerUnavailable."""
        conversation = Conversation(LENDING)
        conversation.receive(request)
        name = client, request.session_id
        loan = Loan(client, self._check(request))
        if name in self._loans:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "that was lent already")
        with self._held(loan):
            missing = self._pin(loan, request)
            if missing:
                await self._send(stream, Lent(missing=tuple(missing)))
                await self._gather(stream, conversation, loan, request, missing)
            self._loans[name] = loan
            try:
                await self._send(stream, Lent())
                await self._end(stream, conversation)
            finally:
                del self._loans[name]

    @contextmanager
    def borrowed(self, client: str, name: bytes) -> Generator[Adapter | None]:
        """What was lent under that name; None: nothing. Inside, it is not taken back."""
        loan = self._loans.get((client, name))
        if loan is None:
            yield None
        else:
            with self._held(loan):
                yield loan.adapter

    @contextmanager
    def _held(self, loan: Loan) -> Generator[None]:
        if not loan.holders:
            self._holdings.take(loan.client, loan.size)
        loan.holders += 1
        try:
            yield
        finally:
            loan.holders -= 1
            if not loan.holders:
                self._holdings.give(loan.client, loan.size)
                for key in loan.keys:
                    self._kept[key].loans -= 1
                loan.keys.clear()
                loan.adapter = {}  # whoever still computes with the old one may finish

    def _check(self, request: Lend) -> int:
        """Bytes of all bundles. Raises RemoteProtocolError."""
        blocks = [spec.block for spec in request.bundles]
        span = self._span.blocks
        if len(set(blocks)) < len(blocks) or not all(span.start <= b < span.end for b in blocks):
            raise RemoteProtocolError(
                ErrorCode.BAD_SPAN, f"one adapter for each block is possible, of {span}"
            )
        size = sum(spec.size for spec in request.bundles)
        most = self._limits.adapter_bytes // 2
        if size > most:
            raise RemoteProtocolError(
                ErrorCode.OVERSIZE, f"adapters of {size:,} bytes; at most {most:,} can be kept"
            )
        return size

    def _pin(self, loan: Loan, request: Lend) -> list[int]:
        """Hold what is here, and make room for what is not: its blocks."""
        missing: list[int] = []
        for spec in request.bundles:
            key = loan.client, spec.digest, spec.block
            kept = self._kept.get(key)
            if kept is None or kept.size != spec.size:
                missing.append(spec.block)
            else:
                self._hold(loan, key, kept)
        self._make_room()
        return missing

    def _hold(self, loan: Loan, key: _Key, kept: _Kept) -> None:
        kept.loans += 1
        self._kept.move_to_end(key)
        loan.keys.append(key)
        loan.adapter[key[2]] = kept.adapter

    def _make_room(self) -> None:
        """All that is held has room, and what comes; of the others only as much as is left."""
        free = [key for key, kept in self._kept.items() if not kept.loans]
        room = self._holdings.left
        spare = sum(self._kept[key].size for key in free)
        dropped = False
        for key in free:
            if spare <= room:
                break
            spare -= self._kept.pop(key).size
            dropped = True
        if dropped:
            self._forget()

    async def _gather(
        self,
        stream: Stream,
        conversation: Conversation,
        loan: Loan,
        request: Lend,
        missing: list[int],
    ) -> None:
        specs = {spec.block: spec for spec in request.bundles if spec.block in missing}
        come: dict[int, bytearray] = {block: bytearray() for block in missing}
        while any(len(come[block]) < specs[block].size for block in missing):
            message = await self._receive(stream, conversation, self._limits.send_timeout)
            if not isinstance(message, Bundle):
                raise PeerUnavailable("the client gave up")
            part = come.get(message.block)
            if part is None or message.start != len(part):
                raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "not what comes next of it")
            part += message.data
            if len(part) > specs[message.block].size:
                raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "more bytes than were announced")
        for block, part in come.items():
            adapter = await in_thread(
                lambda b=block, d=bytes(part): self._parse(b, d, specs[b].digest)
            )
            key = loan.client, specs[block].digest, block
            # Another loan of the same may have been quicker.
            kept = self._kept.setdefault(key, _Kept(adapter, specs[block].size))
            self._hold(loan, key, kept)

    def _parse(self, block: int, data: bytes, digest: bytes) -> BlockAdapter:
        if digest_of(data) != digest:
            raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "an adapter is not what its hash says")
        span = self._span
        return from_bundle(data, span.patches.sizes(block), span.device, span.hidden_size)

    async def _end(self, stream: Stream, conversation: Conversation) -> None:
        message = await self._receive(stream, conversation, self._limits.idle_timeout)
        if message is not None and not isinstance(message, Close):
            raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "no more bundles were missing")

    async def _receive(
        self, stream: Stream, conversation: Conversation, patience: float
    ) -> Message | None:
        try:
            async with asyncio.timeout(patience):
                frame = await stream.receive()
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, f"nothing came for {patience:g} s"
            ) from None
        return None if frame is None else conversation.receive(decode(frame))

    async def _send(self, stream: Stream, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                await stream.send(encode(message))
        except TimeoutError:
            raise PeerUnavailable("the client does not read its answers") from None
