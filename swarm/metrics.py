"""The only door to prometheus_client: histograms that cost a step next to nothing, and one page.

Whoever counts needs no library: numbers are plain Python's, and are put into Prometheus' words when
somebody asks for them. The library is loaded only then.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from swarm.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of histograms of times."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Upper bounds of histograms of counts."""

_ASK_SECONDS = 5.0  # in which a request must be complete, and its answer taken
_ASK_BYTES = 1 << 13
_MOST_ASKING = 16  # connections at a time
_WORDS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


class Histogram:
    """Counts observations by upper bounds; may be read while one thread observes."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one has no bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus wants them: upper bound, and how many observations do not exceed it."""
        counts, sum_ = list(self.counts), 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*map(repr, map(float, self.bounds)), "+Inf"], counts, strict=True):
            buckets.append((bound, sum_ := sum_ + count))
        return buckets


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, with a value for each set of labels. The names of counters end in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[tuple[Mapping[str, str], float | Histogram]]


def plain(name: str, kind: Literal["counter", "gauge"], help_: str, value: float) -> Family:
    """A metric without labels."""
    return Family(name, kind, help_, [({}, value)])


def render(families: Iterable[Family]) -> bytes:
    """The page, of CONTENT_TYPE; with this process's memory, CPU and files (on Linux)."""
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.registry import Collector

    class All(Collector):
        def collect(self) -> Iterator[Metric]:
            return map(_translate, families)

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(All())
    return generate_latest(registry)


def _translate(family: Family) -> Metric:
    from prometheus_client import core

    keys = list(family.samples[0][0]) if family.samples else []
    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    metric: Any = kinds[family.kind](family.name, family.help, labels=keys)
    for labels, value in family.samples:
        values = [labels[key] for key in keys]
        if isinstance(value, Histogram):
            metric.add_metric(values, buckets=value.buckets(), sum_value=value.total)
        else:
            metric.add_metric(values, value)
    return metric


class Page:
    """`GET /metrics` and `/healthz` over plain HTTP, in the event loop of what it tells of.

    Read-only, without a key: so it listens on loopback unless told otherwise. `health` is whether
    all is well, and in a word how things are.
    """

    def __init__(
        self, families: Callable[[], Iterable[Family]], health: Callable[[], tuple[bool, str]]
    ) -> None:
        self._families, self._health = families, health
        self._server: asyncio.Server | None = None
        self._asking: set[asyncio.Task[Any]] = set()

    async def start(self, host: str, port: int) -> int:
        """The port, which is `port` unless that is 0. Raises UsageError."""
        try:
            self._server = await asyncio.start_server(self._admit, host, port, limit=_ASK_BYTES)
        except OSError as error:
            raise UsageError(
                f"cannot show metrics at {host}:{port} ({error.strerror or error}): choose another "
                "--metrics-port or --metrics-host"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._asking:
            task.cancel()
        if self._asking:
            await asyncio.wait(self._asking)

    def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._asking) >= _MOST_ASKING:
            writer.close()
            return
        task = asyncio.create_task(self._answer(reader, writer))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # Whoever is slow or leaves early gets nothing.
            with suppress(TimeoutError, asyncio.IncompleteReadError, OSError):
                async with asyncio.timeout(_ASK_SECONDS):
                    writer.write(self._reply(await _heading(reader)))
                    await writer.drain()
        finally:
            writer.close()

    def _reply(self, heading: str) -> bytes:
        words = heading.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(400, b"this is plain HTTP/1.1\n")
        method, path = words[0], words[1].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _response(405, b"only GET\n")
        match path:
            case "/metrics":
                reply = _response(200, render(self._families()), CONTENT_TYPE)
            case "/healthz":
                well, word = self._health()
                reply = _response(200 if well else 503, f"{word}\n".encode())
            case _:
                reply = _response(404, b"there are /metrics and /healthz\n")
        return reply if method == "GET" else reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


async def _heading(reader: asyncio.StreamReader) -> str:
    """The first line of a request that came completely; "" if it is too long."""
    try:
        request = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return ""
    return request.partition(b"\r\n")[0].decode("ascii", errors="replace")


def _response(status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status} {_WORDS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
