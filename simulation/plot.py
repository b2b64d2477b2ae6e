"""Throughput over time, step times and moves of each set of rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt

from simulation.measure import Measure
from simulation.world import Scenario


def draw(scenario: Scenario, measures: Mapping[str, Measure], path: Path) -> None:
    """The suffix of `path` says in which format."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for name, measure in measures.items():
        _throughput(left, name, measure)
        _steps(middle, name, measure)
        hours = [(move - scenario.warmup) / 3600 for move in measure.moves]
        counted = sorted(hour for hour in hours if hour > 0)
        moves = [(place + 1) / scenario.servers for place in range(len(counted))]
        right.step([0, *counted], [0, *moves], where="post", label=name)
    left.set(xlabel="hours", ylabel="throughput / bound", ylim=(0, 1.02))
    middle.set(xscale="log", xlabel="seconds of a step", ylabel="share of steps that take longer")
    middle.set(yscale="log", ylim=(1e-4, 1), xlim=(0.05, 100))
    right.set(xlabel="hours", ylabel="moves per server, summed up")
    for axes in (left, middle, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{scenario.servers:,} servers, {scenario.clients:,} clients")
    figure.savefig(path)
    plt.close(figure)


def _throughput(axes: Any, name: str, measure: Measure) -> None:
    begin = measure.begin
    hours = [(audit.time - begin) / 3600 for audit in measure.audits]
    axes.plot(hours, [audit.whole / audit.ready for audit in measure.audits], label=name)


def _steps(axes: Any, name: str, measure: Measure) -> None:
    histogram = measure.all_steps
    total = max(histogram.counts.sum(), 1)
    axes.plot(histogram.edges, 1 - histogram.counts.cumsum() / total, label=name)
