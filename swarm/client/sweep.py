"""The least costly chain of servers: one sweep over the borders, over all servers at once.

A hop may use any part of a server's blocks and its time is linear in their number, so the border
between two hops can be moved, without loss, until it meets the end of the first server or the start
of the second: only those borders need to be looked at. At each of them the `_SOURCES` least costly
chains so far are gone on from, which is all of them in small swarms; so there the result is exact.
"""

from __future__ import annotations

import numpy as np

from swarm.client.pricing import Floats, Places, Prices
from swarm.types import BlockRange

_SOURCES = 8

Chain = list[tuple[int, BlockRange]]
"""Places of servers, and what of their blocks."""


def cheapest(prices: Prices, blocks: BlockRange) -> Chain:
    """Covers `blocks`, every one of which somebody must hold and be usable."""
    return _Sweep(prices, blocks).run()


class _Sweep:
    """At each border, `cost` is the least that it takes to be in a server, which was then entered
    at the border and after the server that `entry` tells (`count * index + place`)."""

    def __init__(self, prices: Prices, blocks: BlockRange) -> None:
        self._prices, self._holders, self._blocks = prices, prices.holders, blocks
        inside = [b for b in self._holders.borders if blocks.start < b < blocks.end]
        self._borders = [blocks.start, *inside, blocks.end]
        self._count = len(prices.fixed)
        self._cost = np.full(self._count, np.inf)
        self._entry = np.zeros(self._count, np.int64)
        self._past: list[Places] = []  # `entry` when a border was reached

    def run(self) -> Chain:
        holders, prices, start = self._holders, self._prices, self._blocks.start
        fixed = np.where(prices.usable, prices.fixed, np.inf)
        fee = np.where((holders.start <= start) & (start < holders.end), fixed, np.inf)
        self._cost[:] = fee  # `entry` is 0: at the first border
        self._past.append(self._entry)
        best = 0
        for index, border in enumerate(self._borders[1:], 1):
            self._cost += prices.per_block * (border - self._borders[index - 1])
            self._past.append(self._entry.copy())
            best = int(self._cost.argmin())
            if border == self._blocks.end:
                break
            starting, ending = holders.starting[border], holders.ending[border]
            fee[starting] = fixed[starting]
            fee[ending] = np.inf
            targets = (fee < np.inf).nonzero()[0]
            costs, before = self._entries(targets, fee)
            self._cost[ending] = np.inf
            better = (costs < self._cost[targets]).nonzero()[0]
            self._cost[targets[better]] = costs[better]
            self._entry[targets[better]] = self._count * index + before[better]
        return self._trace(len(self._borders) - 1, best)

    def _entries(self, targets: Places, fee: Floats) -> tuple[Floats, Places]:
        """What it takes to be in each of these when it is entered here, and whom to come from."""
        sources = self._cost.argpartition(min(_SOURCES, self._count) - 1)[:_SOURCES]
        costs = self._prices.extras(sources, targets) + self._cost[sources][:, None]
        before = costs.argmin(0)
        return costs[before, np.arange(len(targets))] + fee[targets], sources[before]

    def _trace(self, index: int, place: int) -> Chain:
        chain: Chain = []
        while index:
            entered, before = divmod(int(self._past[index][place]), self._count)
            chain.append((place, BlockRange(self._borders[entered], self._borders[index])))
            index, place = entered, before
        return chain[::-1]
