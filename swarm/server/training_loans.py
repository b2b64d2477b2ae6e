"""Adapters that clients lend us: they come in bundles, are checked, and never executed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

from swarm.config import ServerLimits
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.loop import in_thread
from swarm.messages import Bundle, Close, Lend, Lent, Message
from swarm.messages_training import BundleSpec
from swarm.models.adapters import Adapter, BlockAdapter
from swarm.models.bundles import digest_of, from_bundle
from swarm.models.spans import Span
from swarm.protocol import LENDING, Conversation
from swarm.server.adapters_stock import Loan, Stock
from swarm.transport import Stream
from swarm.types import BlockRange
from swarm.wire import decode, encode


class LoanDesk:
    """What a handler does with streams that begin with `lend`.

    `forget` is called, soon, when an adapter is dropped: on the device may be traces of it.
    """

    def __init__(self, span: Span, limits: ServerLimits, forget: Callable[[], None]) -> None:
        self._span = span
        self._limits = limits
        self._forget = forget
        self.stock = Stock(limits.adapter_bytes, span.residents)

    async def serve(self, stream: Stream, request: Lend, client: str) -> None:
        """Until the client ends the stream. Raises RemoteProtocolError, PeerUnavailable."""
        conversation = Conversation(LENDING)
        conversation.receive(request)
        blocks = self._check(request)
        before = self.stock.dropped
        with self.stock.lent(client, blocks, request.bundles) as loan:
            if self.stock.dropped > before:
                self._forget()
            if loan.missing:
                await self._send(stream, Lent(missing=tuple(spec.block for spec in loan.missing)))
                await self._gather(stream, conversation, loan)
            await self._send(stream, Lent())
            await self._end(stream, conversation)

    def borrowed(
        self, client: str, name: bytes | None, blocks: BlockRange
    ) -> AbstractContextManager[Adapter | None]:
        """As `Stock.borrowed`."""
        return self.stock.borrowed(client, name, blocks)

    def _check(self, request: Lend) -> BlockRange:
        """Which blocks are meant. Raises RemoteProtocolError."""
        span, start, end = self._span.blocks, request.start, request.end
        named = {spec.block for spec in request.bundles}
        if not span.start <= start < end <= span.end or len(named) < len(request.bundles):
            raise RemoteProtocolError(
                ErrorCode.BAD_SPAN, f"one bundle for each block is possible, of {span}"
            )
        return BlockRange(start, end)

    async def _gather(self, stream: Stream, conversation: Conversation, loan: Loan) -> None:
        specs = {spec.block: spec for spec in loan.missing}
        come: dict[int, bytearray] = {block: bytearray() for block in specs}
        while any(len(come[block]) < spec.size for block, spec in specs.items()):
            message = await self._receive(stream, conversation, self._limits.send_timeout)
            if not isinstance(message, Bundle):
                raise PeerUnavailable("the client gave up")
            part = come.get(message.block)
            if part is None or message.start != len(part):
                raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "not what comes next of it")
            part += message.data
            if len(part) > specs[message.block].size:
                raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "more bytes than were announced")
        for block, spec in specs.items():
            data = bytes(come.pop(block))
            self.stock.add(loan, spec, await in_thread(lambda d=data, s=spec: self._parse(d, s)))

    def _parse(self, data: bytes, spec: BundleSpec) -> BlockAdapter:
        if digest_of(data) != spec.digest:
            raise RemoteProtocolError(ErrorCode.BAD_ADAPTER, "an adapter is not what its hash says")
        span = self._span
        return from_bundle(data, span.patches.sizes(spec.block), span.device, span.hidden_size)

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
