"""One session on a server: steps come in, from the client or pushed; outputs go onwards and back.

Four tasks with one parent: read the client's stream, compute in order, push, and answer. Every
queue is bounded, so a peer that does not read slows its own session down and nobody else's.
Errors go through the queue of answers, too: a client must be able to read what came before them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from swarm.config import ServerLimits
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.messages import (
    Close,
    Load,
    Message,
    Opened,
    Output,
    PushFailed,
    Redirect,
    Step,
    Sync,
    Synced,
)
from swarm.models.spans import SpanCache
from swarm.protocol import Conversation, Ledger, Verdict
from swarm.server.backend import Work
from swarm.server.executor import Executor
from swarm.server.pusher import Pusher, first_error
from swarm.tensors import from_frame, inputs_from_frames, to_frame
from swarm.transport import Stream
from swarm.types import Codec
from swarm.wire import decode, encode


@dataclass(slots=True)
class Counters:
    """What a server has done since it started; anybody may ask (`info`)."""

    sessions: int = 0
    steps_from_clients: int = 0
    steps_from_servers: int = 0
    pushes: int = 0
    push_failures: int = 0
    refusals: int = 0


class Session:
    """Owned by its stream: when that ends, for whatever reason, the session is gone."""

    def __init__(
        self,
        client: str,
        ledger: Ledger,
        cache: SpanCache,
        executor: Executor,
        pusher: Pusher,
        limits: ServerLimits,
        counters: Counters,
        codec: Codec = "none",
    ) -> None:
        self._codec: Codec = codec
        self._client = client
        self._ledger = ledger
        self._cache = cache
        self._executor = executor
        self._pusher = pusher
        self._limits = limits
        self._counters = counters
        self._inbox: asyncio.Queue[Step] = asyncio.Queue(2 * limits.window)
        self._outbox: asyncio.Queue[Message | RemoteProtocolError] = asyncio.Queue(
            limits.window + 8
        )
        self._kept: tuple[Step, Output] | None = None
        self._pusher_here: Stream | None = None  # by which the hop before pushes
        self._clock = asyncio.get_running_loop().time
        self._last_sign = self._clock()  # of life
        self.load: Callable[[], Load] = Load

    async def serve(self, stream: Stream, conversation: Conversation, opened: Opened) -> None:
        """Until the client closes. Raises RemoteProtocolError, PeerUnavailable."""
        self._outbox.put_nowait(opened)
        try:
            async with asyncio.TaskGroup() as tasks:
                answering = tasks.create_task(self._answer(stream))
                working = [
                    answering,
                    tasks.create_task(self._compute()),
                    tasks.create_task(self._pusher.run(self._push_failed)),
                ]
                try:
                    await self._read(stream, conversation)
                except RemoteProtocolError as error:
                    await self._send(error)
                    await answering
                for task in working:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            if self._pusher_here is not None:
                self._pusher_here.cancel()

    def attach(self, stream: Stream) -> None:
        """The hop before pushes by this stream from now on; it is broken when the session ends."""
        if self._pusher_here is not None:
            self._pusher_here.cancel()
        self._pusher_here = stream

    async def accept_push(self, step: Step) -> None:
        """A step from the hop before, whose right was checked. Raises RemoteProtocolError BUSY."""
        self._counters.steps_from_servers += 1
        self._last_sign = self._clock()
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                await self._inbox.put(step)
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.BUSY, "this session does not keep up with what is pushed"
            ) from None

    async def _read(self, stream: Stream, conversation: Conversation) -> None:
        while (frame := await self._next(stream)) is not None:
            match conversation.receive(decode(frame)):
                case Close():
                    return
                case Sync(epoch=epoch):
                    # Answered at once, however long a pass may take: steps that wait are stale
                    # now, and the ledger counts the one that is being computed.
                    self._ledger.sync(epoch)
                    position, last_step = self._ledger.position, self._ledger.last_step
                    await self._send(Synced(epoch=epoch, position=position, last_step=last_step))
                case Step() as step:
                    self._counters.steps_from_clients += 1
                    await self._inbox.put(step)
                case Redirect(next=target):
                    self._pusher.redirect(target)
                case _:  # the table lets nothing else through
                    raise AssertionError

    async def _next(self, stream: Stream) -> bytes | None:
        patience = self._limits.idle_timeout
        while True:
            try:
                async with asyncio.timeout_at(self._last_sign + patience):
                    frame = await stream.receive()
            except TimeoutError:
                if self._clock() < self._last_sign + patience:
                    continue  # something was pushed meanwhile
                raise RemoteProtocolError(
                    ErrorCode.DEADLINE, f"nothing came for {patience:g} s"
                ) from None
            self._last_sign = self._clock()
            return frame

    async def _compute(self) -> None:
        try:
            while True:
                await self._step(await self._inbox.get())
        except RemoteProtocolError as error:
            await self._send(error)

    async def _step(self, step: Step) -> None:
        verdict = self._ledger.admit(step)
        if verdict is Verdict.STALE:
            return
        if verdict is Verdict.COMPUTE:
            await self._apply(step)
        assert self._kept is not None
        computed, output = self._kept
        # What a newer epoch has overtaken is the client's business, and its next hop another one's.
        current = step.push and step.epoch == self._ledger.epoch
        pushed = current and await self._pusher.push(
            computed.model_copy(update={"hidden": output.hidden, "epoch": step.epoch})
        )
        self._counters.pushes += pushed
        changes: dict[str, object] = {"pushed": pushed, "epoch": step.epoch}
        if step.quiet:
            empty = to_frame(from_frame(output.hidden)[:, :0])
            changes["hidden"] = empty
        await self._send(output.model_copy(update=changes))

    async def _apply(self, step: Step) -> None:
        work = Work(
            key=self._executor.next_key(),
            client=self._client,
            cache=self._cache,
            hidden=from_frame(step.hidden),
            inputs=inputs_from_frames(step.inputs),
            crop_to=step.crop_to,
            reorder=step.reorder,
        )
        self._ledger.applied(step)  # or the session ends
        try:
            async with asyncio.timeout(step.deadline_ms / 1000):
                work = await self._executor.submit(work)
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, f"the step was not ready within {step.deadline_ms} ms"
            ) from None
        result = work.result()
        output = Output(
            epoch=step.epoch,
            step=step.step,
            start=step.start,
            hidden=to_frame(result, self._codec),
            compute_ms=work.compute_ms,
            load=self.load(),
        )
        self._kept = (step, output)

    async def _send(self, message: Message | RemoteProtocolError) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                await self._outbox.put(message)
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, "the client does not read its answers"
            ) from None

    async def _push_failed(self, epoch: int, step: int, why: str) -> None:
        self._counters.push_failures += 1
        await self._send(PushFailed(epoch=epoch, step=step, message=why[:200]))

    async def _answer(self, stream: Stream) -> None:
        while True:
            message = await self._outbox.get()
            if isinstance(message, RemoteProtocolError):
                raise message
            try:
                async with asyncio.timeout(self._limits.send_timeout):
                    await stream.send(encode(message))
            except TimeoutError:
                raise PeerUnavailable("the client does not read its answers") from None
