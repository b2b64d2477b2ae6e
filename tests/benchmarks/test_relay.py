"""A slow link must be as slow as it says, and change nothing: figures over it depend on that."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.relay import BACKLOG, CHUNK, Lane, Relay, Shape, precise_loop

SHAPE = Shape(bandwidth=8e6, delay=0.25)  # a megabyte per second


def test_a_chunk_takes_its_time_on_the_wire_and_then_the_delay() -> None:
    lane = Lane(SHAPE)
    assert lane.take(10.0, 1000) == pytest.approx(10.251)
    assert lane.take(10.0, 1000) == pytest.approx(10.252)  # behind the first
    assert lane.backlog(10.0) == pytest.approx(0.002)
    assert lane.take(20.0, 1000) == pytest.approx(20.251)  # the link was idle again
    assert lane.backlog(30.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1 << 16)), min_size=1))
def test_never_more_than_the_bandwidth_and_in_order(sent: list[tuple[float, int]]) -> None:
    lane, now, last = Lane(SHAPE), 0.0, 0.0
    for pause, size in sent:
        now += pause
        came = lane.take(now, size)
        assert came >= max(now, last) + size / 1e6 - 1e-9 if last else came >= now
        last = came - SHAPE.delay
    total = sum(size for _, size in sent)
    assert last >= sent[0][0] + total / 1e6 - 1e-6


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def there_and_back(shape: Shape, data: bytes) -> tuple[bytes, float]:
    """What an echo behind a relay answers, and the seconds it took."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    relay = Relay(server.sockets[0].getsockname()[:2], shape)
    port = await relay.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    clock = asyncio.get_running_loop().time
    begin = clock()
    writer.write(data)
    writer.write_eof()
    answer = await reader.read(-1)
    seconds = clock() - begin
    writer.close()
    await relay.stop()
    server.close()
    return answer, seconds


def run(shape: Shape, data: bytes) -> tuple[bytes, float]:
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        return runner.run(there_and_back(shape, data))


def test_all_bytes_pass_in_order_and_the_end_too() -> None:
    data = bytes(range(256)) * 4096
    assert run(Shape(), data)[0] == data


def test_delay_and_bandwidth_are_felt() -> None:
    assert run(Shape(delay=0.05), b"x")[1] >= 0.1
    data = bytes(20 * CHUNK)
    least = len(data) * 8 / 80e6  # the way back begins while the way there goes on
    assert run(Shape(bandwidth=80e6), data)[1] >= least - BACKLOG
