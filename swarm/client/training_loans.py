"""Adapters of ours on servers: lent before a batch or session needs them, sent if not there yet."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swarm.client.hop import Terms, refusal
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError, SwarmError
from swarm.identity import Access
from swarm.messages import Bundle, Lend, Lent, Message, Open, Refused
from swarm.messages_training import BundleSpec
from swarm.models.adapters import digest_of
from swarm.protocol import LOANS, Conversation
from swarm.transport import Endpoint, Stream, Transport
from swarm.types import BlockRange
from swarm.wire import decode, encode

_PART_BYTES = 1 << 20  # of a bundle in one frame
_LOANS = 2  # to one server at a time: of the present weights, and of those before


@dataclass(frozen=True)
class Bundles:
    """All adapters of a client as they are at the moment, by block, as safetensors bytes."""

    data: Mapping[int, bytes]
    digests: Mapping[int, bytes]

    @classmethod
    def of(cls, data: Mapping[int, bytes]) -> Bundles:
        return cls(data, {block: digest_of(bundle) for block, bundle in data.items()})

    def specs(self, blocks: BlockRange) -> tuple[BundleSpec, ...]:
        return tuple(
            BundleSpec(block=block, digest=self.digests[block], size=len(self.data[block]))
            for block in sorted(self.data)
            if blocks.start <= block < blocks.end
        )


@dataclass(frozen=True, slots=True)
class Lender:
    """How adapters travel."""

    terms: Terms
    transport: Transport
    access: Access
    timeout: float  # seconds to dial, and between two signs of life

    async def lend(
        self, endpoint: Endpoint, bundles: Bundles, specs: Sequence[BundleSpec], name: bytes
    ) -> Stream:
        """The loan lasts as long as this stream. Raises PeerUnavailable, RemoteProtocolError."""
        stream = await self.transport.open_stream(endpoint, "session", self.timeout)
        done = False
        try:
            await stream.send(encode(self._request(endpoint, specs, name)))
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

    def _request(self, endpoint: Endpoint, specs: Sequence[BundleSpec], name: bytes) -> Lend:
        terms = self.terms
        return Lend(
            model=terms.model.name,
            fingerprint=terms.model.fingerprint,
            dtype=terms.numerics.dtype,
            quantization=terms.numerics.quantization,
            session_id=name,
            bundles=tuple(specs),
            credentials=self.access.sign_for(endpoint.peer_id, endpoint.certificate_digest, name),
        )

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


@dataclass(slots=True)
class Loans:
    """Who has adapters of ours for training. For the event loop."""

    _given: dict[str, dict[object, asyncio.Task[tuple[bytes, Stream]]]] = field(
        default_factory=dict[str, dict[object, asyncio.Task[tuple[bytes, Stream]]]]
    )

    async def at(
        self, lender: Lender, endpoint: Endpoint, bundles: Bundles, blocks: BlockRange
    ) -> bytes | None:
        """The name of a loan with these blocks' adapters; None: they have none.

        Raises PeerUnavailable, RemoteProtocolError.
        """
        specs = bundles.specs(blocks)
        if not specs:
            return None
        given = self._given.setdefault(endpoint.peer_id, {})
        key = tuple((spec.block, spec.digest) for spec in specs)
        if key not in given:
            name = secrets.token_bytes(16)
            given[key] = asyncio.create_task(self._lend(lender, endpoint, bundles, specs, name))
            while len(given) > _LOANS:
                _end(given.pop(next(iter(given))))
        task = given[key]
        try:
            name, _ = await asyncio.shield(task)
        except SwarmError:
            if given.get(key) is task:
                del given[key]
            raise
        return name

    async def _lend(
        self,
        lender: Lender,
        endpoint: Endpoint,
        bundles: Bundles,
        specs: Sequence[BundleSpec],
        name: bytes,
    ) -> tuple[bytes, Stream]:
        return name, await lender.lend(endpoint, bundles, specs, name)

    def lost(self, peer_id: str) -> None:
        """That server knows of no loans any more, or has failed."""
        for task in self._given.pop(peer_id, {}).values():
            _end(task)

    async def close(self) -> None:
        for peer_id in list(self._given):
            self.lost(peer_id)


def _end(task: asyncio.Task[tuple[bytes, Stream]]) -> None:
    def cancel(done: asyncio.Task[tuple[bytes, Stream]]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result()[1].cancel()

    task.add_done_callback(cancel)


class LendingTransport(Transport):
    """Lends adapters to whomever a session is opened with, before that is."""

    def __init__(self, lender: Lender, bundles: Bundles) -> None:
        self._lender = lender
        self._bundles = bundles

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        stream = await self._lender.transport.open_stream(endpoint, method, timeout)
        if method != "session":
            return stream
        return _LendingStream(stream, self._lender, endpoint, self._bundles)

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        return await self._lender.transport.call(endpoint, method, request, timeout)

    async def close(self) -> None:
        """The transport below is others', too."""


class _LendingStream(Stream):
    """A session's stream, by which Open is sent when its adapters are there."""

    def __init__(
        self, stream: Stream, lender: Lender, endpoint: Endpoint, bundles: Bundles
    ) -> None:
        self._stream = stream
        self._lender = lender
        self._endpoint = endpoint
        self._bundles = bundles
        self._opened = False
        self._loan: Stream | None = None
        self.send_nowait = stream.send_nowait
        self.receive = stream.receive
        self.finish = stream.finish

    async def send(self, frame: bytes) -> None:
        if not self._opened:
            self._opened = True
            await self._lend(decode(frame))
        await self._stream.send(frame)

    async def _lend(self, opening: Message) -> None:
        assert isinstance(opening, Open)
        specs = self._bundles.specs(BlockRange(opening.start, opening.end))
        if specs:
            name = opening.session_id
            self._loan = await self._lender.lend(self._endpoint, self._bundles, specs, name)

    def cancel(self) -> None:
        self._stream.cancel()
        if self._loan is not None:
            self._loan.cancel()
