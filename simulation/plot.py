"""Throughput over time, step times and moves of each set of rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt

from simulation.run import Curves


def draw(title: str, rules: Mapping[str, Curves], path: Path) -> None:
    """The suffix of `path` says in which format."""
    mpl.rcParams["svg.hashsalt"] = "swarm"  # so that the same figures give the same file
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, curves in rules.items():
        left.plot(*zip(*curves["throughput"], strict=True), label=name)
        middle.plot(*zip(*curves["steps"], strict=True), label=name)
        right.step(*zip(*curves["moves"], strict=True), where="post", label=name)
    left.set(xlabel="minutes", ylabel="throughput / bound", ylim=(0, 1.02))
    middle.set(xscale="log", yscale="log", xlim=(0.05, 100), ylim=(1e-4, 1))
    middle.set(xlabel="seconds of a step", ylabel="share of steps that take longer")
    right.set(xlabel="minutes", ylabel="moves per server, summed up")
    for axes in (left, middle, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
