"""What libraries keep for later: bounded, or given back to the system.

Streams come and go between what stays, and leave holes: 16,000 visits by strangers cost 20 MiB,
none of which was in use, and which malloc itself gives back at the end of its heap only.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_WORTH_IT = 4 << 20  # bytes: it takes some ms, in which malloc keeps others waiting
# oneDNN compiles each product of matrices for its shape and keeps that, and so does torch's bridge
# to it: 1,024 each, by default, and half a MB for a prompt's. With as many as this, passes of 1 to
# 24 rows by turns take as long as with all.
_PRODUCTS = "128"


class _Counts(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def bound_products() -> None:
    """Before torch computes anything: both libraries look once. Whoever runs us may know better."""
    for limit in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(limit, _PRODUCTS)


def give_back(worth: int = _WORTH_IT) -> bool:
    """Whether there were as many free bytes. Elsewhere than with glibc never."""
    with suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Counts
        if libc.mallinfo2().fordblks >= worth:
            libc.malloc_trim(0)
            return True
    return False
