"""Draws the rows: how far each target was reached, and tokens per second by number of sessions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt

from benchmarks.figures import Row, quartiles

REACHED, MISSED = "tab:green", "tab:red"


def draw(rows: Sequence[Row], path: Path) -> None:
    """The suffix of `path` says in which format."""
    judged = [row for row in rows if row.target and row.values]
    size = (15, max(4, 1 + 0.35 * len(judged)))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=size, width_ratios=(3, 2), layout="constrained"
    )
    _targets(left, judged)
    _sessions(right, rows)
    figure.savefig(path)
    plt.close(figure)


def _targets(axes: Any, rows: Sequence[Row]) -> None:
    """Right of 1 is better than asked for, by that factor."""
    for place, row in enumerate(rows):
        low, middle, high = (_share(row, value) for value in quartiles(row.values))
        colour = REACHED if middle >= 1 else MISSED
        axes.barh(place, middle, color=colour, alpha=0.6)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
    names = [f"{row.name}: {row.median:,.2f} {row.unit} ({row.target})" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("how many times better than the target (median; line: quartiles)")


def _share(row: Row, value: float) -> float:
    assert row.target is not None
    target = row.target.value
    if row.target.at_least:
        return value / target
    return target / value if value > target / 4 else 4.0  # also for 0 and below


def _sessions(axes: Any, rows: Sequence[Row]) -> None:
    """Tokens per second over one local stream of the same model."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        found = re.fullmatch(r"(\w+), (\d+) from (\w+) / one local", row.name)
        if found and row.values:
            lines.setdefault(f"{found[1]}, {found[3]}", {})[int(found[2])] = row.median
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xlabel("sessions at once")
    axes.set_ylabel("tokens/s of all, over one local stream")
    if lines:
        axes.legend()
