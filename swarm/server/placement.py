"""Which blocks a new server should hold, when nobody says: those that the swarm has least of.

Pure: it knows counts and sizes, no network, no clock and no device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarm.errors import UsageError
from swarm.types import BlockRange

_MEMORY_SHARE = 0.7  # of what is free: activations, the allocator and other programs need some


def count_servers(num_blocks: int, spans: Iterable[BlockRange]) -> list[int]:
    """How many servers hold each block of a model with `num_blocks`."""
    counts = [0] * num_blocks
    for span in spans:
        for block in range(span.start, min(span.end, num_blocks)):
            counts[block] += 1
    return counts


def choose_blocks(coverage: Sequence[int], wanted: int) -> BlockRange:
    """The `wanted` consecutive blocks that fewest servers hold, the first such if there are ties.

    The rarest block of a window counts most, then the next rarest, as in Petals: a model is as fast
    as its rarest block (https://arxiv.org/abs/2209.01188, section 3.2).
    """
    wanted = min(wanted, len(coverage))
    starts = range(len(coverage) - wanted + 1)
    start = min(starts, key=lambda start: sorted(coverage[start : start + wanted]))
    return BlockRange(start, start + wanted)


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
