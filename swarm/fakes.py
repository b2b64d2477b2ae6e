"""A network in one event loop, for tests: it can be cut, frozen and watched frame by frame.

`FakeNetwork` obeys the same laws as `rpc.py`: bounded buffers, handlers that are cancelled when
their peer goes away, and streams that break when a `send` is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from enum import Enum

from swarm.errors import AuthenticationError, PeerUnavailable, SwarmError
from swarm.transport import Endpoint, Service, Stream, StreamHandler, Transport

logger = logging.getLogger(__name__)


class Fate(Enum):
    """What becomes of a frame."""

    DELIVER = "deliver"
    BREAK = "break"  # the frame is lost and its stream breaks


Hook = Callable[[str, str, str, bytes], Awaitable[Fate]]
"""`await before_frame(source, destination, method, frame)`, before a frame is on its way.

It may wait, and may cut, freeze or block whomever it likes first: then the frame is lost.
"""


async def deliver(source: str, destination: str, method: str, frame: bytes) -> Fate:
    """The hook of a quiet network."""
    return Fate.DELIVER


class FakeNetwork:
    """Peers are named: a server by its endpoint's peer id, others by what `transport` was given.

    `frames` counts what was delivered, by (source, destination, method); `defects` holds the
    errors that handlers should not have raised.
    """

    def __init__(self, *, buffer_frames: int = 8) -> None:
        self.before_frame: Hook = deliver
        self.frames: Counter[tuple[str, str, str]] = Counter()
        self.defects: list[Exception] = []
        self.buffer_frames = buffer_frames
        self._servers: dict[tuple[str, int], tuple[Endpoint, Service]] = {}
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        self._handlers: set[asyncio.Task[None]] = set()
        self._dead: set[str] = set()
        self._frozen: set[str] = set()
        self._blocked: set[frozenset[str]] = set()
        self._thawed = asyncio.Event()

    def transport(self, name: str) -> FakeTransport:
        """How the peer of that name dials others."""
        return FakeTransport(self, name)

    def serve(self, endpoint: Endpoint, service: Service) -> None:
        """From now on `service` answers there; a later one takes its place."""
        self._servers[endpoint.host, endpoint.port] = (endpoint, service)

    def cut(self, endpoint: Endpoint) -> None:
        """kill -9: all streams from and to that peer break, and dials are refused."""
        self._dead.add(endpoint.peer_id)
        self._break(lambda line: endpoint.peer_id in line.ends)

    def restore(self, endpoint: Endpoint) -> None:
        """The peer can be dialled again."""
        self._dead.discard(endpoint.peer_id)

    def freeze(self, endpoint: Endpoint) -> None:
        """SIGSTOP: nothing breaks, but no frame enters or leaves that peer, and dials hang."""
        self._frozen.add(endpoint.peer_id)

    def thaw(self, endpoint: Endpoint) -> None:
        """SIGCONT: everything that waited goes on."""
        self._frozen.discard(endpoint.peer_id)
        _beat(self._thawed)
        for line in list(self._lines):
            _beat(line.pulse)

    def block(self, one: str, other: str) -> None:
        """The link between two peers is down: streams break and dials are refused."""
        self._blocked.add(frozenset((one, other)))
        self._break(lambda line: line.ends == frozenset((one, other)))

    def unblock(self, one: str, other: str) -> None:
        self._blocked.discard(frozenset((one, other)))

    async def close(self) -> None:
        """Breaks every stream and waits until all handlers are over."""
        self._break(lambda line: True)
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def dial(self, source: str, endpoint: Endpoint, method: str) -> _FakeStream:
        """Raises PeerUnavailable, AuthenticationError; waits while either peer is frozen."""
        while self.is_frozen(source) or self.is_frozen(endpoint.peer_id):
            await self._thawed.wait()
        server, service = self._servers.get((endpoint.host, endpoint.port), (None, None))
        ends = frozenset((source, endpoint.peer_id))
        if service is None or ends & self._dead or ends in self._blocked:
            raise PeerUnavailable(f"{endpoint}: connection refused")
        if server != endpoint:
            raise AuthenticationError(f"{endpoint} shows another certificate than it announced")
        line = _Line(ends)
        here, there = _Direction(), _Direction()
        far = _FakeStream(self, line, (endpoint.peer_id, source, method), there, here)
        line.handler = asyncio.create_task(self._handle(_handler(service, method), far, line))
        self._lines.add(line)
        self._handlers.add(line.handler)
        line.handler.add_done_callback(self._handlers.discard)
        return _FakeStream(self, line, (source, endpoint.peer_id, method), here, there)

    def is_frozen(self, name: str) -> bool:
        return name in self._frozen

    def hang_up(self, name: str) -> None:
        """Breaks the streams of one peer."""
        self._break(lambda line: name in line.ends)

    def _break(self, chosen: Callable[[_Line], bool]) -> None:
        for line in list(self._lines):
            if chosen(line):
                line.snap("the connection was lost")

    async def _handle(self, handler: StreamHandler, stream: _FakeStream, line: _Line) -> None:
        try:
            await handler(stream)
        except SwarmError as error:  # the handler has told the peer what the peer may know
            logger.debug("a stream ended: %s", error)
        except Exception as error:  # the real server survives its handlers' defects, too
            logger.exception("a defect ended a stream")
            self.defects.append(error)
            line.snap("internal error")
        finally:
            line.over = True
            stream.end()


class FakeTransport(Transport):
    """One peer's way into a `FakeNetwork`."""

    def __init__(self, network: FakeNetwork, name: str) -> None:
        self._network = network
        self._name = name

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        try:
            async with asyncio.timeout(timeout):
                return await self._network.dial(self._name, endpoint, method)
        except TimeoutError:
            raise PeerUnavailable(f"{endpoint}: no answer within {timeout:g} s") from None

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                stream = await self._network.dial(self._name, endpoint, method)
                await stream.send(request)
                answer = await stream.receive()
        except TimeoutError:
            raise PeerUnavailable(f"{endpoint}: no answer within {timeout:g} s") from None
        if answer is None:
            raise PeerUnavailable(f"{endpoint}: the stream is closed")
        return answer

    async def close(self) -> None:
        self._network.hang_up(self._name)


class _Direction:
    """Frames on their way from one end to the other."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.ended = False


class _Line:
    """What the two ends of a stream share."""

    def __init__(self, ends: frozenset[str]) -> None:
        self.ends = ends
        self.pulse = asyncio.Event()  # something has changed
        self.broken: str | None = None
        self.over = False  # the handler has returned
        self.handler: asyncio.Task[None] | None = None

    def snap(self, reason: str) -> None:
        if self.broken is None:
            self.broken = reason
            _beat(self.pulse)
            if self.handler is not None and asyncio.current_task() is not self.handler:
                self.handler.cancel()


class _FakeStream:
    """One end of a line; `names` are its own peer, the other one, and the method."""

    def __init__(
        self,
        network: FakeNetwork,
        line: _Line,
        names: tuple[str, str, str],
        outgoing: _Direction,
        incoming: _Direction,
    ) -> None:
        self._network = network
        self._line = line
        self._me, self._peer, self._method = names
        self._outgoing = outgoing
        self._incoming = incoming
        self._turn = asyncio.Lock()

    async def send(self, frame: bytes) -> None:
        async with self._turn:
            try:
                await self._send(frame)
            except asyncio.CancelledError:
                self._line.snap("a send was cancelled")
                raise

    def send_nowait(self, frame: bytes) -> bool:
        watched = self._network.before_frame is not deliver
        if watched or self._turn.locked() or not self._has_room():
            return False
        self._put(frame)
        return True

    async def _send(self, frame: bytes) -> None:
        await asyncio.sleep(0)  # a real network lets others run
        await self._wait_to_send()
        fate = await self._network.before_frame(self._me, self._peer, self._method, frame)
        if fate is Fate.BREAK:
            self._line.snap("the connection was lost")
        await self._wait_to_send()
        self._put(frame)

    def _put(self, frame: bytes) -> None:
        self._outgoing.frames.append(frame)
        self._network.frames[self._me, self._peer, self._method] += 1
        _beat(self._line.pulse)

    async def receive(self) -> bytes | None:
        while True:
            if self._line.broken is not None:
                raise self._gone()
            if not self._network.is_frozen(self._me):
                if self._incoming.frames:
                    frame = self._incoming.frames.popleft()
                    _beat(self._line.pulse)
                    return frame
                if self._incoming.ended:
                    return None
            await self._line.pulse.wait()

    async def finish(self) -> None:
        self.end()

    def end(self) -> None:
        self._outgoing.ended = True
        _beat(self._line.pulse)

    def cancel(self) -> None:
        self._line.snap("the stream is closed")

    async def _wait_to_send(self) -> None:
        while not self._has_room():
            if self._is_over():
                raise self._gone()
            await self._line.pulse.wait()

    def _is_over(self) -> bool:
        return self._outgoing.ended or self._line.over or self._line.broken is not None

    def _has_room(self) -> bool:
        full = len(self._outgoing.frames) >= self._network.buffer_frames
        return not (full or self._is_over() or self._network.is_frozen(self._me))

    def _gone(self) -> PeerUnavailable:
        return PeerUnavailable(f"{self._peer}: {self._line.broken or 'the stream is closed'}")


def _beat(pulse: asyncio.Event) -> None:
    """Wake everybody who waits for something to change."""
    pulse.set()
    pulse.clear()


def _handler(service: Service, method: str) -> StreamHandler:
    async def answer(stream: Stream) -> None:
        request = await stream.receive()
        if request is not None:
            await stream.send(await service.info(request))

    return {"session": service.session, "push": service.push, "info": answer}[method]
