"""Outputs straight to the next server of the route, with the right the client gave for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from swarm.errors import PeerUnavailable, SwarmError
from swarm.messages import Attach, PushTarget, Refused, Step
from swarm.transport import Endpoint, Stream, Transport
from swarm.wire import decode, encode

Resolve = Callable[[PushTarget], Endpoint]
"""Where a push target listens, by its checked record. Raises InvalidRecord."""

Report = Callable[[int, int, str], Awaitable[None]]
"""Tell the client: epoch, step, why."""


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
        self._stream: Stream | None = None
        self._last = (0, 0)  # epoch and step of the last push

    def redirect(self, target: PushTarget | None) -> None:
        self._target = target

    async def push(self, step: Step) -> bool:
        """Hand a step over for sending; False if there is nobody to push to."""
        target = self._target
        if target is None:
            return False
        try:
            async with asyncio.timeout(self._timeout):
                await self._queue.put((target, step))
        except TimeoutError:
            raise PeerUnavailable("the next hop does not read what is pushed") from None
        return True

    async def run(self, report: Report) -> None:
        """Sends what is handed over. A failure is reported once; after it nothing is pushed
        until the client redirects."""
        current: PushTarget | None = None
        listener: asyncio.Task[None] | None = None
        try:
            while True:
                target, step = await self._queue.get()
                if target is not self._target:
                    continue  # redirected, or failed, meanwhile: the client sees to this step
                self._last = (step.epoch, step.step)
                try:
                    async with asyncio.timeout(self._timeout):
                        if target is not current or self._stream is None:
                            await self._detach(listener)
                            self._stream = await self._attach(target)
                            current = target
                            listener = asyncio.create_task(
                                self._listen(self._stream, target, report)
                            )
                        await self._stream.send(encode(step))
                except TimeoutError:
                    await self._fail(target, "the next hop takes no frames", report)
                except SwarmError as error:
                    await self._fail(target, str(error), report)
        finally:
            await self._detach(listener)

    async def _attach(self, target: PushTarget) -> Stream:
        stream = await self._transport.open_stream(self._resolve(target), "push", self._timeout)
        await stream.send(encode(Attach(session_id=target.session_id, ticket=target.ticket)))
        return stream

    async def _detach(self, listener: asyncio.Task[None] | None) -> None:
        if listener is not None:
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    async def _listen(self, stream: Stream, target: PushTarget, report: Report) -> None:
        """The next hop speaks on a push stream only to refuse it."""
        try:
            frame = await stream.receive()
            message = decode(frame) if frame is not None else None
            why = str(message.message) if isinstance(message, Refused) else "the stream ended"
        except SwarmError as error:
            why = str(error)
        await self._fail(target, why, report)

    async def _fail(self, target: PushTarget, why: str, report: Report) -> None:
        if self._target is target:
            self._target = None
            await report(*self._last, why)
