"""Streams over shared connections: in order, apart from each other, and bounded."""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerUnavailable, RemoteProtocolError, SwarmError
from swarm.mux import BULK_BYTES, Channel, Gauge, Kind, Link
from swarm.wire import pack, unpack

PLENTY = 1 << 30


class Wire:
    """One end of a connection in memory; messages leave when the gate is open."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.peer: Wire
        self.gate = asyncio.Event()
        self.gate.set()
        self.sent: list[bytes] = []

    async def send(self, message: bytes) -> None:
        await self.gate.wait()
        self.sent.append(message)
        self.peer.inbox.put_nowait(message)

    async def receive(self) -> bytes | None:
        return await self.inbox.get()


def wires() -> tuple[Wire, Wire]:
    a, b = Wire(), Wire()
    a.peer, b.peer = b, a
    return a, b


class Pair:
    """A link between two ends, with as many connections as wanted."""

    def __init__(self, gauge: int = PLENTY) -> None:
        self.accepted: list[tuple[str, Channel]] = []
        self.bulk_wanted = 0
        self.left = Link("there", Gauge(PLENTY), want_bulk=self.want_bulk)
        self.right = Link("here", Gauge(gauge), accept=lambda *new: self.accepted.append(new))
        self.tasks: list[asyncio.Task[None]] = []

    def want_bulk(self) -> None:
        self.bulk_wanted += 1

    def connect(self, *, bulk: bool = False) -> tuple[Wire, Wire]:
        a, b = wires()
        for link, wire in ((self.left, a), (self.right, b)):
            self.tasks.append(asyncio.create_task(link.carry(wire, bulk=bulk)))
        return a, b

    async def answer(self) -> Channel:
        """The stream that the right end was given last."""
        await until(lambda: bool(self.accepted))
        return self.accepted.pop()[1]


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110  # one turn of the loop, not a wait
        await asyncio.sleep(0)


@asynccontextmanager
async def pair(*, bulk: bool = False, gauge: int = PLENTY) -> AsyncGenerator[Pair]:
    both = Pair(gauge)
    both.connect()
    if bulk:
        await asyncio.sleep(0)
        both.connect(bulk=True)
    await asyncio.sleep(0)
    try:
        yield both
    finally:
        for task in both.tasks:
            task.cancel()
        await asyncio.wait(both.tasks)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(20):
            await coroutine

    asyncio.run(whole())


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 40, BULK_BYTES + 1])), max_size=30),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_each_stream_keeps_its_order_whatever_overtakes_what(
    plan: list[tuple[int, int]], bulk: bool, random: Any
) -> None:
    async def go() -> None:
        async with pair() as both:
            wires_used = [both.connect(bulk=True)[0]] if bulk else []
            await asyncio.sleep(0)
            streams = [both.left.open(f"m{i}") for i in range(3)]
            sent: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
            for index, (which, size) in enumerate(plan):
                frame = bytes([index]) * size
                sent[which].append(frame)
                await streams[which].send(frame)
                for wire in wires_used:
                    if random.random() < 0.5:
                        wire.gate.clear()
                    else:
                        wire.gate.set()
                if random.random() < 0.5:
                    await asyncio.sleep(0)
            for wire in wires_used:
                wire.gate.set()
            await until(lambda: len(both.accepted) == 3)
            for method, stream in both.accepted:
                expected = sent[int(method[1:])]
                assert [await stream.receive() for _ in expected] == expected

    run(go())


def test_frames_that_are_ready_together_leave_in_one_message() -> None:
    async def go() -> None:
        both = Pair()
        a, _ = both.connect()
        streams = [both.left.open("session") for _ in range(16)]
        for stream in streams:
            await stream.send(b"token")
        await until(lambda: len(both.accepted) == 16)
        assert len(a.sent) == 1
        for task in both.tasks:
            task.cancel()
        await asyncio.wait(both.tasks)

    run(go())


def test_a_small_frame_overtakes_large_ones_that_do_not_leave() -> None:
    async def go() -> None:
        async with pair() as both:
            bulk, _ = both.connect(bulk=True)
            await asyncio.sleep(0)
            bulk.gate.clear()
            slow, quick = both.left.open("slow"), both.left.open("quick")
            await slow.send(bytes(BULK_BYTES + 1))
            await quick.send(b"now")
            await until(lambda: len(both.accepted) == 2)
            assert await both.accepted[1][1].receive() == b"now"
            bulk.gate.set()
            assert len(await both.accepted[0][1].receive() or b"") == BULK_BYTES + 1

    run(go())


def test_the_second_connection_is_asked_for_by_the_first_large_frame_and_only_once() -> None:
    async def go() -> None:
        async with pair() as both:
            stream = both.left.open("session")
            await stream.send(b"small")
            assert both.bulk_wanted == 0
            for _ in range(2):
                await stream.send(bytes(BULK_BYTES + 1))
            assert both.bulk_wanted == 1
            answer = await both.answer()
            sizes = [len(await answer.receive() or b"") for _ in range(3)]
            assert sizes == [5, BULK_BYTES + 1, BULK_BYTES + 1]

    run(go())


def test_ends_are_polite_and_leave_nothing_behind() -> None:
    async def go() -> None:
        async with pair() as both:
            stream = both.left.open("session")
            await stream.send(b"question")
            await stream.finish()
            answer = await both.answer()
            assert await answer.receive() == b"question"
            assert await answer.receive() is None
            await answer.send(b"word")
            answer.close()
            assert await stream.receive() == b"word"
            assert await stream.receive() is None
            with pytest.raises(PeerUnavailable, match="there"):
                await stream.send(b"too late")
            assert both.left.idle
            assert both.right.idle

    run(go())


def test_a_broken_stream_breaks_no_other() -> None:
    async def go() -> None:
        async with pair() as both:
            bad = both.left.open("session")
            await bad.send(b"said before")
            theirs = await both.answer()
            good = both.left.open("session")
            bad.cancel()
            with pytest.raises(PeerUnavailable):
                await bad.receive()
            assert await theirs.receive() == b"said before"
            with pytest.raises(PeerUnavailable, match="here"):
                await theirs.receive()
            await good.send(b"fine")
            assert await (await both.answer()).receive() == b"fine"

    run(go())


def test_a_lost_connection_ends_all_streams_after_their_last_frames() -> None:
    async def go() -> None:
        async with pair() as both:
            stream = both.left.open("session")
            answer = await both.answer()
            await answer.send(b"last words")
            await until(lambda: both.left.held)
            both.tasks[1].cancel()  # the right end goes
            with suppress(asyncio.CancelledError):
                await both.tasks[1]
            both.tasks[0].cancel()
            with suppress(asyncio.CancelledError):
                await both.tasks[0]
            assert await stream.receive() == b"last words"
            with pytest.raises(PeerUnavailable):
                await stream.receive()
            with pytest.raises(SwarmError):
                both.left.open("session")

    run(go())


def test_what_is_kept_of_a_lost_link_holds_nothing_of_those_who_used_it() -> None:
    """A server that moved could not free its weights: a session hung on a dead link's error."""

    class Cache:
        pass

    async def use(stream: Channel) -> weakref.ref[Cache]:
        cache = Cache()
        here = weakref.ref(cache)
        for touch in (stream.receive, stream.finish, lambda: stream.send(b"")):
            with suppress(PeerUnavailable):
                await touch()
        del cache
        return here

    async def go() -> None:
        async with pair() as both:
            stream = both.left.open("m")
            both.left.lose(PeerUnavailable("gone"))
            assert (await use(stream))() is None
            held = both.left.error
            assert held is not None
            assert held.__traceback__ is None
            assert str(held) == "gone"

    run(go())


def test_who_does_not_read_stops_only_his_own_link() -> None:
    async def go() -> None:
        frame = bytes(1000)
        async with pair(gauge=40_000) as both:
            flood = both.left.open("session")
            answer = await both.answer()
            for _ in range(100):
                await flood.send(frame)
                await asyncio.sleep(0)
            # A quarter of what is left: 40,000 - held >= 4 * held.
            assert both.right.held <= 8_000 + len(frame) * 2
            for _ in range(100):
                assert await answer.receive() == frame
            assert both.right.held == 0

    run(go())


def test_who_sends_waits_while_too_much_has_not_left() -> None:
    async def go() -> None:
        both = Pair()
        a, _ = both.connect()
        a.gate.clear()
        stream = both.left.open("session")

        async def flood() -> None:
            while True:
                await stream.send(bytes(BULK_BYTES))

        task = asyncio.create_task(flood())
        for _ in range(1000):
            await asyncio.sleep(0)
        assert both.left.queued <= (4 << 20) + BULK_BYTES
        stream.cancel()
        with pytest.raises(PeerUnavailable):
            await task
        for task in both.tasks:
            task.cancel()
        await asyncio.wait(both.tasks)

    run(go())


BAD_MESSAGES = {
    "no msgpack": b"\xc1",
    "no list": pack({"a": 1}),
    "half a frame": pack([1, 0, 0]),
    "a text": pack([1, 0, Kind.DATA, "text"]),
    "no number": pack(["1", 0, Kind.DATA, b""]),
    "a boolean": pack([True, 0, Kind.DATA, b""]),
    "unknown kind": pack([1, 0, 9, b""]),
    "a stream opened twice": pack([1, 0, Kind.OPEN, b"m", 1, 1, Kind.OPEN, b"m"]),
    "a frame twice": pack([1, 0, Kind.OPEN, b"m", 1, 1, Kind.DATA, b"", 1, 1, Kind.DATA, b""]),
    "a frame far ahead": pack([1, 0, Kind.OPEN, b"m", 1, 10_000, Kind.DATA, b""]),
}


@pytest.mark.parametrize("message", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_malformed_message_ends_the_link_with_a_code(message: bytes) -> None:
    async def go() -> None:
        both = Pair()
        a, b = wires()
        task = asyncio.create_task(both.right.carry(b))
        await a.send(message)
        with pytest.raises(RemoteProtocolError):
            await task
        assert both.right.error is not None

    run(go())


def test_a_message_is_a_flat_list_of_frames() -> None:
    """What docs/protocol.md says."""

    async def go() -> None:
        both = Pair()
        a, _ = both.connect()
        stream = both.left.open("session")
        await stream.send(b"x")
        await stream.finish()
        await until(lambda: bool(a.sent))
        assert unpack(a.sent[0]) == [1, 0, 1, b"session", 1, 1, 0, b"x", 1, 2, 2, b""]
        for task in both.tasks:
            task.cancel()
        await asyncio.wait(both.tasks)

    run(go())
