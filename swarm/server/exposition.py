"""A server's numbers as Prometheus wants them (docs/running/metrics.md explains each)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from swarm.dht.records import ServerRecord
from swarm.metrics import Family, plain
from swarm.models.storage import KvStore
from swarm.server.handler import Handler
from swarm.server.meters import Meters

_COUNTERS = {
    "sessions": ("swarm_sessions_total", "Sessions that were opened."),
    "pushes": ("swarm_pushes_total", "Outputs sent straight to the next server."),
    "push_failures": ("swarm_push_failures_total", "Times that pushing to a server failed."),
    "passes": ("swarm_passes_total", "Passes of the device through the span."),
    "device_tokens": ("swarm_device_tokens_total", "Rows x positions that passes computed."),
}
"""By their names in `info`."""

Traffic = Mapping[str, tuple[int, int]]
"""Bytes received and sent, by who dialled the links."""


def families(
    meters: Meters, handler: Handler | None, record: ServerRecord, traffic: Traffic
) -> Iterator[Family]:
    """Everything; while no span is served there is no `handler`."""
    counters = Counter(meters.past)
    if handler is not None:
        counters.update(handler.counts())
    yield from _work(meters)
    yield from _counted(meters, counters)
    for at, (name, what) in enumerate((("received", "came"), ("sent", "left"))):
        yield Family(
            f"swarm_{name}_bytes_total",
            "counter",
            f"Bytes of messages that {what}, before TLS, by who dialled.",
            [({"dialled_by": who}, both[at]) for who, both in traffic.items()],
        )
    yield from _identity(record)
    if handler is not None:
        yield from _present(handler)


def _work(meters: Meters) -> Iterator[Family]:
    yield Family(
        "swarm_step_seconds",
        "histogram",
        "Steps by phase: waiting for the device, in its passes, until answered and pushed.",
        [({"kind": k, "phase": p}, histogram) for (k, p), histogram in meters.steps.items()],
    )
    for name, help_, histogram in (
        ("swarm_pass_steps", "Steps that shared a pass of the device.", meters.pass_steps),
        ("swarm_pass_tokens", "Rows x positions in a pass.", meters.pass_tokens),
        ("swarm_pass_seconds", "How long a pass took.", meters.pass_seconds),
    ):
        yield Family(name, "histogram", help_, [({}, histogram)])


def _counted(meters: Meters, counters: Mapping[str, int]) -> Iterator[Family]:
    for counter, (name, help_) in _COUNTERS.items():
        yield plain(name, "counter", help_, counters[counter])
    came = {who: counters[f"steps_from_{who}s"] for who in ("client", "server")}
    yield Family(
        "swarm_steps_total",
        "counter",
        "Steps that came, by who sent them.",
        [({"sender": who}, count) for who, count in came.items()],
    )
    busy = "Seconds that the device computed for sessions."
    yield plain("swarm_device_busy_seconds_total", "counter", busy, counters["compute_us"] / 1e6)
    yield Family(
        "swarm_refusals_total",
        "counter",
        "Streams and questions that were refused, by code.",
        [({"code": code}, count) for code, count in sorted(meters.refused.items())],
    )
    broken = "Streams that broke: the other end went away, or did not read."
    yield plain("swarm_broken_streams_total", "counter", broken, meters.broken)
    ways = {
        "replayed": meters.replays,
        "inherited": counters["inherited"],
        "handed_over": counters["handed_over"],
    }
    yield Family(
        "swarm_recoveries_total",
        "counter",
        "Sessions that came in the middle of a text, as the client replayed what it had kept or "
        "another server gave what it held, and those that were handed over to others.",
        [({"way": way}, count) for way, count in ways.items()],
    )
    yield plain("swarm_moves_total", "counter", "Moves to other blocks.", meters.moves)


def _identity(record: ServerRecord) -> Iterator[Family]:
    about = {
        "model": record.model.name,
        "blocks": str(record.blocks),
        "dtype": record.numerics.dtype,
        "state": str(record.state),
        "peer_id": record.peer_id,
        "version": record.version,
    }
    yield Family("swarm_server_info", "gauge", "What this server is; always 1.", [(about, 1)])
    yield plain("swarm_blocks", "gauge", "Blocks that it serves.", len(record.blocks))
    yield Family(
        "swarm_throughput_tokens_per_second",
        "gauge",
        "What the span gave when it was measured, to one session and to 16 together.",
        [({"rows": "1"}, record.throughput), ({"rows": "16"}, record.batch_throughput)],
    )


def _present(handler: Handler) -> Iterator[Family]:
    load = handler.load()
    yield plain("swarm_sessions_open", "gauge", "Sessions that are open.", handler.sessions)
    yield plain("swarm_queue_steps", "gauge", "Steps that wait or are computed.", load.queue)
    yield plain(
        "swarm_kv_free_tokens", "gauge", "Tokens that the cache can promise.", load.free_tokens
    )
    yield from _cache(handler.store)


def _cache(store: KvStore) -> Iterator[Family]:
    used, free = store.count_pages()
    yield Family(
        "swarm_kv_pages",
        "gauge",
        "Pages of keys and values, 64 tokens of a row each, in memory that was taken.",
        [({"state": "used"}, used), ({"state": "free"}, free)],
    )
    sizes = {"budget": store.budget, "taken": store.taken, "used": store.used}
    yield Family(
        "swarm_kv_bytes",
        "gauge",
        "Of keys and values: what is allowed, taken from the system, and held by sessions.",
        [({"what": what}, size) for what, size in sizes.items()],
    )
