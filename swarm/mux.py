"""Many streams over one connection: frames that are ready together leave in one message.

A message costs gRPC and the event loops at its two ends some 150 us of CPU, a frame in it a few:
with sixteen sessions between two processes that is most of a hop. Large frames go by a second
connection, so that no decode step waits behind a megabyte; numbers put them back in order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol, cast

from swarm.errors import (
    ErrorCode,
    LocalProtocolError,
    PeerUnavailable,
    RemoteProtocolError,
    SwarmError,
    afresh,
)
from swarm.wire import MAX_FRAME_BYTES, pack, unpack

MAX_MESSAGE_BYTES = MAX_FRAME_BYTES + (1 << 16)
"""Of one message between two processes: a frame of MAX_FRAME_BYTES and what is around it."""

BULK_BYTES = 1 << 15  # larger frames go by the second connection
_MESSAGE_BYTES = 1 << 18  # a message that has grown to this takes no more frames
_MESSAGE_FRAMES = 512
_QUEUED_BYTES = 4 << 20  # whoever sends waits while more than this has not left
_UNREAD_BYTES = 4 * MAX_FRAME_BYTES  # of one stream; who lets more come loses it
_EARLY_FRAMES = 256  # of one stream, that overtook others on the other connection
_STREAMS = 1 << 14  # of one link


class Kind(IntEnum):
    """What a frame within a message is."""

    DATA = 0  # payload: the frame itself
    OPEN = 1  # payload: the method; only from the end that dialled
    END = 2  # nothing more will come from here; from the end that was dialled: the stream is over
    RESET = 3  # the stream broke, instead of all that had not left; payload: why


class Pipe(Protocol):
    """A connection below: whole messages, in order. Errors are SwarmErrors."""

    async def send(self, message: bytes) -> None: ...
    async def receive(self) -> bytes | None: ...


class Gauge:
    """Bytes over all links of a process: that came and were not taken yet, and all there were.

    A link may hold a quarter of what is left, so that floods by some always leave room for others:
    dynamic thresholds, Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998.
    """

    def __init__(self, most: int) -> None:
        self._left = most
        self.received = self.sent = 0  # bytes of messages

    def add(self, count: int) -> None:
        self._left -= count

    def allows(self, held: int) -> bool:
        return held <= self._left // 4


class Channel:
    """One of the streams of a link: a `transport.Stream`."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._number = number
        self.handler: asyncio.Task[None] | None = None  # cancelled when the stream breaks
        self._frames: deque[bytes] = deque()
        self._unread = 0
        self._early: dict[int, tuple[int, bytes]] = {}
        self._expected = 0
        self._sent = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: SwarmError | None = None
        self._they_ended = False
        self._we_ended = False

    async def send(self, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"{len(frame)} bytes do not fit into a frame")
        error = self._error or self._link.error
        if self._we_ended or error is not None:
            raise afresh(error) if error else self._closed()
        self.post(Kind.DATA, frame)
        if self._link.is_full:
            await self._link.room()

    def send_nowait(self, frame: bytes) -> bool:
        lost = self._we_ended or self._error is not None or self._link.error is not None
        if lost or self._link.is_full or len(frame) > MAX_FRAME_BYTES:
            return False
        self.post(Kind.DATA, frame)
        return True

    async def receive(self) -> bytes | None:
        while not self._frames:
            if self._error is not None:
                raise afresh(self._error)
            if self._they_ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        frame = self._frames.popleft()
        self._unread -= len(frame)
        self._link.take(len(frame))
        return frame

    async def finish(self) -> None:
        if self._error is not None:
            raise afresh(self._error)
        if not self._we_ended:
            self._we_ended = True
            self.post(Kind.END, b"")
        if self._they_ended:
            self._link.forget(self._number)

    def cancel(self, why: str = "the stream is closed") -> None:
        if self._error is None:
            self._link.reset(self._number, why.encode())
            self.fail(PeerUnavailable(f"{self._link.where}: {why}"))
        self._drop()

    def close(self) -> None:
        """Whoever answered is through: what was sent still arrives, what comes is dropped."""
        if self._error is None and not self._we_ended:
            self._we_ended = True
            self.post(Kind.END, b"")
        self._link.forget(self._number)
        self._drop()

    def post(self, kind: Kind, payload: bytes) -> None:
        """Queue it behind what was sent before."""
        self._link.post(self._number, self._sent, kind, payload)
        self._sent += 1

    def arrive(self, sequence: int, kind: int, payload: bytes) -> None:
        """By either connection; in order from here on. Raises RemoteProtocolError."""
        if not self._expected <= sequence <= self._expected + _EARLY_FRAMES:
            raise RemoteProtocolError(ErrorCode.OUT_OF_ORDER, f"frame {sequence} is out of turn")
        self._early[sequence] = kind, payload
        self._unread += len(payload)
        if self._unread > _UNREAD_BYTES:
            self.cancel("too much came that nobody reads")
        while (due := self._early.pop(self._expected, None)) is not None:
            self._expected += 1
            if due[0] == Kind.DATA:
                self._frames.append(due[1])
            elif due[0] == Kind.END:
                self._they_ended = True
                # Who was dialled ends when all is said: we have nobody to talk to either.
                self._we_ended = self._we_ended or self._link.dialled
                if self._we_ended:
                    self._link.forget(self._number)
        self._wake()

    def fail(self, error: SwarmError) -> None:
        """Nothing more will come; what has come can still be read."""
        if self._error is None:
            self._error = error
            if self.handler is not None and self.handler is not asyncio.current_task():
                self.handler.cancel()
        self._wake()

    def _drop(self) -> None:
        self._link.take(self._unread)
        self._unread = 0
        self._frames.clear()
        self._early.clear()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _closed(self) -> PeerUnavailable:
        return PeerUnavailable(f"{self._link.where}: the stream is closed")


class _Lane:
    """What waits for one connection."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, int, Kind, bytes]] = deque()
        self.filled = asyncio.Event()

    def put(self, number: int, sequence: int, kind: Kind, payload: bytes) -> None:
        self.queue.append((number, sequence, kind, payload))
        self.filled.set()

    async def next_message(self) -> tuple[bytes, int]:
        """All that is ready, as far as it fits into a message; and the frames' bytes."""
        while not self.queue:
            self.filled.clear()
            await self.filled.wait()
        parts: list[Any] = []
        size = 0
        while self.queue and size < _MESSAGE_BYTES and len(parts) < 4 * _MESSAGE_FRAMES:
            if parts and size + len(self.queue[0][3]) > MAX_FRAME_BYTES:
                break
            frame = self.queue.popleft()
            parts += frame
            size += len(frame[3])
        return pack(parts), size


class Link:
    """All streams between two processes, over one or two connections."""

    def __init__(
        self,
        where: str,
        gauge: Gauge,
        accept: Callable[[str, Channel], None] | None = None,
        want_bulk: Callable[[], object] | None = None,
    ) -> None:
        """`accept` takes the streams that the other end opens; the end that dialled has none, and
        may be asked by `want_bulk`, once, for the second connection."""
        self.where = where
        self.dialled = accept is None
        self.error: SwarmError | None = None
        self._accept = accept
        self._want_bulk = want_bulk
        self._gauge = gauge
        self._channels: dict[int, Channel] = {}
        self._last = 0
        self._lanes = [_Lane()]  # and the one for large frames, if there is one
        self._carriers: set[Any] = set()  # tasks
        self.queued = 0
        self.held = 0
        self._room = asyncio.Event()
        self._taken = asyncio.Event()

    @property
    def idle(self) -> bool:
        return not self._channels

    def open(self, method: str) -> Channel:
        """A new stream; the other end learns of it with the first message."""
        if self.error is not None:
            raise afresh(self.error)
        self._last += 1
        channel = self._channels[self._last] = Channel(self, self._last)
        channel.post(Kind.OPEN, method.encode())
        return channel

    async def carry(self, pipe: Pipe, *, bulk: bool = False) -> None:
        """Send and receive by a connection, until it ends; then the whole link is over.

        Raises SwarmError: why.
        """
        if self.error is not None:
            raise afresh(self.error)
        if bulk:
            self._lanes = [self._lanes[0], _Lane()]
        lane = self._lanes[-1]
        # Its own frame must not name it: then it would be freed, once it was cancelled, only by the
        # garbage collector, and the connection that it carries would stay up until then.
        self._carriers.add(asyncio.current_task())
        writing = asyncio.create_task(self._write(lane, pipe))
        error: SwarmError = PeerUnavailable(f"{self.where}: the stream is closed")
        try:
            while (message := await pipe.receive()) is not None:
                self._gauge.received += len(message)
                self._arrived(message)
                while not self._gauge.allows(self.held):
                    self._taken.clear()
                    await self._taken.wait()
        except SwarmError as problem:
            error = afresh(problem)
            raise
        finally:
            self._carriers.discard(asyncio.current_task())
            writing.cancel()
            self.lose(error)
            await asyncio.wait({writing})

    def lose(self, error: SwarmError) -> None:
        """End every stream, and with them the link."""
        if self.error is None:
            self.error = afresh(error)
        for channel in list(self._channels.values()):
            channel.fail(error)
        self._channels.clear()
        self._room.set()
        for carrier in self._carriers:
            carrier.cancel()

    # What channels ask -------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        return self.queued > _QUEUED_BYTES

    async def room(self) -> None:
        """Until less waits to leave. Raises SwarmError when the link is lost."""
        while self.is_full and self.error is None:
            self._room.clear()
            await self._room.wait()
        if self.error is not None:
            raise afresh(self.error)

    def post(self, number: int, sequence: int, kind: Kind, payload: bytes) -> None:
        bulk = len(payload) > BULK_BYTES
        if bulk and self._want_bulk is not None:
            self._want_bulk()
            self._want_bulk = None
        self.queued += len(payload)
        self._lanes[-1 if bulk else 0].put(number, sequence, kind, payload)

    def reset(self, number: int, why: bytes) -> None:
        """Tell the other end that a stream broke, instead of what it would have been told."""
        for lane in self._lanes:
            kept = [frame for frame in lane.queue if frame[0] != number]
            self.queued -= sum(len(f[3]) for f in lane.queue) - sum(len(f[3]) for f in kept)
            lane.queue = deque(kept)
        self._room.set()
        self.post(number, 0, Kind.RESET, why)
        self._channels.pop(number, None)

    def forget(self, number: int) -> None:
        """Both ends are through with a stream."""
        self._channels.pop(number, None)

    def take(self, count: int) -> None:
        """Frames of so many bytes have been read, or will not be."""
        if count:
            self.held -= count
            self._gauge.add(-count)
            self._taken.set()

    # Connections -------------------------------------------------------------------------------

    async def _write(self, lane: _Lane, pipe: Pipe) -> None:
        try:
            while True:
                message, size = await lane.next_message()
                await pipe.send(message)
                self._gauge.sent += len(message)
                self.queued -= size
                if not self.is_full:
                    self._room.set()
        except SwarmError as error:
            # Whoever reads learns it too, perhaps with a last word of the other end before.
            self.error = self.error or afresh(error)
            self._room.set()

    def _arrived(self, message: bytes) -> None:
        parts = unpack(message, MAX_MESSAGE_BYTES)
        if not isinstance(parts, list) or len(cast(list[Any], parts)) % 4:
            raise _bad("a message is not a list of frames")
        values = iter(cast(list[Any], parts))
        for number, sequence, kind, payload in zip(values, values, values, values, strict=True):
            whole = type(number) is int and type(sequence) is int and type(kind) is int
            if not whole or not isinstance(payload, bytes) or not 0 <= kind <= Kind.RESET:
                raise _bad("a frame is not [stream, number, kind, bytes]")
            if len(payload) > MAX_FRAME_BYTES:
                raise RemoteProtocolError(ErrorCode.OVERSIZE, f"a frame of {len(payload)} bytes")
            self._dispatch(number, sequence, kind, payload)

    def _dispatch(self, number: int, sequence: int, kind: int, payload: bytes) -> None:
        channel = self._channels.get(number)
        if kind == Kind.RESET:
            self._last = max(self._last, number if self._accept else 0)
            if channel is not None:
                self.forget(number)
                why = "".join(filter(str.isprintable, payload[:200].decode(errors="replace")))
                channel.fail(PeerUnavailable(f"{self.where}: {why}"))
            return
        if channel is None:
            if number <= self._last:
                return  # we are through with it
            # A large frame may overtake the one that opens its stream.
            if self._accept is None or len(self._channels) >= _STREAMS:
                raise _bad(f"stream {number} was not opened")
            channel = self._channels[number] = Channel(self, number)
        if kind == Kind.OPEN:
            if self._accept is None or number <= self._last:
                raise _bad(f"stream {number} was opened twice")
            self._last = number
            self._accept(payload.decode(errors="replace"), channel)
            payload = b""
        self.held += len(payload)
        self._gauge.add(len(payload))
        channel.arrive(sequence, kind, payload)


def _bad(why: str) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.BAD_FRAME, why)
