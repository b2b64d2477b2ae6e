"""Memory that is gathered into huge pages is what it was; and where there are none, nothing is."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from swarm.server import hugepages

MIB = 1 << 20


def gathered() -> int:
    """MiB of this process in huge pages, or 0 where nobody counts them."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("AnonHugePages"))


def has_collapse() -> bool:
    release = platform.release().split(".")
    return sys.platform == "linux" and (int(release[0]), int(release[1])) >= (6, 1)


def test_full_pages_are_gathered_and_hold_what_they_held() -> None:
    held = bytearray(i % 251 for i in range(251)) * (64 * MIB // 251)
    before = bytes(held)
    moved = hugepages.gather()
    assert held == before
    if has_collapse():
        assert moved >= 24
        assert gathered() >= 48
    else:
        assert moved == 0


def test_what_is_nearly_empty_stays_as_it_is() -> None:
    """Or it would cost memory."""
    import mmap

    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as sparse:
        for at in range(0, 64 * MIB, MIB):
            sparse[at] = 1
        hugepages.gather()
        before = gathered()
        hugepages.gather()
        assert gathered() <= before + 2
        assert sum(sparse[at] for at in range(0, 64 * MIB, MIB)) == 64


def test_systems_without_them_are_served_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: object, **options: object) -> object:
        raise OSError("no such library")

    monkeypatch.setattr(hugepages.ctypes, "CDLL", nothing)
    assert hugepages.gather() == 0
