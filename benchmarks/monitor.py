"""The monitor with a thousand servers: its memory, and what its page costs a browser.

A DHT node of this process holds the records, really signed, of servers that nobody runs; so the
monitor is told to ask none of them. Everything else is what people get: `swarm-monitor` as a
process, and Chromium (SWARM_CHROMIUM may name it).
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, islice
from typing import Any

import psutil
from cryptography.hazmat.primitives.asymmetric import rsa

from benchmarks.figures import NoFigure, at_most
from benchmarks.lab import Lab
from swarm.dht.node import DhtNode
from swarm.dht.pages import bucket_of
from swarm.dht.records import ServerRecord, keys_of, sign_record
from swarm.identity import Identity
from swarm.loop import BackgroundLoop
from swarm.types import BlockRange, ModelId

SERVERS = 1000
BLOCKS = 64
MODEL = ModelId("simulated/thousand", "5eed" * 16)
_FEW = 20  # servers that change in a small update
_LOOK_SECONDS = 0.25  # between two looks for a patch
_UPDATE_SECONDS = 120.0  # until the monitor has looked again
_CONTEXT: dict[str, Any] = {
    "viewport": {"width": 1440, "height": 900},
    "bypass_csp": True,  # Playwright waits by means of `eval`, which the page forbids
}
_WATCH = """(() => {
  window.costs = [];
  const whenDrawn = () => {
    const shown = document.querySelectorAll("[role=option]").length;
    if (shown < SERVERS) requestAnimationFrame(whenDrawn);
    else window.drawn = performance.now();
  };
  requestAnimationFrame(whenDrawn);
  const add = EventSource.prototype.addEventListener;
  EventSource.prototype.addEventListener = function (kind, listener) {
    add.call(this, kind, kind !== "patch" ? listener : (event) => {
      const begin = performance.now();
      listener(event);
      requestAnimationFrame(() => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => window.costs.push(
          { bytes: event.data.length, painted: performance.now() - begin });
        port2.postMessage(0);
      });
    });
  };
})()""".replace("SERVERS", str(SERVERS))


def measure(lab: Lab) -> None:
    lab.clear()
    lab.progress(f"making {SERVERS} servers")
    crowd = _Crowd(lab.seed)
    loop = BackgroundLoop.shared()
    peers = loop.call(crowd.start())
    try:
        loop.call(crowd.announce(range(SERVERS)))
        with _monitor(lab, peers) as (process, url), _browser() as browser:
            _wait_for(url)
            _first_paints(lab, browser, url)
            _updates(lab, browser, url, crowd)
            lab.note("monitor, process tree, USS", "MB", [_uss(process)], at_most(300))
    finally:
        loop.call(crowd.close())


def _first_paints(lab: Lab, browser: Any, url: str) -> None:
    first: list[float] = []
    drawn: list[float] = []
    for run in range(lab.runs):
        context = browser.new_context(**_CONTEXT)
        page = context.new_page()
        page.add_init_script(_WATCH)
        page.goto(url)
        page.wait_for_function("window.drawn")
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        first.append(page.evaluate(paint))
        drawn.append(page.evaluate("window.drawn"))
        lab.say("all servers drawn, ms", run, drawn[-1])
        context.close()
    lab.note("first contentful paint", "ms", first, at_most(1000))
    lab.note(f"{SERVERS} servers drawn", "ms", drawn, at_most(1000))


def _updates(lab: Lab, browser: Any, url: str, crowd: _Crowd) -> None:
    page = browser.new_page(**_CONTEXT)
    page.add_init_script(_WATCH)
    page.goto(url)
    page.wait_for_function("window.drawn")
    thread = _Thread(page)
    for what, count in ((f"update of {_FEW} servers", _FEW), (f"update of all {SERVERS}", SERVERS)):
        busy: list[float] = []
        painted: list[float] = []
        for run in range(min(lab.runs, 3)):
            page.evaluate("window.costs = []")
            BackgroundLoop.shared().call(crowd.announce(crowd.some(count)))
            busy.append(thread.patched(30 * count))
            cost = max(page.evaluate("window.costs"), key=lambda cost: cost["bytes"])
            painted.append(cost["painted"])
            lab.say(f"{what}, ms of the main thread", run, busy[-1])
        lab.note(f"{what}, CPU of the browser's main thread", "ms", busy, at_most(50))
        lab.note(f"{what}, until it is painted", "ms", painted)


class _Thread:
    """The page's main thread, and what a patch costs it in CPU time."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self._devtools = page.context.new_cdp_session(page)
        self._devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def patched(self, size: int) -> float:
        """Milliseconds of the half second in which a patch of more than `size` bytes comes: with a
        tick of the page's clock, and with our looking."""
        page, before = self._page, self._busy()
        for _ in range(int(_UPDATE_SECONDS / _LOOK_SECONDS)):
            page.wait_for_timeout(1e3 * _LOOK_SECONDS)
            found = page.evaluate("Math.max(0, ...window.costs.map((cost) => cost.bytes))")
            if found > size:
                page.wait_for_timeout(1e3 * _LOOK_SECONDS)  # until all of it is painted
                return 1e3 * (self._busy() - before)
            before = self._busy()
        raise NoFigure(f"no update within {_UPDATE_SECONDS:g} s")

    def _busy(self) -> float:
        metrics = self._devtools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


class _Crowd:
    """Servers that only announce, all by way of one DHT node."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._identities = list(islice(_identities(), SERVERS))
        self._spans: list[BlockRange] = []
        for _ in range(SERVERS):
            length = self._rng.choice((4, 8, 8, 16))
            start = self._rng.randrange(BLOCKS - length + 1)
            self._spans.append(BlockRange(start, start + length))
        # As finely as servers would cut their bucket of the DHT by themselves.
        buckets = [bucket_of(span.start, BLOCKS) for span in self._spans]
        self._bits = {bucket: _cut(buckets.count(bucket)) for bucket in set(buckets)}

    async def start(self) -> Sequence[str]:
        self._node = await DhtNode.create(Identity.ephemeral())
        return await self._node.visible_addresses()

    async def close(self) -> None:
        await self._node.close()

    def some(self, count: int) -> Sequence[int]:
        return self._rng.sample(range(SERVERS), count)

    async def announce(self, which: Sequence[int]) -> None:
        """New records of these, with other figures than before."""
        keys: list[str] = []
        values: list[bytes] = []
        peers: list[str] = []
        until: list[float] = []
        for index in which:
            record = self._record(index)
            data = sign_record(record, self._identities[index], None).data
            *pages, registry = keys_of(record, None)
            for key in [*pages, *([registry] if index < 8 else [])]:
                keys.append(key)
                values.append(data)
                peers.append(record.peer_id)
                until.append(record.kept_until)
            await asyncio.sleep(0)
        dht: Any = self._node._dht
        await dht.store_many(keys, values, until, peers)

    def _record(self, index: int) -> ServerRecord:
        span, rng = self._spans[index], self._rng
        return ServerRecord(
            peer_id=self._identities[index].peer_id,
            model=MODEL,
            blocks=span,
            num_blocks=BLOCKS,
            host="192.0.2.7",
            port=4000,
            certificate_digest=bytes(32),
            throughput=rng.lognormvariate(4, 0.5),
            queue=rng.randrange(9),
            free_tokens=rng.randrange(1 << 20),
            public_name=f"volunteer {index}" if index % 3 else "",
            version="0.1.0",
            announced_at=int(1000 * time.time()),
            lifetime=600,
            page_bits=self._bits[bucket_of(span.start, BLOCKS)],
        )


def _cut(servers: int) -> int:
    """Bits by which a bucket of so many is cut into pages of less than 48 (swarm/dht/pages.py)."""
    return max(0, (servers // 48).bit_length())


def _identities() -> Iterator[Identity]:
    """Keys of every two of a few primes: nobody relies on them, and making others takes minutes."""
    primes: list[int] = []
    while len(primes) * (len(primes) - 1) // 2 < SERVERS:
        numbers = rsa.generate_private_key(65_537, 2048).private_numbers()
        primes += [numbers.p, numbers.q]
    for p, q in combinations(primes, 2):
        if (p * q).bit_length() == 2048:
            d = pow(65_537, -1, (p - 1) * (q - 1))
            public = rsa.RSAPublicNumbers(65_537, p * q)
            parts = d % (p - 1), d % (q - 1), rsa.rsa_crt_iqmp(p, q)
            numbers = rsa.RSAPrivateNumbers(p, q, d, *parts, public)
            yield Identity(numbers.private_key(unsafe_skip_rsa_key_validation=True))


@contextmanager
def _monitor(lab: Lab, peers: Sequence[str]) -> Generator[tuple[psutil.Process, str]]:
    words = ["-m", "swarm", "monitor", "--peers", *peers, "--port", "0", "--no-ask"]
    process = subprocess.Popen(
        [sys.executable, *words, "--history", str(lab.folder / "history.sqlite")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield psutil.Process(process.pid), process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@contextmanager
def _browser() -> Generator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("SWARM_CHROMIUM") or shutil.which("chromium")
    if not path:
        raise NoFigure("no chromium here: install it, or set SWARM_CHROMIUM to where it is")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


def _wait_for(url: str) -> None:
    """Until the monitor has seen everybody."""
    import json
    from urllib.request import urlopen

    deadline = time.monotonic() + _UPDATE_SECONDS
    seen = 0
    while seen < SERVERS:
        if time.monotonic() > deadline:
            raise NoFigure(f"the monitor sees {seen} of {SERVERS} servers")
        time.sleep(0.5)
        with urlopen(f"{url}/api/v1/state") as answer:  # noqa: S310
            models = json.load(answer)["models"].values()
        seen = sum(len(model["servers"]) for model in models)


def _uss(process: psutil.Process) -> float:
    tree = [process, *process.children(recursive=True)]
    return sum(each.memory_full_info().uss for each in tree) / 1e6
