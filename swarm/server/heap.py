"""Memory that malloc keeps though nobody uses it goes back to the system.

Streams come and go between what stays, and leave holes: 16,000 visits by strangers cost 20 MiB,
none of which was in use, and which malloc itself gives back at the end of its heap only.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_WORTH_IT = 4 << 20  # bytes: it takes some ms, in which malloc keeps others waiting


class _Counts(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def give_back(worth: int = _WORTH_IT) -> bool:
    """Whether there were as many free bytes. Elsewhere than with glibc never."""
    with suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Counts
        if libc.mallinfo2().fordblks >= worth:
            libc.malloc_trim(0)
            return True
    return False
