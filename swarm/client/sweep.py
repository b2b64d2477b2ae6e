"""The least costly chain of servers: one sweep over the borders, over all servers at once.

A hop may use any part of a server's blocks and its time is linear in their number, so the border
between two hops can be moved, without loss, until it meets the end of the first server or the start
of the second: only those borders need to be looked at. The result is exact.
"""

from __future__ import annotations

import numpy as np

from swarm.client.pricing import Places, Prices
from swarm.types import BlockRange

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
        self._extra = prices.extra[prices.holders.links.link]
        # Links that take longer than by way of the client.
        self._worse = (prices.extra > 0) & np.isfinite(prices.extra)

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
            costs, before = self._entries(border, best, fee)
            self._cost[ending] = np.inf
            better = (costs < self._cost).nonzero()[0]
            self._cost[better] = costs[better]
            self._entry[better] = self._count * index + before[better]
        return self._trace(len(self._borders) - 1, best)

    def _entries(self, border: int, best: int, fee: np.ndarray) -> tuple[np.ndarray, Places]:
        """What it takes to be in each server when it is entered here, and whom to come from."""
        cost, links = self._cost, self._holders.links
        costs, before = fee + cost[best], np.full(self._count, best)
        leaving = links.leaving(best)
        for target in links.target[leaving][self._worse[leaving]].tolist():
            if fee[target] < np.inf:  # the way that it was taken to have is not there
                others = cost.copy()
                to_it = links.leading_to(target)
                others[links.source[to_it][self._worse[to_it]]] = np.inf
                before[target] = others.argmin()
                costs[target] = others[before[target]] + fee[target]
        here = links.at(border)
        source, target = links.sources[here], links.targets[here]
        linked = cost[source] + self._extra[here] + fee[target]
        won = (linked < costs[target]).nonzero()[0]
        if len(won):
            won = won[np.argsort(-linked[won])]  # of several for one server, the last one counts
            costs[target[won]], before[target[won]] = linked[won], source[won]
        return costs, before

    def _trace(self, index: int, place: int) -> Chain:
        chain: Chain = []
        while index:
            entered, before = divmod(int(self._past[index][place]), self._count)
            chain.append((place, BlockRange(self._borders[entered], self._borders[index])))
            index, place = entered, before
        return chain[::-1]
