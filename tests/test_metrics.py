"""Numbers in Prometheus' words, over HTTP that strangers may knock at."""

from __future__ import annotations

import asyncio
import math
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from swarm.errors import UsageError
from swarm.loop import run
from swarm.metrics import SECONDS, Family, Histogram, Page, plain, render

HOSTILE = 'a"b\\c\nd\u202e'


@given(st.lists(st.floats(0, 1e3)))
def test_a_histogram_is_what_prometheus_makes_of_the_same_values(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    buckets = histogram.buckets()
    for bound, count in buckets:
        limit = math.inf if bound == "+Inf" else float(bound)
        assert count == sum(value <= limit for value in values)
    assert buckets[-1] == ("+Inf", len(values))
    assert histogram.total == pytest.approx(sum(values))


def test_a_page_is_read_back_by_prometheus_itself() -> None:
    histogram = Histogram((1, 2))
    histogram.observe(2)
    page = render(
        [
            plain("swarm_things_total", "counter", "Things.", 3),
            Family("swarm_names", "gauge", "Whatever strangers say.", [({"who": HOSTILE}, 1)]),
            Family("swarm_none", "gauge", "Nobody is there.", []),
            Family("swarm_seconds", "histogram", "Time.", [({"kind": "x"}, histogram)]),
        ]
    ).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples["swarm_things_total",] == 3
    assert samples["swarm_names", HOSTILE] == 1
    assert samples["swarm_seconds_bucket", "x", "1.0"] == 0
    assert samples["swarm_seconds_bucket", "x", "2.0"] == 1
    assert (samples["swarm_seconds_count", "x"], samples["swarm_seconds_sum", "x"]) == (1, 2)
    if sys.platform == "linux":
        assert samples["process_resident_memory_bytes",] > 1 << 20


def test_nobody_pays_for_the_library_who_shows_nothing() -> None:
    code = "import sys, swarm.metrics, swarm.tracing; sys.exit(any(n.startswith(p) for n in "
    code += "sys.modules for p in ('prometheus_client', 'opentelemetry')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def knock(
    body: Callable[[int, Page], Awaitable[None]], health: tuple[bool, str] = (True, "online")
) -> None:
    """`body(port, page)` beside a page with one number."""

    async def play() -> None:
        page = Page(lambda: [plain("swarm_x", "gauge", "X.", 7)], lambda: health)
        port = await page.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(30):
                await body(port, page)
        finally:
            await page.close()

    run(play())


async def say(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionError:  # hung up on
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "begins", "has"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\nswarm_x 7.0\n"),
        (b"GET /metrics?x=y HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"version=0.0.4"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\r\n\r\nonline\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n", b"/metrics"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed\r\n", b"only GET"),
        (b"GET /metrics\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"plain HTTP"),
        (b"\xff\xfe\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n", b""),
        (b"GET /" + b"x" * 50_000 + b" HTTP/1.1\r\n\r\n", b"", b""),
    ],
)
def test_what_is_asked_is_answered(request_: bytes, begins: bytes, has: bytes) -> None:
    async def body(port: int, _: Page) -> None:
        answer = await say(port, request_)
        assert answer.startswith(begins)
        assert has in answer
        assert len(answer) < 10_000

    knock(body)


def test_a_head_is_a_head() -> None:
    async def body(port: int, _: Page) -> None:
        answer = await say(port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\n")
        assert b"swarm_x" not in answer

    knock(body)


def test_health_is_a_status_that_probes_understand() -> None:
    async def body(port: int, _: Page) -> None:
        answer = await say(port, b"GET /healthz HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert answer.endswith(b"joining\n")

    knock(body, (False, "joining"))


def test_who_says_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen who dawdle are in the way of others only until their time is over."""
    monkeypatch.setattr("swarm.metrics._ASK_SECONDS", 0.3)

    async def body(port: int, page: Page) -> None:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
        for _, writer in slow:
            writer.write(b"GET /met")
        while len(page._asking) < 16:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert await say(port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        for reader, writer in slow:
            assert await reader.read() == b""
            writer.close()
        assert b"swarm_x" in await say(port, b"GET /metrics HTTP/1.1\r\n\r\n")

    knock(body)


def test_a_port_in_use_is_said() -> None:
    async def body(port: int, _: Page) -> None:
        with pytest.raises(UsageError, match="choose another --metrics-port"):
            await Page(list, lambda: (True, "")).start("127.0.0.1", port)

    knock(body)
    with socket.create_server(("127.0.0.1", 0)):
        pass  # the loop left the port
