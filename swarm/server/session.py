"""One session on a server: steps come in, from the client or pushed; outputs go onwards and back.

Tasks with one parent: read the client's stream, compute in order, push, and answer. Every
queue is bounded, so a peer that does not read slows its own session down and nobody else's.
Errors go through the queue of answers, too: a client must be able to read what came before them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial

from swarm.config import ServerLimits
from swarm.errors import ErrorCode, PeerUnavailable, RemoteProtocolError
from swarm.messages import (
    Close,
    HandOver,
    Heritage,
    Inherit,
    Leaving,
    Load,
    Message,
    Opened,
    Output,
    PushFailed,
    PushTarget,
    Redirect,
    Step,
    Sync,
    Synced,
    TensorFrame,
)
from swarm.models.spans import SpanCache
from swarm.models.storage import KvStore
from swarm.protocol import Conversation, Ledger, Verdict
from swarm.server.backend import Work
from swarm.server.executor import Executor
from swarm.server.heritage import Estate, Giver
from swarm.server.holdings import Holdings
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
    handed_over: int = 0
    inherited: int = 0


@dataclass(frozen=True, slots=True)
class Guest:
    """Whose session it is, and what they asked for."""

    client: str
    priority: int
    codec: Codec
    is_last: bool  # nobody is pushed to: what is not for the client is for nobody
    moves: bool = False  # it can have the session handed over


@dataclass(frozen=True, slots=True)
class House:
    """What all sessions of a server share."""

    executor: Executor
    store: KvStore
    limits: ServerLimits
    holdings: Holdings
    load: Callable[[], Load]
    counters: Counters = field(default_factory=Counters)


class Session:
    """Owned by its stream: when that ends, for whatever reason, the session is gone."""

    def __init__(
        self, guest: Guest, ledger: Ledger, cache: SpanCache, pusher: Pusher, house: House
    ) -> None:
        self._guest = guest
        self._ledger = ledger
        self._cache = cache
        self._pusher = pusher
        self._house = house
        self._limits = limits = house.limits
        self._counters = house.counters
        self._inbox: asyncio.Queue[Step | HandOver] = asyncio.Queue(2 * limits.window)
        self._outbox: asyncio.Queue[tuple[Message | RemoteProtocolError, int]] = asyncio.Queue(
            limits.window + 8
        )
        self._stream: Stream | None = None  # while nothing waits to be answered by it
        self._held = 0  # bytes, of `house.holdings`
        self._kept: tuple[Step, float] | None = None  # as it was pushed, and its compute_ms
        self._pusher_here: Stream | None = None  # by which the hop before pushes
        give = partial(pusher.give, house.store, house.executor)
        self._giver = Giver(cache, house.store, give)
        self._aside: asyncio.Task[None] | None = None  # what goes on while steps are computed
        self._estate: Estate | None = None  # that another server is giving us
        self._stepped = False  # since a step came, it must not
        self._clock = asyncio.get_running_loop().time
        self._last_sign = self._clock()  # of life

    async def serve(self, stream: Stream, conversation: Conversation, opened: Opened) -> None:
        """Until the client closes. Raises RemoteProtocolError, PeerUnavailable."""
        self._outbox.put_nowait((opened, 0))
        try:
            async with asyncio.TaskGroup() as tasks:
                answering = tasks.create_task(self._answer(stream))
                working = [
                    answering,
                    tasks.create_task(self._compute(tasks)),
                    tasks.create_task(self._pusher.run(self._push_failed)),
                    tasks.create_task(self._watch()),
                ]
                try:
                    await self._read(stream, conversation, tasks)
                except RemoteProtocolError as error:
                    await self._send(error)
                    await answering
                for task in [*working, *([self._aside] if self._aside else [])]:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self._hold(-self._held)
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
        await self._accept(step)

    async def leave(self) -> None:
        """Tell a client who can have the session handed over that this server ends soon."""
        if self._guest.moves and not self._outbox.full():  # who does not read must not delay it
            await self._send(Leaving())

    async def inherit(self, message: Inherit | Heritage) -> Inherit | None:
        """Another server gives what it holds; the answer, once all is here.

        Raises RemoteProtocolError.
        """
        self._last_sign = self._clock()
        if isinstance(message, Inherit):
            if self._stepped or message.start > self._ledger.position:
                raise RemoteProtocolError(
                    ErrorCode.OUT_OF_ORDER,
                    f"a session of {self._ledger.position} positions that has seen "
                    f"{'a step' if self._stepped else 'no step'} cannot inherit from "
                    f"{message.start} on",
                )
            if self._estate is not None:
                self._estate.revoke()
            house = self._house
            self._estate = Estate(message, self._cache, house.store, house.executor)
            return None
        if self._estate is None:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "heritage without inherit")
        estate = self._estate
        if not await estate.add(message):
            return None
        self._counters.inherited += not self._ledger.position
        self._ledger.inherited(estate.length)
        return Inherit(length=estate.length)

    async def _accept(self, step: Step) -> None:
        """Puts it behind the others. Raises RemoteProtocolError BUSY, OUT_OF_ORDER."""
        if self._estate is not None and not self._estate.is_complete:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, "a step before all was inherited")
        self._stepped = True
        size = _bytes(step)
        self._house.holdings.take(self._guest.client, size)
        self._held += size
        if not self._inbox.full():
            return self._inbox.put_nowait(step)
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                return await self._inbox.put(step)
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.BUSY, "this session does not keep up with what is sent"
            ) from None

    def _hold(self, count: int) -> None:
        """Account for bytes that come to be (or, below 0, go) with steps that were admitted."""
        self._held += count
        self._house.holdings.give(self._guest.client, -count)

    async def _read(
        self, stream: Stream, conversation: Conversation, tasks: asyncio.TaskGroup
    ) -> None:
        while (frame := await stream.receive()) is not None:
            self._last_sign = self._clock()
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
                    await self._accept(step)
                case Redirect(next=target):
                    self._pusher.redirect(target)
                case HandOver(next=target, stage="dial"):
                    self._start(tasks, self._pusher.prepare(target))
                case HandOver() as wish:
                    await self._inbox.put(wish)
                case _:  # the table lets nothing else through
                    raise AssertionError

    async def _watch(self) -> None:
        """Gives the session up when nothing has come for too long."""
        patience = self._limits.idle_timeout
        while (left := self._last_sign + patience - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        why = f"nothing came for {patience:g} s"
        await self._send(RemoteProtocolError(ErrorCode.DEADLINE, why))

    def _start(self, tasks: asyncio.TaskGroup, aside: Coroutine[None, None, None]) -> None:
        """One at a time, or a client could start any number."""
        if self._aside is None or self._aside.done():
            self._aside = tasks.create_task(aside)
        else:
            aside.close()

    async def _copy(self, target: PushTarget, length: int) -> None:
        await self._send(await self._giver.ahead(target, length))

    async def _compute(self, tasks: asyncio.TaskGroup) -> None:
        try:
            while True:
                match await self._inbox.get():
                    case Step() as step:
                        await self._step(step)
                    case HandOver(next=target, stage="ahead"):
                        self._start(tasks, self._copy(target, self._ledger.position))
                    case HandOver(next=target):
                        answer = await self._giver.rest(target, self._ledger.position)
                        self._counters.handed_over += answer.position is not None
                        await self._send(answer)
        except RemoteProtocolError as error:
            await self._send(error)

    async def _step(self, step: Step) -> None:
        size, begin = _bytes(step), time.perf_counter()  # it holds that until answered
        verdict = self._ledger.admit(step)
        if verdict is Verdict.STALE:
            self._hold(-size)
            return
        if verdict is Verdict.COMPUTE:
            computed, (hidden, compute_ms) = step, await self._apply(step)
        else:
            assert self._kept is not None
            computed, compute_ms = self._kept
            computed, hidden = computed.model_copy(update={"epoch": step.epoch}), computed.hidden
        done = time.perf_counter()
        # What a newer epoch has overtaken is the client's business, and its next hop another one's.
        current = step.push and step.epoch == self._ledger.epoch
        pushed = current and await self._pusher.push(computed, hidden)
        if pushed:
            self._counters.pushes += 1
            await asyncio.sleep(0)  # what goes to the next hop leaves before the copy is made
        output = Output(
            epoch=step.epoch,
            step=step.step,
            start=step.start,
            hidden=to_frame(from_frame(hidden)[:, :0]) if step.quiet else hidden,
            pushed=pushed,
            compute_ms=compute_ms,
            load=self._house.load(),
        )
        await self._send(output, size)
        if verdict is Verdict.COMPUTE:
            self._kept = step.model_copy(update={"hidden": hidden}), compute_ms
            self._house.executor.meters.stepped(step, begin, done, compute_ms)

    async def _apply(self, step: Step) -> tuple[TensorFrame, float]:
        """What it becomes, and its compute_ms."""
        work = Work(
            key=self._house.executor.next_key(),
            client=self._guest.client,
            cache=self._cache,
            hidden=from_frame(step.hidden),
            inputs=inputs_from_frames(step.inputs),
            crop_to=step.crop_to,
            reorder=step.reorder,
            priority=self._guest.priority,
            deadline=step.deadline_ms / 1000,
            keep=step.keep if self._guest.is_last or not step.push else None,
        )
        if step.reorder is not None or step.crop_to is not None:
            self._giver.changed(0 if step.reorder is not None else step.start)
        self._ledger.applied(step)  # or the session ends
        work = await self._house.executor.submit(work)
        hidden = to_frame(work.result(), self._guest.codec)
        replaced = len(self._kept[0].hidden.data) if self._kept is not None else 0
        self._hold(len(hidden.data) - replaced)
        return hidden, work.compute_ms

    async def _send(self, message: Message | RemoteProtocolError, size: int = 0) -> None:
        """Answer; `size` bytes are held until the answer has left."""
        stream = self._stream
        refused = isinstance(message, RemoteProtocolError)
        if stream is not None and not refused and stream.send_nowait(encode(message)):
            return self._hold(-size)
        self._stream = None  # from now on in turn
        if not self._outbox.full():
            return self._outbox.put_nowait((message, size))
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                return await self._outbox.put((message, size))
        except TimeoutError:
            raise RemoteProtocolError(
                ErrorCode.DEADLINE, "the client does not read its answers"
            ) from None

    async def _push_failed(self, epoch: int, step: int, why: str) -> None:
        self._counters.push_failures += 1
        await self._send(PushFailed(epoch=epoch, step=step, message=why[:200]))

    async def _answer(self, stream: Stream) -> None:
        """What could not be sent at once."""
        while True:
            if self._outbox.empty():
                self._stream = stream
            message, size = await self._outbox.get()
            if isinstance(message, RemoteProtocolError):
                raise message
            try:
                async with asyncio.timeout(self._limits.send_timeout):
                    await stream.send(encode(message))
            except TimeoutError:
                raise PeerUnavailable("the client does not read its answers") from None
            self._hold(-size)


def _bytes(step: Step) -> int:
    """Of all its tensors, whatever they are: nobody has looked at them yet."""
    return len(step.hidden.data) + sum(len(frame.data) for frame in step.inputs.values())
