"""One session on a server: steps come in, from the client or pushed; outputs go onwards and back.

Four tasks with one parent: read the client's stream, compute in order, push, and answer. Every
queue is bounded, so a peer that does not read slows its own session down and nobody else's.
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
from swarm.server.pusher import Pusher
from swarm.tensors import from_frame, inputs_from_frames, to_frame
from swarm.transport import Stream
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
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._cache = cache
        self._executor = executor
        self._pusher = pusher
        self._limits = limits
        self._counters = counters
        self._inbox: asyncio.Queue[Step | Sync | Redirect] = asyncio.Queue(2 * limits.window + 8)
        self._outbox: asyncio.Queue[Message] = asyncio.Queue(limits.window + 8)
        self._kept: tuple[Step, Output] | None = None
        self.load: Callable[[], Load] = Load

    async def serve(self, stream: Stream, conversation: Conversation) -> None:
        """Until the client closes. Raises RemoteProtocolError, PeerUnavailable."""
        try:
            async with asyncio.TaskGroup() as tasks:
                working = [
                    tasks.create_task(self._compute()),
                    tasks.create_task(self._answer(stream)),
                    tasks.create_task(self._pusher.run(self._push_failed)),
                ]
                await self._read(stream, conversation)
                for task in working:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def accept_push(self, step: Step) -> None:
        """A step from the hop before, whose right was checked. Raises TimeoutError when full."""
        self._counters.steps_from_servers += 1
        async with asyncio.timeout(self._limits.send_timeout):
            await self._inbox.put(step)

    async def _read(self, stream: Stream, conversation: Conversation) -> None:
        while True:
            async with asyncio.timeout(self._limits.idle_timeout):
                frame = await stream.receive()
            if frame is None:
                return
            match conversation.receive(decode(frame)):
                case Close():
                    return
                case Sync() as sync:
                    # At once, so that steps already queued become stale.
                    self._ledger.sync(sync.epoch)
                    await self._inbox.put(sync)
                case Step() as step:
                    self._counters.steps_from_clients += 1
                    await self._inbox.put(step)
                case Redirect() as redirect:
                    await self._inbox.put(redirect)
                case _:  # the table lets nothing else through
                    raise AssertionError

    async def _compute(self) -> None:
        while True:
            match await self._inbox.get():
                case Sync():
                    ledger = self._ledger
                    await self._send(
                        Synced(
                            epoch=ledger.epoch, position=ledger.position, last_step=ledger.last_step
                        )
                    )
                case Redirect(next=target):
                    self._pusher.redirect(target)
                case Step() as step:
                    await self._step(step)

    async def _step(self, step: Step) -> None:
        verdict = self._ledger.admit(step)
        if verdict is Verdict.STALE:
            return
        if verdict is Verdict.COMPUTE:
            await self._apply(step)
        assert self._kept is not None
        computed, output = self._kept
        pushed = step.push and await self._pusher.push(
            computed.model_copy(update={"hidden": output.hidden, "epoch": step.epoch})
        )
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
        try:
            async with asyncio.timeout(step.deadline_ms / 1000):
                work = await self._executor.submit(work)
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, f"the step was not ready within {step.deadline_ms} ms"
            ) from None
        self._ledger.applied(step)
        result = work.result()
        output = Output(
            epoch=step.epoch,
            step=step.step,
            start=step.start,
            hidden=to_frame(result),
            compute_ms=work.compute_ms,
            load=self.load(),
        )
        self._kept = (step, output)

    async def _send(self, message: Message) -> None:
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
            try:
                async with asyncio.timeout(self._limits.send_timeout):
                    await stream.send(encode(message))
            except TimeoutError:
                raise PeerUnavailable("the client does not read its answers") from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A refusal says more than a broken stream, and there is rarely more than one."""
    errors = group.exceptions
    return next((e for e in errors if isinstance(e, RemoteProtocolError)), errors[0])
