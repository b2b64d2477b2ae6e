"""Which blocks a server should hold, when nobody says, and when it should move to others.

Pure: it knows values, no network, no clock, no chance and no device. docs/placement.md explains it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate
from statistics import median_low
from zlib import crc32

from swarm.errors import UsageError
from swarm.types import BlockRange

_MEMORY_SHARE = 0.7  # of what is free: activations, the allocator and other programs need some
_GRAIN = 2.0**-20  # tokens/s
_CREDIBLE = 30.0  # nobody counts for more than so many typical servers: records may lie
_REST_SECONDS = 600.0  # between two moves of one server, unless there is a hole to fill
_STAY_SECONDS = 1800.0  # for so long things are taken to stay as they are
_ENOUGH = 0.9  # of what servers could give, if sessions use parts of spans: then nobody moves


@dataclass(frozen=True, slots=True)
class Holder:
    """A server that holds `blocks`, or will soon.

    `speed` is in block-tokens per second: tokens/s if it held one block; 0 is not known.
    """

    peer_id: str
    blocks: BlockRange
    speed: float

    @property
    def share(self) -> float:
        """Tokens/s that it can add to each of its blocks, if it computes all of them."""
        return self.speed / len(self.blocks)


def believe(holders: Sequence[Holder]) -> list[Holder]:
    """Speeds that one may count on: none is unknown, and none is beyond all measure."""
    known = [holder.speed for holder in holders if holder.speed > 0]
    typical = median_low(known) if known else 1.0
    return [
        replace(holder, speed=min(holder.speed or typical, _CREDIBLE * typical))
        for holder in holders
    ]


def capacities(num_blocks: int, holders: Iterable[Holder]) -> list[float]:
    """Tokens/s that each block can carry, in grains, so that sums are exact and equals tie."""
    changes = [0.0] * (num_blocks + 1)
    for holder in holders:
        share = round(holder.share / _GRAIN) * _GRAIN
        changes[min(holder.blocks.start, num_blocks)] += share
        changes[min(holder.blocks.end, num_blocks)] -= share
    return list(accumulate(changes[:num_blocks]))


def swarm_throughput(num_blocks: int, holders: Iterable[Holder]) -> float:
    """Tokens/s that the swarm can give: those of its rarest block."""
    return min(capacities(num_blocks, holders))


def can_give(num_blocks: int, holders: Iterable[Holder], rate: float) -> bool:
    """Whether sessions that use parts of spans, as routes do, can have so many tokens/s.

    Each block takes what it needs of those that hold it, whoever must stop soonest giving first:
    earliest deadline first, which finds a division of their time if there is one.
    """
    starting: list[list[tuple[int, float]]] = [[] for _ in range(num_blocks)]
    for holder in holders:
        if holder.blocks.start < num_blocks:
            starting[holder.blocks.start].append((holder.blocks.end, holder.speed))
    giving: list[tuple[int, float]] = []
    for block, new in enumerate(starting):
        for each in new:
            heappush(giving, each)
        wanted = rate
        while wanted > 0:
            if not giving:
                return False
            end, left = heappop(giving)
            if end > block:
                if left > wanted:
                    heappush(giving, (end, left - wanted))
                wanted -= left
    return True


def choose_span(num_blocks: int, holders: Iterable[Holder], wanted: int) -> BlockRange:
    """The `wanted` consecutive blocks that need another server most, the first if there are ties.

    The rarest block of a window counts most, then the next rarest. Of all windows, that one raises
    the swarm's rarest block most, then the next rarest, however fast the new server is. With the
    number of servers for their capacity it is Petals' rule (https://arxiv.org/abs/2209.01188, 3.2).
    """
    capacity = capacities(num_blocks, holders)
    wanted = min(wanted, num_blocks)
    starts = range(num_blocks - wanted + 1)
    start = min(starts, key=lambda start: sorted(capacity[start : start + wanted]))
    return BlockRange(start, start + wanted)


def settle(
    num_blocks: int, holders: Iterable[Holder], me: Holder, rivals: Collection[str]
) -> BlockRange:
    """Where `me` goes after a look at who else was choosing at the same time: peers `rivals`.

    All of these choose once more, in the order of a hash, so that each knows what the others do.
    """
    others = [holder for holder in holders if holder.peer_id != me.peer_id]
    placed = [holder for holder in others if holder.peer_id not in rivals]
    before_me = [h for h in others if h.peer_id in rivals and _lot(h) < _lot(me)]
    for rival in sorted(before_me, key=_lot):
        blocks = choose_span(num_blocks, placed, len(rival.blocks))
        placed.append(replace(rival, blocks=blocks))
    return choose_span(num_blocks, placed, len(me.blocks))


def is_well(num_blocks: int, holders: Sequence[Holder], quality: float) -> bool:
    """Whether no move could be worth it, whoever moves: the rarest block carries `quality` (0..1)
    of what it would if all were spread evenly, or routes over parts of spans make up for that."""
    ideal = sum(holder.speed for holder in holders) / num_blocks
    return swarm_throughput(num_blocks, holders) >= quality * ideal or can_give(
        num_blocks, holders, _ENOUGH * ideal
    )


def consider_move(
    num_blocks: int,
    holders: Sequence[Holder],
    me: Holder,
    *,
    quality: float,
    move_seconds: float,
    since_move: float,
    now_random: float,
) -> BlockRange | None:
    """Where `me` should move to, or None, which is the usual answer.

    `quality` is that of `is_well`; and a gain is worth a move if it is more than the rest of this
    server's share, or of what the blocks give after it. `move_seconds` is what a move costs in
    time: leaving, loading, and replays elsewhere. `now_random` is in [0, 1): of several that could
    move, the best does so at once, the r-th best with a chance of 1 in r, in case those before it
    cannot. Nobody leaves a block that no other server holds.
    """
    others = [holder for holder in holders if holder.peer_id != me.peer_id]
    before = capacities(num_blocks, [*others, me])
    lowest = min(before)
    if lowest > 0 and since_move < _REST_SECONDS:
        return None
    if is_well(num_blocks, (*others, me), quality):
        return None
    blocks = choose_span(num_blocks, others, len(me.blocks))
    after = capacities(num_blocks, [*others, replace(me, blocks=blocks)])
    changed = [b for b in range(num_blocks) if _holds(me.blocks, b) != _holds(blocks, b)]
    rarest = min((before[b] for b in changed), default=0.0)
    level = min((after[b] for b in changed), default=0.0)
    gain = level - rarest
    if rarest * quality > lowest:  # others are rarer: it would change nothing for the swarm
        return None
    if gain <= (1 - quality) * min(me.share, level):
        return None
    lost = move_seconds * min(me.share, lowest)  # what it cannot give meanwhile
    if gain * _STAY_SECONDS <= lost:
        return None
    if now_random * (1 + _better_movers(before, others, me)) >= 1:
        return None
    return blocks


def _better_movers(capacity: Sequence[float], others: Iterable[Holder], me: Holder) -> int:
    """How many others should rather move: those whose blocks can do without them more easily."""
    lowest = min(capacity)

    def fitness(holder: Holder) -> tuple[float, int]:
        left = min(capacity[holder.blocks.start : holder.blocks.end], default=0.0) - holder.share
        return min(left, lowest + holder.share), _lot(holder)

    mine = fitness(me)
    return sum(fitness(other) > mine for other in others)


def _holds(blocks: BlockRange, block: int) -> bool:
    return blocks.start <= block < blocks.end


def _lot(holder: Holder) -> int:
    return crc32(holder.peer_id.encode())


def check_fit(count: int, *, block_bytes: int, free_bytes: int) -> None:
    """Raises UsageError if the weights of `count` blocks are more than all that is free."""
    if count * block_bytes > free_bytes:
        raise UsageError(
            f"{count} blocks need {count * block_bytes / 2**30:.1f} GiB and "
            f"{free_bytes / 2**30:.1f} are free: serve fewer with --num-blocks"
        )


def fitting_blocks(num_blocks: int, *, block_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """How many of `num_blocks` a device with `free_bytes` holds comfortably.

    `block_bytes` are one block's weights and `cache_bytes` one block's share of the KV budget.
    Raises UsageError if not even one fits.
    """
    count = int(free_bytes * _MEMORY_SHARE) // (block_bytes + cache_bytes)
    if count < 1:
        needed = (block_bytes + cache_bytes) / _MEMORY_SHARE / 2**30
        raise UsageError(
            f"one block needs {needed:.1f} GiB free and there are {free_bytes / 2**30:.1f}: "
            "free some memory, or lower --kv-memory"
        )
    return min(count, num_blocks)
