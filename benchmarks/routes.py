"""How long a route takes to find: python -m benchmarks.routes [SERVERS]; milliseconds of CPU."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from statistics import median

from swarm.client.peers import PeerBook
from swarm.client.routing import Chart, Request, find_route
from swarm.coordinates import pack, somewhere
from swarm.dht.records import ServerRecord, SignedRecord, peer_tag
from swarm.types import BlockRange, ModelId, Numerics

BLOCKS = 80
MODEL = ModelId("large", "0" * 64)
NUMERICS = Numerics("bfloat16")
REQUEST = Request(MODEL, BlockRange(0, BLOCKS), NUMERICS, 512, 128, position_bytes=16_384)
RUNS = 60


def make_swarm(count: int, lots: random.Random, *, linked: bool) -> list[SignedRecord]:
    """Spans of 4 to 20 blocks; each server announces its RTT to up to six that may follow it."""
    starts = [lots.randint(0, BLOCKS - 4) for _ in range(count)]
    starts[:20] = range(0, BLOCKS, 4)  # no block is missing
    spans = [BlockRange(a, min(BLOCKS, a + lots.randint(4, 20))) for a in starts]
    names = [f"{place:08}" for place in range(count)]
    servers: list[SignedRecord] = []
    for name, span in zip(names, spans, strict=True):
        following = [n for n, s in zip(names, spans, strict=True) if s.start <= span.end < s.end]
        near = lots.sample(following, min(6, len(following))) if linked else []
        record = ServerRecord(
            peer_id=name,
            model=MODEL,
            blocks=span,
            num_blocks=BLOCKS,
            host="192.0.2.1",
            port=1,
            certificate_digest=bytes(32),
            numerics=NUMERICS,
            throughput=lots.uniform(5, 50),
            queue=lots.choice([0, 0, 3]),
            free_tokens=50_000,
            coordinates=pack(somewhere(lots)) if linked else None,
            next_rtts={peer_tag(other): lots.randint(5, 200) for other in near},
        )
        servers.append(SignedRecord(record, b""))
    return servers


def measured(servers: list[SignedRecord], count: int, lots: random.Random) -> PeerBook:
    book = PeerBook(lots)
    for record in (server.record for server in lots.sample(servers, count)):
        book.measured(record.peer_id, lots.uniform(0.005, 0.2))
        book.worked(record.peer_id, 1, lots.uniform(0.01, 0.05), 8)
    book.coordinates = somewhere(lots)
    return book


def cpu(work: Callable[[int], object]) -> str:
    times: list[float] = []
    for run in range(RUNS):
        begin = time.process_time()
        work(run)
        times.append(1e3 * (time.process_time() - begin))
    times.sort()
    return f"{times[0]:6.2f} {median(times):6.2f}"


def main(count: int) -> None:
    lots = random.Random(0)
    print(f"{count} servers, {BLOCKS} blocks; milliseconds of CPU, best and median")
    for known, linked in ((0, False), (min(64, count), True), (count, True)):
        servers = make_swarm(count, lots, linked=linked)
        book, chart = measured(servers, known, lots), Chart(servers)
        chart.holders(MODEL, NUMERICS)
        routes = cpu(
            lambda run, chart=chart, book=book: find_route(chart, REQUEST, book, 0.0, tiebreak=run)
        )
        what = (
            f"{known} measured, {'6 RTTs and a place' if linked else 'no RTTs'} announced by each"
        )
        print(f"{what:44} {routes}")
        charts = cpu(lambda _, servers=servers: Chart(servers).holders(MODEL, NUMERICS))
        print(f"{'  once, for every new picture of the swarm':44} {charts}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
