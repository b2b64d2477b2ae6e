"""A TCP relay that is as slow as a link: bandwidth and delay each way, over all connections.

    python -m benchmarks.relay 127.0.0.2:4000=127.0.0.1:4000 ...

Prints `ready`; then each line `MEGABITS_PER_SECOND ONE_WAY_MS` on its standard input sets what all
links are from then on, and is answered with `shaped`. TLS passes through as it is.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

CHUNK = 1 << 14  # bytes that go over the link in one piece
BACKLOG = 0.002  # seconds of sending that may wait; then senders do, as at a full socket
IN_FLIGHT = 4096  # chunks between both ends of one connection


@dataclass(frozen=True, slots=True)
class Shape:
    """Bandwidth in bits per second and delay in seconds, each way."""

    bandwidth: float = float("inf")
    delay: float = 0.0


class Lane:
    """One direction of a link. Pure: times are arguments, in seconds of one clock."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._free = float("-inf")  # when the last byte of all that was taken has left

    def take(self, now: float, size: int) -> float:
        """When the last of `size` bytes, sent now, comes out at the other end."""
        self._free = max(now, self._free) + size * 8 / self.shape.bandwidth
        return self._free + self.shape.delay

    def backlog(self, now: float) -> float:
        """Seconds until the link can begin with anything else."""
        return max(0.0, self._free - now)


class Relay:
    """Listens at one address and passes everything on to another, as slowly as `shape` says."""

    def __init__(self, target: tuple[str, int], shape: Shape) -> None:
        self._target = target
        self.lanes = (Lane(shape), Lane(shape))  # to the target, and back
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._accept, host, port)
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        there, back = self.lanes
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_carry(there, reader, far_writer))
                tasks.create_task(_carry(back, far_reader, writer))
        except* OSError:
            pass  # one end broke the connection: the other one is closed
        finally:
            writer.close()
            far_writer.close()


async def _carry(lane: Lane, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    clock = asyncio.get_running_loop().time
    flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)

    async def land() -> None:
        while True:
            at, data = await flying.get()
            if (left := at - clock()) > 0:
                await asyncio.sleep(left)
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(land())
        data = b"-"
        while data:
            data = await reader.read(CHUNK)
            if (wait := lane.backlog(clock()) - BACKLOG) > 0:
                await asyncio.sleep(wait)
            await flying.put((lane.take(clock(), len(data)), data))


async def _main(links: list[str]) -> None:
    relays: list[Relay] = []
    for link in links:
        here, _, there = link.partition("=")
        relay = Relay(_address(there), Shape())
        await relay.start(*_address(here))
        relays.append(relay)
    print("ready", flush=True)

    def reshape(line: str) -> None:
        megabits, delay = map(float, line.split())
        for lane in (lane for relay in relays for lane in relay.lanes):
            lane.shape = Shape(megabits * 1e6, delay / 1e3)
        print("shaped", flush=True)

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    reader = threading.Thread(target=_read, args=(loop, reshape, ended.set), daemon=True)
    reader.start()
    await ended.wait()
    for relay in relays:
        await relay.stop()


def _read(
    loop: asyncio.AbstractEventLoop, reshape: Callable[[str], None], end: Callable[[], None]
) -> None:
    for line in sys.stdin:
        loop.call_soon_threadsafe(reshape, line)
    loop.call_soon_threadsafe(end)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def precise_loop() -> asyncio.AbstractEventLoop:
    """epoll and uvloop wait for whole milliseconds; select does for microseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(_main(sys.argv[1:]))
