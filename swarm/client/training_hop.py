"""One request for training to one server: a batch goes there, and an answer comes back."""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from swarm.asking import ask
from swarm.client.hop import Terms, endpoint_of, refusal
from swarm.client.training_plan import Leg
from swarm.config import ClientConfig
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.identity import Access
from swarm.messages import Back, Message, Opened, Piece, Refused, Train, Trained
from swarm.messages_training import KEEP, TensorSpec
from swarm.pieces import Gathering, in_pieces, spec_of
from swarm.protocol import TRAINED, Conversation
from swarm.transport import Endpoint, Stream, Transport
from swarm.wire import decode, encode

T = TypeVar("T")

_LONGEST = 600.0  # seconds for a request, whatever signs of life its server gives
_LOOK = 5.0  # seconds without progress after which a server is asked whether it lives


@dataclass(frozen=True, slots=True)
class Post:
    """How requests travel."""

    terms: Terms
    transport: Transport
    access: Access
    config: ClientConfig

    async def ask(
        self,
        leg: Leg,
        tensors: Mapping[str, Tensor],
        adapter: bytes | None,
        answer: Mapping[str, TensorSpec],
        *,
        keep: bool = False,
    ) -> tuple[Mapping[str, Tensor], Held | None]:
        """The `answer` to a batch, backward if there is a `gradient` in it; with `keep` perhaps
        also a shorter way back.

        Raises PeerUnavailable, RemoteProtocolError.
        """
        endpoint = endpoint_of(leg.server.record)
        request = self._request(leg, endpoint, tensors, adapter, (KEEP,) if keep else ())
        timeout = self.config.timeouts.connect
        stream = await self.transport.open_stream(endpoint, "session", timeout)
        line, held = _Line(self, endpoint, stream, Conversation(TRAINED)), None
        try:
            opened, found = await line.exchange(request, tensors, answer)
            if keep and KEEP in opened.capabilities:
                held = Held(leg, line)
            return found, held
        finally:
            if held is None:
                stream.cancel()

    def _request(
        self,
        leg: Leg,
        endpoint: Endpoint,
        tensors: Mapping[str, Tensor],
        adapter: bytes | None,
        capabilities: tuple[str, ...],
    ) -> Train:
        session_id = secrets.token_bytes(16)
        return Train(
            **self.terms.opening(self.access, endpoint, session_id, leg.blocks),
            capabilities=capabilities,
            codec=self.terms.codec,
            backward="gradient" in tensors,
            adapter=adapter,
            tensors={name: spec_of(tensor) for name, tensor in tensors.items()},
            deadline_ms=int(1e3 * _LONGEST),
        )


@dataclass(frozen=True, slots=True)
class _Line:
    """A stream to a server, and what may come by it."""

    post: Post
    endpoint: Endpoint
    stream: Stream
    conversation: Conversation

    async def exchange(
        self, message: Train | Back, tensors: Mapping[str, Tensor], answer: Mapping[str, TensorSpec]
    ) -> tuple[Opened, Mapping[str, Tensor]]:
        """Raises PeerUnavailable, RemoteProtocolError."""
        try:
            async with asyncio.timeout(_LONGEST):
                return await self._exchange(message, tensors, answer)
        except TimeoutError:
            raise PeerUnavailable(f"{self.endpoint} took more than {_LONGEST:g} s") from None

    async def _exchange(
        self, message: Train | Back, tensors: Mapping[str, Tensor], answer: Mapping[str, TensorSpec]
    ) -> tuple[Opened, Mapping[str, Tensor]]:
        await self._say([message])
        opened = await self._hear()
        assert isinstance(opened, Opened)  # by the table, if it did not refuse
        await self._say(in_pieces(tensors, self.post.terms.codec))
        gathering = Gathering(answer)
        while isinstance(heard := await self._hear(), Piece):
            gathering.add(heard)
        if not isinstance(heard, Trained) or not gathering.complete:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "the answer is not complete")
        return opened, gathering.tensors

    async def _say(self, messages: Iterable[Message]) -> None:
        try:
            for message in messages:
                await self._alive(self.stream.send(encode(message)))
        except PeerUnavailable:
            await self._hear()  # perhaps it has said why
            raise

    async def _hear(self) -> Message:
        """The next message."""
        frame = await self._alive(self.stream.receive())
        if frame is None:
            raise PeerUnavailable(f"{self.endpoint} ended the stream")
        message = self.conversation.receive(decode(frame))
        if isinstance(message, Refused):
            raise refusal(message)
        return message

    async def _alive(self, work: Coroutine[Any, Any, T]) -> T:
        """What that gives, however long it takes, as long as the server says that it lives.

        Raises PeerUnavailable.
        """
        post, task = self.post, asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=_LOOK))[0]:
                await ask(post.transport, post.access, self.endpoint, post.config.timeouts.sync)
            return await task
        finally:
            task.cancel()


class Held:
    """A server that still has what it takes to go back through what went forward there: it is asked
    once. When nobody refers to this any more, the server may forget it."""

    def __init__(self, leg: Leg, line: _Line) -> None:
        self.leg = leg
        self._line = line
        self._end = weakref.finalize(self, _end, asyncio.get_running_loop(), line.stream)
        self._end.atexit = False  # at exit the streams end anyway

    @property
    def asked(self) -> bool:
        return not self._end.alive

    async def back(
        self, gradient: Tensor, answer: Mapping[str, TensorSpec]
    ) -> Mapping[str, Tensor]:
        """Raises PeerUnavailable; RemoteProtocolError if it has not what it takes any more."""
        self._end.detach()
        try:
            message = Back(deadline_ms=int(1e3 * _LONGEST))
            return (await self._line.exchange(message, {"gradient": gradient}, answer))[1]
        finally:
            self._line.stream.cancel()


def _end(loop: asyncio.AbstractEventLoop, stream: Stream) -> None:
    with suppress(RuntimeError):  # the loop is closed, and the stream with it
        loop.call_soon_threadsafe(stream.cancel)
