"""The least costly chain of servers: one sweep over the borders, over all servers at once.

A hop may use any part of a server's blocks and its time is linear in their number, so the border
between two hops can be moved, without loss, until it meets the end of the first server or the start
of the second: only those borders need to be looked at. At each of them the `_SOURCES` least costly
chains so far are gone on from, which is all of them in small swarms; so there the result is exact.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from swarm.client.pricing import Places, Prices
from swarm.types import BlockRange

_SOURCES = 8

Chain = list[tuple[int, BlockRange]]
"""Places of servers, and what of their blocks."""


def cheapest(prices: Prices, blocks: BlockRange) -> Chain:
    """Covers `blocks`, every one of which somebody must hold and be usable."""
    return _Sweep(prices, blocks).run()


class _Sweep:
    """At each border, `cost` is the least that it takes to be in a server that holds the block
    before it; the server was then entered at the border and after the server that `entry` tells
    (`count * index + place`)."""

    def __init__(self, prices: Prices, blocks: BlockRange) -> None:
        self._prices, self._holders = prices, prices.holders
        inside = [b for b in self._holders.borders if blocks.start < b < blocks.end]
        self._borders = [blocks.start, *inside, blocks.end]
        self._count = len(prices.fixed)
        self._fee = np.where(prices.usable, prices.fixed, np.inf)
        self._cost = np.full(self._count, np.inf)
        self._entry = np.zeros(self._count, np.int64)
        self._past: list[Places] = []  # `entry` when a border was reached

    def run(self) -> Chain:
        first, last = self._borders[0], self._borders[-1]
        here = self._holders.of_block(first)
        self._cost[here] = self._fee[here]  # `entry` is 0: at the first border
        for index, (start, border) in enumerate(pairwise(self._borders), 1):
            self._cost += self._prices.per_block * (border - start)
            self._past.append(self._entry.copy())
            if border < last:
                self._enter(index, border)
        ending = self._holders.of_block(last - 1)
        return self._trace(len(self._borders) - 1, int(ending[self._cost[ending].argmin()]))

    def _enter(self, index: int, border: int) -> None:
        """Go on from the least costly ones to all that are entered at less than before."""
        sources, targets = self._holders.of_block(border - 1), self._holders.of_block(border)
        costs = self._cost.take(sources)
        if len(sources) > _SOURCES:
            least = costs.argpartition(_SOURCES)[:_SOURCES]
            sources, costs = sources.take(least), costs.take(least)
        ways = self._prices.extras(sources, targets) + costs[:, None]
        cost = np.minimum.reduce(ways) + self._fee.take(targets)
        better = (cost < self._cost.take(targets)).nonzero()[0]
        if len(better):
            entered, source = targets.take(better), sources[ways[:, better].argmin(0)]
            self._cost[entered] = cost.take(better)
            self._entry[entered] = self._count * index + source

    def _trace(self, index: int, place: int) -> Chain:
        chain: Chain = []
        while index:
            entered, before = divmod(int(self._past[index - 1][place]), self._count)
            chain.append((place, BlockRange(self._borders[entered], self._borders[index])))
            index, place = entered, before
        return chain[::-1]
