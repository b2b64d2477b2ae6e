"""What malloc keeps is given back, and what is in use stays."""

from __future__ import annotations

import ctypes

import psutil
import pytest

from swarm.server import heap

MIB = 1 << 20


def has_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def test_holes_in_the_heap_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 60_000, 1024  # 60 MB, each piece too small to be taken from the system by itself
    pieces = [libc.malloc(size) for _ in range(count)]
    for piece in pieces:
        ctypes.memset(piece, 7, size)
    for index, piece in enumerate(pieces):
        if index % 8:
            libc.free(piece)
    before = psutil.Process().memory_info().rss
    assert heap.give_back(MIB) == has_glibc()
    after = psutil.Process().memory_info().rss
    kept = pieces[::8]
    assert all(ctypes.string_at(piece, size) == b"\x07" * size for piece in kept)
    for piece in kept:
        libc.free(piece)
    if has_glibc():
        assert before - after > 20 * MIB


def test_a_little_is_left_alone() -> None:
    assert not heap.give_back(1 << 40)


def test_other_libraries_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())  # pyright: ignore
    assert not heap.give_back(0)
