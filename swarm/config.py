"""Limits and waits, in one place: frozen value objects made once and passed whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarm.types import Codec


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one server grants strangers."""

    kv_bytes: int | None = None  # of keys and values, hard; None = a share of what is free
    kv_overcommit: float = 2.0  # so often may that be promised: sessions end before max_length
    kv_wait: float = 3.0  # seconds for which an opening waits for its promise
    max_sessions: int = 512
    max_step_tokens: int = 2048  # rows x positions in one step
    window: int = 8  # unanswered steps per session
    waiting_bytes: int = 1 << 28  # of steps that wait or are answered, over all sessions
    pass_tokens: int = 512  # rows x positions in one pass of the device
    training_bytes: int = 1 << 29  # of batches that are trained with, over all clients; 0: none are
    training_wait: float = 20.0  # seconds for which such a batch waits for memory
    adapter_bytes: int = 1 << 28  # of clients' adapters, one client at most half; 0: none
    resident_bytes: int = 1 << 30  # of adapters that the owner preloads
    graph_bytes: int = 1 << 30  # of what is kept on the device to go back through blocks
    kept_bytes: int = 4 << 30  # of that, until gradients come; at most an eighth of what is free
    kept_seconds: float = 120.0  # for which it is kept
    open_timeout: float = 10.0  # seconds in which a stream must say what it wants
    idle_timeout: float = 1800.0  # seconds without a step before a session is closed
    send_timeout: float = 30.0  # seconds a client or next hop may leave its stream unread
    stop_timeout: float = 5.0  # seconds from a polite stop, or a decision to move, to the end
    record_lifetime: int = 90  # seconds; who does not renew its record for so long is gone
    balance_seconds: float = 60.0  # between two looks whether to move


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """How long a client waits, in seconds."""

    connect: float = 10.0  # dial, TLS and Open
    sync: float = 2.0  # an answer to Sync: who does not give it counts as dead
    step: float = 30.0  # one step through the whole route, before somebody counts as dead
    least: float = (
        0.25  # so much longer than usual a step takes before all are asked to answer Sync
    )
    recovery: float = 60.0  # search for replacements, before generation fails
    refresh: float = 1.0  # shortest time between two looks into the DHT while blocks are missing


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Choices of one client."""

    timeouts: ClientTimeouts = field(default_factory=ClientTimeouts)
    chunk_bytes: int = 1 << 19  # a prefill travels in frames of at most about this size
    history_bytes: int = 4 << 30  # memory for replays, over one session
    codec: Codec = "none"  # mxint8: a quarter of the bytes, and not exact (docs/benchmarks.md)
    standby_after: int | None = None  # positions from which each hop has a warm standby; None: none
    allowed_servers: frozenset[str] = frozenset()  # peer ids; empty: all
    blocked_servers: frozenset[str] = frozenset()
