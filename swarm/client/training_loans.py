"""Adapters of ours on servers: lent while a batch or session needs them, sent if not there yet."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from swarm.client.hop import Adapting, Terms, endpoint_of, refusal
from swarm.dht.records import ServerRecord
from swarm.errors import (
    AdapterRefused,
    ErrorCode,
    PeerUnavailable,
    RemoteProtocolError,
    afresh,
)
from swarm.identity import Access
from swarm.messages import Bundle, Lend, Lent, Refused
from swarm.models.bundles import Bundles
from swarm.protocol import LOANS, Conversation
from swarm.transport import Endpoint, Stream, Transport
from swarm.types import BlockRange
from swarm.wire import decode, encode

_PART_BYTES = 1 << 20  # of a bundle in one frame
_LOANS = 2  # to one server, that nobody needs now: of the present weights, and of those before
_DOUBTS = 64  # that are remembered: weights that are trained have another name with each step
_LINGER = 1.0  # seconds for which they may: the next batch is about to come


@dataclass(frozen=True, slots=True)
class Lender:
    """How adapters travel."""

    terms: Terms
    transport: Transport
    access: Access
    timeout: float  # seconds to dial, and between two signs of life

    async def lend(self, endpoint: Endpoint, bundles: Bundles, blocks: BlockRange) -> Stream:
        """The loan lasts as long as this stream. Raises PeerUnavailable, RemoteProtocolError."""
        stream = await self.transport.open_stream(endpoint, "session", self.timeout)
        done = False
        try:
            fields = self.terms.opening(self.access, endpoint, secrets.token_bytes(16), blocks)
            await stream.send(encode(Lend(**fields, bundles=bundles.specs)))
            conversation = Conversation(LOANS)
            missing = await self._hear(stream, conversation)
            if missing:
                for block in missing:
                    await self._send(stream, block, bundles.data.get(block, b""))
                missing = await self._hear(stream, conversation)
            if missing:
                raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "it asks for the same again")
            done = True
            return stream
        finally:
            if not done:
                stream.cancel()

    async def _send(self, stream: Stream, block: int, data: bytes) -> None:
        for start in range(0, len(data), _PART_BYTES):
            part = data[start : start + _PART_BYTES]
            try:
                async with asyncio.timeout(self.timeout):
                    await stream.send(encode(Bundle(block=block, start=start, data=part)))
            except TimeoutError:
                raise PeerUnavailable(f"an adapter was not taken for {self.timeout:g} s") from None

    async def _hear(self, stream: Stream, conversation: Conversation) -> Sequence[int]:
        try:
            async with asyncio.timeout(self.timeout):
                frame = await stream.receive()
        except TimeoutError:
            raise PeerUnavailable(f"no answer to a loan within {self.timeout:g} s") from None
        if frame is None:
            raise PeerUnavailable("the server ended a loan")
        message = conversation.receive(decode(frame))
        if isinstance(message, Refused):
            raise refusal(message)
        assert isinstance(message, Lent)
        return message.missing


_Key = tuple[bytes, BlockRange]  # which adapter, and where


@dataclass(slots=True)
class _Given:
    """A loan, and how many need it now."""

    task: asyncio.Task[Stream]
    users: int = 0
    ending: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Loans:
    """Who has adapters of ours. For the event loop."""

    _given: dict[str, dict[_Key, _Given]] = field(default_factory=dict[str, dict[_Key, _Given]])
    _doubted: deque[tuple[str, bytes]] = field(default_factory=lambda: deque(maxlen=_DOUBTS))

    @asynccontextmanager
    async def lent(
        self, lender: Lender, server: ServerRecord, bundles: Bundles, blocks: BlockRange
    ) -> AsyncGenerator[bytes | None]:
        """Inside, that server has these adapters, by this hash; None: they change none of `blocks`.

        Raises PeerUnavailable, RemoteProtocolError, AdapterRefused.
        """
        if not bundles.data or self._has(server, bundles.id):
            yield bundles.id
            return
        if not bundles.touches(blocks):
            yield None
            return
        given, key = self._given.setdefault(server.peer_id, {}), (bundles.id, blocks)
        if key not in given:
            lending = lender.lend(endpoint_of(server), bundles, blocks)
            given[key] = _Given(asyncio.create_task(lending))
        loan = given[key]
        loan.users += 1
        try:
            try:
                await asyncio.shield(loan.task)
            except RemoteProtocolError as error:
                raise _explained(error, server, blocks) from None
            yield bundles.id
        finally:
            loan.users -= 1
            if given.get(key) is loan:
                self._rest(given, key, loan)

    def _has(self, server: ServerRecord, name: bytes) -> bool:
        """By its own word, which has not proven wrong."""
        known = any(name.startswith(adapter.id) for adapter in server.adapters)
        return known and (server.peer_id, name) not in self._doubted

    def _rest(self, given: dict[_Key, _Given], key: _Key, loan: _Given) -> None:
        """Nobody needs it now, perhaps: it ends in a moment."""
        task = loan.task
        if task.done() and (task.cancelled() or task.exception() is not None):
            del given[key]
        elif not loan.users:
            loop = asyncio.get_running_loop()
            if loan.ending is not None:
                loan.ending.cancel()
            loan.ending = loop.call_later(_LINGER, self._expire, given, key, loan)
            given[key] = given.pop(key)  # the last of those that rest
            resting = [key for key, other in given.items() if not other.users]
            for old in resting[:-_LOANS]:
                _end(given.pop(old))

    def _expire(self, given: dict[_Key, _Given], key: _Key, loan: _Given) -> None:
        if given.get(key) is loan and not loan.users:
            _end(given.pop(key))

    def lost(self, peer_id: str, name: bytes | None = None) -> None:
        """That server knows of no loans any more, or has failed; it does not have `name`."""
        if name is not None and (peer_id, name) not in self._doubted:
            self._doubted.append((peer_id, name))
        for loan in self._given.pop(peer_id, {}).values():
            _end(loan)

    async def close(self) -> None:
        for peer_id in list(self._given):
            self.lost(peer_id)


def _end(loan: _Given) -> None:
    def cancel(done: asyncio.Task[Stream]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().cancel()

    if loan.ending is not None:
        loan.ending.cancel()
    loan.task.add_done_callback(cancel)


def _explained(
    error: RemoteProtocolError, server: ServerRecord, blocks: BlockRange
) -> RemoteProtocolError | AdapterRefused:
    """What no other try will change, for people."""
    if error.code not in (ErrorCode.OVERSIZE, ErrorCode.BAD_ADAPTER):
        return afresh(error)
    refusal = f"{endpoint_of(server)} does not take this adapter for blocks {blocks}: {error}"
    if error.code is ErrorCode.OVERSIZE:
        refusal += (
            "; make it smaller (rank, target_modules, pre_seq_len), or have servers started with "
            "more --adapter-memory or fewer blocks"
        )
    return AdapterRefused(refusal)


@dataclass(frozen=True, slots=True)
class Borrowing(Adapting):
    """An adapter for sessions: ours, or one that servers announce (`bundles` without data)."""

    bundles: Bundles
    lender: Lender
    loans: Loans

    @property
    def id(self) -> bytes:
        return self.bundles.id

    @property
    def block_bytes(self) -> float | None:
        data = self.bundles.data
        return sum(map(len, data.values())) / len(data) if data else None

    def lent(
        self, server: ServerRecord, blocks: BlockRange
    ) -> AbstractAsyncContextManager[bytes | None]:
        return self.loans.lent(self.lender, server, self.bundles, blocks)

    def lost(self, peer_id: str) -> bool:
        self.loans.lost(peer_id, self.id)
        return bool(self.bundles.data)
