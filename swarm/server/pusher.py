"""Outputs straight to the next server of the route, with the right the client gave for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from swarm.errors import PeerUnavailable, RemoteProtocolError, SwarmError
from swarm.loop import heed_cancelling
from swarm.messages import Attach, PushTarget, Refused, Step, TensorFrame
from swarm.models.spans import SpanCache
from swarm.models.storage import KvStore
from swarm.server.executor import Executor
from swarm.server.heritage import give
from swarm.transport import Endpoint, Stream, Transport
from swarm.wire import decode, encode

logger = logging.getLogger(__name__)

Resolve = Callable[[PushTarget], Endpoint]
"""Where a push target listens, by its checked record. Raises InvalidRecord."""

Report = Callable[[int, int, str], Awaitable[None]]
"""Tell the client: epoch, step, why."""


_SMALL = 1 << 16  # bytes
_DIAL_SECONDS = 10.0  # at most, so that clients learn of it before they lose their patience


class Pusher:
    """Pushes of one session. The stream to the next hop is opened by the first push."""

    def __init__(
        self,
        transport: Transport,
        resolve: Resolve,
        target: PushTarget | None,
        *,
        window: int,
        timeout: float,
    ) -> None:
        self._transport = transport
        self._resolve = resolve
        self._target = target
        self._timeout = timeout
        self._queue: asyncio.Queue[tuple[PushTarget, Step]] = asyncio.Queue(window + 8)
        self._ready: tuple[PushTarget, Stream] | None = None  # nothing waits for this stream
        self._last = (0, 0)  # epoch and step of the last push

    def redirect(self, target: PushTarget | None) -> None:
        self._target = target

    async def push(self, step: Step, became: TensorFrame | None = None) -> bool:
        """Hand a step over for sending, with what it `became` in place of its hidden states; False
        if there is nobody to push to."""
        target, hidden = self._target, became or step.hidden
        if target is None:
            return False
        if not self._send_nowait(target, step, hidden):
            step = step.model_copy(update={"hidden": hidden})
            await self._queue.put((target, step))  # room comes: every send has its deadline
        return True

    def _send_nowait(self, target: PushTarget, step: Step, hidden: TensorFrame) -> bool:
        """A small step (a large one had better wait in turn) if nothing is in its way."""
        at, stream = self._ready or (None, None)
        small = len(hidden.data) <= _SMALL
        if stream is None or at is not target or not small or not self._queue.empty():
            return False
        self._last = (step.epoch, step.step)
        return stream.send_nowait(encode(step, hidden=hidden))

    async def prepare(self, target: PushTarget) -> None:
        """Dial, since links stay; whoever cannot will find out when it matters."""
        try:
            timeout = min(self._timeout, _DIAL_SECONDS)
            stream = await self._transport.open_stream(self._resolve(target), "push", timeout)
            stream.cancel()
        except SwarmError as error:
            heed_cancelling(error)
            logger.info("cannot be reached: %s", str(error))

    async def give(
        self,
        store: KvStore,
        executor: Executor,
        target: PushTarget,
        cache: SpanCache,
        positions: range,
    ) -> None:
        """What a session holds there, to one elsewhere. Raises SwarmError."""
        timeout = self._timeout
        dial_timeout = min(timeout, _DIAL_SECONDS)
        stream = await self._transport.open_stream(self._resolve(target), "push", dial_timeout)
        try:
            await self._send(stream, Attach(session_id=target.session_id, ticket=target.ticket))
            await give(stream, cache, positions, store, executor, timeout)
        finally:
            stream.cancel()

    async def run(self, report: Report) -> None:
        """Sends what is handed over. A failure is reported once; after it nothing is pushed
        until the client redirects."""
        target, step = await self._queue.get()
        while True:
            if target is self._target:  # else redirected meanwhile: the client sees to this step
                try:
                    target, step = await self._push_to(target, step)
                    continue
                except SwarmError as error:
                    heed_cancelling(error)
                    if target is self._target:
                        self._target = None
                        await report(*self._last, str(error))
            target, step = await self._queue.get()

    async def _push_to(self, target: PushTarget, step: Step) -> tuple[PushTarget, Step]:
        """All that goes to one target, until it fails; returns what goes to another one first."""
        dial_timeout = min(self._timeout, _DIAL_SECONDS)
        self._last = (step.epoch, step.step)
        stream = await self._transport.open_stream(self._resolve(target), "push", dial_timeout)
        try:
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(self._listen(stream))
                attach = Attach(session_id=target.session_id, ticket=target.ticket)
                await self._send(stream, attach)
                following = target
                while following is target:
                    self._last = (step.epoch, step.step)
                    await self._send(stream, step)
                    self._ready = target, stream
                    following, step = await self._queue.get()
                    self._ready = None
                listening.cancel()
                return following, step
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self._ready = None
            stream.cancel()

    async def _send(self, stream: Stream, message: Attach | Step) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await stream.send(encode(message))
        except TimeoutError:
            raise PeerUnavailable("the next hop takes no frames") from None

    async def _listen(self, stream: Stream) -> None:
        """The next hop speaks on a push stream only to refuse it. Raises SwarmError."""
        frame = await stream.receive()
        message = decode(frame) if frame is not None else None
        if isinstance(message, Refused):
            raise PeerUnavailable(f"refused: {message.message} [{message.code}]")
        raise PeerUnavailable("the next hop ended the stream")


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A refusal says more than a broken stream, and there is rarely more than one."""
    errors = group.exceptions
    return next((e for e in errors if isinstance(e, RemoteProtocolError)), errors[0])
