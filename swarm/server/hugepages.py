"""Memory in huge pages, so that the kernel is done with a killed server at once.

A process that is killed closes its connections only after its memory was given back, page by page:
0.1 ms for each MB, in which its clients wait for it in vain (docs/failover.md). Linux only.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_HUGE = 2 << 20  # bytes, on x86-64 and on ARM with pages of 4 KB
_SMALL = mmap.PAGESIZE
_DENSE = 7 / 8  # of a huge page that must be in use: the rest is memory that it costs
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1
_PRESENT = 1 << 63
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *(\[heap\])?$")


def gather() -> int:
    """Move what this process holds into huge pages, where they would be nearly full.

    Returns how many there were; 0 where the system has none. Takes some ms for each, during which
    no other thread can take memory from the system.
    """
    with suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        moved = sum(not madvise(at, _HUGE, _COLLAPSE) for at in list(_full_ones()))
        logger.debug("%d MiB are in huge pages", moved * _HUGE >> 20)
        return moved
    return 0


def _full_ones() -> Iterator[int]:
    """Where a huge page would be nearly full."""
    counted = _HUGE // _SMALL
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if (found := _ANONYMOUS.match(line)) is None:
                continue
            begin, end = int(found[1], 16), int(found[2], 16)
            for at in range(-(-begin // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
                pages.seek(at // _SMALL * 8)
                entries = memoryview(pages.read(counted * 8)).cast("Q")
                if sum(entry >= _PRESENT for entry in entries) >= _DENSE * counted:
                    yield at
