"""Rows of figures: medians, quartiles, what issue 3 asked for, and the table of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_HEAD = ("", "", "median", "quartile 1", "quartile 3", "min", "max", "target", "")


class NoFigure(Exception):
    """Why a suite cannot give one."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a median must not exceed, or must reach if `at_least`."""

    value: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.value:g}"


def at_most(value: float) -> Target:
    return Target(value)


def at_least(value: float) -> Target:
    return Target(value, at_least=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: all its measurements, in the order in which they were made; none: not built."""

    suite: str
    name: str
    unit: str
    values: tuple[float, ...]
    target: Target | None = None

    @property
    def median(self) -> float:
        return quartiles(self.values)[1] if self.values else math.nan

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        if not self.values:
            return "not measured"
        return "reached" if self.target.reached(self.median) else "NOT reached"

    @property
    def cells(self) -> tuple[str, ...]:
        figures = [""] * 5
        if self.values:
            low, middle, high = quartiles(self.values)
            numbers = (middle, low, high, min(self.values), max(self.values))
            figures = [f"{number:,.2f}" for number in numbers]
        return (self.name, self.unit, *figures, str(self.target or ""), self.verdict)

    def summary(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        more: dict[str, Any] = {"verdict": self.verdict}
        if self.values:
            low, middle, high = quartiles(self.values)
            more |= {"median": middle, "quartiles": [low, high]}
            more["range"] = [min(self.values), max(self.values)]
        return asdict(self) | more


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, the median and the third of at least one value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that `percent` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Run by run, so that what slowed both down at a time cancels out."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def table(rows: Sequence[Row]) -> str:
    """Aligned text, a blank line between suites."""
    lines = [_HEAD, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed: list[str] = []
    for index, (name, unit, *cells) in enumerate(lines):
        if index and rows[index - 1].suite != (rows[index - 2].suite if index > 1 else ""):
            printed += ["", f"{rows[index - 1].suite}:"]
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True)]
        numbers[-1] = cells[-1]
        begin = [name.ljust(widths[0]), unit.ljust(widths[1])]
        printed.append("  ".join([*begin, *numbers]).rstrip())
    return "\n".join(printed)


def write_json(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Every single measurement, and what they depend on."""
    results = {"about": dict(about), "rows": [row.summary() for row in rows]}
    path.write_text(json.dumps(results, indent=1) + "\n")
