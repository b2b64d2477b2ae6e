"""One request for training to one server: a batch goes there, and an answer comes back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from swarm.asking import ask
from swarm.client.hop import Terms, endpoint_of, refusal
from swarm.client.training_plan import Leg
from swarm.config import ClientConfig
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.identity import Access
from swarm.messages import Message, Opened, Piece, Refused, Train, Trained
from swarm.messages_training import TensorSpec
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
    ) -> Mapping[str, Tensor]:
        """The `answer` to a batch, backward if there is a `gradient` in it.

        Raises PeerUnavailable, RemoteProtocolError.
        """
        endpoint = endpoint_of(leg.server.record)
        request = self._request(leg, endpoint, tensors, adapter)
        timeout = self.config.timeouts.connect
        stream = await self.transport.open_stream(endpoint, "session", timeout)
        try:
            async with asyncio.timeout(_LONGEST):
                return await self._exchange(stream, endpoint, request, (tensors, answer))
        except TimeoutError:
            raise PeerUnavailable(f"{endpoint} took more than {_LONGEST:g} s") from None
        finally:
            stream.cancel()

    def _request(
        self, leg: Leg, endpoint: Endpoint, tensors: Mapping[str, Tensor], adapter: bytes | None
    ) -> Train:
        session_id = secrets.token_bytes(16)
        return Train(
            **self.terms.opening(self.access, endpoint, session_id, leg.blocks),
            codec=self.terms.codec,
            backward="gradient" in tensors,
            adapter=adapter,
            tensors={name: spec_of(tensor) for name, tensor in tensors.items()},
            deadline_ms=int(1e3 * _LONGEST),
        )

    async def _exchange(
        self,
        stream: Stream,
        endpoint: Endpoint,
        request: Train,
        both: tuple[Mapping[str, Tensor], Mapping[str, TensorSpec]],
    ) -> Mapping[str, Tensor]:
        tensors, answer = both
        conversation = Conversation(TRAINED)
        await self._alive(endpoint, stream.send(encode(request)))
        message = await self._hear(stream, endpoint, conversation)
        assert isinstance(message, Opened)  # by the table, if it did not refuse
        try:
            for piece in in_pieces(tensors, request.codec):
                await self._alive(endpoint, stream.send(encode(piece)))
        except PeerUnavailable:
            await self._hear(stream, endpoint, conversation)  # perhaps it has said why
            raise
        gathering = Gathering(answer)
        while isinstance(message := await self._hear(stream, endpoint, conversation), Piece):
            gathering.add(message)
        if not isinstance(message, Trained) or not gathering.complete:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "the answer is not complete")
        return gathering.tensors

    async def _hear(
        self, stream: Stream, endpoint: Endpoint, conversation: Conversation
    ) -> Message:
        """The next message."""
        frame = await self._alive(endpoint, stream.receive())
        if frame is None:
            raise PeerUnavailable(f"{endpoint} ended the stream")
        message = conversation.receive(decode(frame))
        if isinstance(message, Refused):
            raise refusal(message)
        return message

    async def _alive(self, endpoint: Endpoint, work: Coroutine[Any, Any, T]) -> T:
        """What that gives, however long it takes, as long as the server says that it lives.

        Raises PeerUnavailable.
        """
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=_LOOK))[0]:
                await ask(self.transport, self.access, endpoint, self.config.timeouts.sync)
            return await task
        finally:
            task.cancel()
