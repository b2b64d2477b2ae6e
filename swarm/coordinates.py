"""Where a peer is in a space whose distances are round-trip times, so that few need be measured.

The space is Vivaldi's (Dabek et al., SIGCOMM 2004): three dimensions, and a height for the line by
which a machine hangs on to it. Peers find their places by damped Gauss-Newton steps instead of
springs, as all RTTs that one has measured are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import dist, isfinite
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

Coordinates = tuple[float, float, float, float]
"""x, y, z and height, in seconds."""
Packed = tuple[int, int, int, int]
"""The same in tenths of a millisecond, for records."""

MAX_PACKED = 32_767
_UNIT = 1e-4  # seconds
_STEP = 0.7  # of what would fit best: others move at the same time
_FIRM = 0.1  # of the mean curvature is added, so that few RTTs move nobody far
_OUTLIER = 0.3  # relative errors beyond this weigh by their size, not its square: some lie
_NEAREST = 1e-4  # seconds; nothing is nearer, and two peers in one place must have a direction
_STEPS, _FIRST_STEPS = 3, 10


class Rng(Protocol):
    """A `random.Random`."""

    def random(self) -> float: ...


def locate(
    known: Sequence[tuple[Coordinates, float]], present: Coordinates | None
) -> Coordinates | None:
    """Where somebody is whose RTTs to others are `known`, if that was `present` (None: unknown)."""
    if not known:
        return present
    others = np.array([place for place, _ in known])
    rtts = np.maximum([rtt for _, rtt in known], _NEAREST)
    steps = _STEPS
    if present is None:  # in the middle, where few can put us by lies
        steps = _FIRST_STEPS
    place = np.median(others, axis=0) if present is None else np.array(present)
    place += _NEAREST
    for _ in range(steps):
        place = place + _STEP * _step(others, rtts, place)
        place[3] = max(place[3], 0.0)
    return cast(Coordinates, tuple(place.tolist()))


def _step(
    others: NDArray[np.float64], rtts: NDArray[np.float64], place: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Towards the least weighted squares of relative errors, from the slopes at `place`."""
    away = place[:3] - others[:, :3]
    distance = np.sqrt((away * away).sum(1)) + _NEAREST
    told = distance + others[:, 3] + place[3]
    missing, scale = rtts - told, np.maximum(rtts, told)
    weights = 1 / (scale * np.maximum(np.abs(missing), _OUTLIER * scale))
    slopes = np.concatenate([away / distance[:, None], np.ones((len(rtts), 1))], axis=1)
    weighted = slopes * weights[:, None]
    curvature = weighted.T @ slopes
    curvature += np.eye(4) * (_FIRM * np.trace(curvature) / 4)
    return np.linalg.solve(curvature, weighted.T @ missing)


def distance(one: Coordinates, other: Coordinates) -> float:
    """Seconds there and back."""
    return dist(one[:3], other[:3]) + one[3] + other[3]


def somewhere(rng: Rng) -> Coordinates:
    """For one of the first, who find nobody that has a place."""
    x, y, z = (1e-3 * (2 * rng.random() - 1) for _ in range(3))
    return x, y, z, 5e-3


def pack(place: Coordinates) -> Packed:
    return cast(
        Packed,
        tuple(
            round(max(-MAX_PACKED, min(MAX_PACKED, value / _UNIT))) if isfinite(value) else 0
            for value in place
        ),
    )


def unpack(packed: Packed) -> Coordinates:
    x, y, z, height = packed
    return _UNIT * x, _UNIT * y, _UNIT * z, _UNIT * max(0, height)


def unpack_all(packed: Sequence[Packed | None]) -> NDArray[np.float64]:
    """[peers, 4]; nan where nothing is said."""
    nowhere = (np.nan,) * 4
    return _UNIT * np.array([each or nowhere for each in packed], np.float64).reshape(-1, 4)
