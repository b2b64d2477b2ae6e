"""How many machines a model wants, how quick they would be and what that costs: arithmetic alone.

Decoding reads every weight that a token meets, and what was kept of the text before it; so memory
tells how many machines are needed, and the bandwidth of that memory how quick they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

GB = 10**9
HOURS = 730.0  # of a month
_MILLION = 10**6


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of one block: its weights, those that one token meets, what it keeps of each token (of
    the last `window` ones; None: of all), and besides of each session."""

    weights: int
    active: int
    kept: int
    window: int | None = None
    fixed: int = 0

    def cache(self, tokens: int) -> int:
        """Of one session of so many tokens."""
        return self.fixed + self.kept * (
            tokens if self.window is None else min(tokens, self.window)
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU with a computer around it: bytes, bytes/s, watts at most, dollars an hour.

    `block_seconds` if it was measured: of one token through the model's average block; then
    `batch_seconds` is that of 16 tokens that share a pass.
    """

    name: str
    memory: int
    bandwidth: float
    watts: float | None = None
    rent: float | None = None
    block_seconds: float | None = None
    batch_seconds: float | None = None


def _gpu(name: str, gigabytes: int, gigabytes_per_second: int, watts: int, rent: float) -> Machine:
    return Machine(name, gigabytes * GB, gigabytes_per_second * float(GB), watts, rent)


GPUS = (
    _gpu("RTX 3090", 24, 936, 350, 0.39),
    _gpu("RTX 4090", 24, 1008, 450, 0.60),
    _gpu("RTX 5090", 32, 1792, 575, 1.22),
    _gpu("L4", 24, 300, 72, 0.78),
    _gpu("L40S", 48, 864, 350, 1.40),
    _gpu("A100 80GB", 80, 2039, 400, 2.45),
    _gpu("H100", 80, 3350, 700, 4.76),
    _gpu("H200", 141, 4800, 700, 6.35),
)
"""Memory, its bandwidth and the most power (SXM where there are several), as they are commonly
listed. Entered by hand in November 2026; eight of them compared with third-party pages, none with
its maker's own. The rent is RunPod's on demand in March 2026, by
https://deploybase.ai/articles/runpod-gpu-pricing. Rents move by tens of per cents within months."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is taken for granted; `swarm plan` prints all of it. Where a figure was measured is in
    docs/benchmarks.md."""

    usable: float = 0.9  # of a GPU's memory, for weights and caches
    reserve: int = 3 * GB // 2  # bytes for CUDA, activations and the program
    bandwidth_share: float = 0.5  # of the data sheet's, that a pass reaches
    row_share: float = 1 / 30  # of a pass with one row, for each row more: 16 take 1.5 times one
    block_seconds: float = 0.0003  # of a block, besides reading: norms, attention, calls
    hop_seconds: float = 0.002  # 1.7 ms of network stack and queues, 0.3 ms around a pass
    client_seconds: float = 0.0044  # norm, head, sampling, embedding
    machine_watts: float = 100.0  # of the computer around a GPU
    price_kwh: float = 0.30  # dollars


@dataclass(frozen=True, slots=True)
class Wish:
    """So many sessions of so many tokens at a time; each block on so many machines; a round trip
    between two machines in seconds."""

    sessions: int = 4
    tokens: int = 8192
    replicas: int = 2
    rtt: float = 0.001


@dataclass(frozen=True, slots=True)
class Offer:
    """What `machines` of one kind would do. Money is in dollars; None where a price is missing."""

    machine: Machine
    spans: tuple[int, ...]  # blocks on each machine of one chain
    machines: int  # all chains together
    alone: float  # tokens/s of a session that is alone
    together: float  # tokens/s of all sessions
    free_tokens: int  # for which there is room in each chain besides
    watts: float | None
    power_month: float | None
    rent_month: float | None

    def per_million(self, month: float | None) -> float | None:
        """Of tokens, if they all decode all the time."""
        return None if month is None else month / (self.together * 3600 * HOURS) * _MILLION


def offer(
    blocks: Sequence[Block], machine: Machine, wish: Wish, assumed: Assumptions
) -> Offer | None:
    """None if not even one block fits."""
    each = ceil(wish.sessions / wish.replicas)  # sessions of one chain
    spans = _fill(blocks, machine, each, wish.tokens, assumed)
    if spans is None:
        return None
    alone = 1 / _token_seconds(blocks, len(spans), machine, 1.0, wish, assumed)
    rows = max(1.0, each / len(spans))  # they are spread over the machines of the chain
    together = wish.sessions / _token_seconds(blocks, len(spans), machine, rows, wish, assumed)
    count = len(spans) * wish.replicas
    watts = None if machine.watts is None else count * (machine.watts + assumed.machine_watts)
    return Offer(
        machine,
        spans,
        count,
        alone,
        max(together, alone),
        _room(blocks, machine, spans, each * wish.tokens, assumed),
        watts,
        None if watts is None else watts / 1000 * HOURS * assumed.price_kwh,
        None if machine.rent is None else count * machine.rent * HOURS,
    )


def capacity(machine: Machine, assumed: Assumptions) -> int:
    """Bytes for weights and caches."""
    return max(0, int(machine.memory * assumed.usable) - assumed.reserve)


def _fill(
    blocks: Sequence[Block], machine: Machine, sessions: int, tokens: int, assumed: Assumptions
) -> tuple[int, ...] | None:
    """As many blocks as fit on each, one machine after the other."""
    spans: list[int] = [0]
    room = full = capacity(machine, assumed)
    for block in blocks:
        size = block.weights + sessions * block.cache(tokens)
        if size > full:
            return None
        if size > room:
            spans.append(0)
            room = full
        spans[-1] += 1
        room -= size
    return tuple(spans)


def _room(
    blocks: Sequence[Block],
    machine: Machine,
    spans: Sequence[int],
    tokens: int,
    assumed: Assumptions,
) -> int:
    """Tokens besides `tokens` for which the fullest machine of a chain has room."""
    full, begin, least = capacity(machine, assumed), 0, None
    for count in spans:
        span = blocks[begin : begin + count]
        begin += count
        kept = sum(block.kept for block in span if block.window is None)
        if kept:
            left = full - sum(block.weights for block in span)
            found = left // kept - tokens
            least = found if least is None else min(least, found)
    return max(0, least or 0)


def _token_seconds(
    blocks: Sequence[Block],
    hops: int,
    machine: Machine,
    rows: float,
    wish: Wish,
    assumed: Assumptions,
) -> float:
    """From one token of a session to its next, if so many rows share each pass."""
    if machine.block_seconds is not None:
        more = assumed.row_share
        if machine.batch_seconds is not None:
            more = max(0.0, machine.batch_seconds / machine.block_seconds - 1) / 15
        computing = len(blocks) * machine.block_seconds * (1 + more * (rows - 1))
    else:
        speed = machine.bandwidth * assumed.bandwidth_share
        read = sum(_read(block, rows, assumed) for block in blocks)
        cache = sum(block.cache(wish.tokens) for block in blocks)
        computing = (read + rows * cache) / speed + len(blocks) * assumed.block_seconds
    ways = (hops + 1) * wish.rtt / 2  # to the first, on to each other, and back
    return computing + ways + hops * assumed.hop_seconds + assumed.client_seconds


def _read(block: Block, rows: float, assumed: Assumptions) -> float:
    """Bytes of weights that take as long: rows of a dense block share what is read, those of a
    mixture meet other experts each, until all of them are read."""
    more = 1 + assumed.row_share * (rows - 1)
    if block.active == block.weights:
        return block.active * more
    return min(block.active * rows, block.weights * more)
