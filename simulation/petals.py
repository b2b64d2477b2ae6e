"""The rules that Petals publishes, for comparison: written anew from papers and constants.

Placement (https://arxiv.org/abs/2312.08361, appendix D): the window of blocks whose sorted
throughputs are lexicographically least; a server moves if all servers' greedy moves together would
bring the swarm from less than 0.75 of its throughput. Routing: least sum of 18 ms per server, half
the round-trip time (0.15 s where it was never measured), 1 / speed per block, and 10 s where the
cache is full; each server is used to its end. Clients measure three random holders of middle
blocks and three of the last one each minute, servers five possible next ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from simulation.rules import Leg, Server, Stage, Wanted
from simulation.world import TOKEN_BYTES, Bools, Floats, Ints, Machine
from swarm.dht.records import ServerState
from swarm.errors import NoRoute
from swarm.types import BlockRange

BALANCE_QUALITY = 0.75
HOP_SECONDS = 0.018
UNKNOWN_DELAY = 0.15
FULL_DELAY = 10.0
FIRST_BAN = 15.0  # seconds; doubled with each failure in a row
CHECK_PERIOD = 120.0  # mean seconds
LIFETIME = 120.0  # seconds that an announcement stays: twice its period
_ALMOST = 1e-3  # of a server's throughput: among equal places the present one is best
_CLIENT_PINGS, _SERVER_PINGS = 3, 5
_JUDGED_EVERY = 30.0  # seconds
_MOST_ROUNDS = 10  # of everybody moving, until nobody wants to; it rarely takes more than three


@dataclass(slots=True)
class Entry:
    """What one server has announced."""

    index: int
    blocks: BlockRange
    throughput: float  # tokens per second through its whole span
    speed: float  # blocks per second
    online: bool
    free_tokens: int
    next_rtts: dict[int, float]
    since: float


@dataclass(slots=True)
class Picture:
    """All announcements, in arrays beside each other; what is derived is derived once."""

    entries: list[Entry]
    num_blocks: int
    at: dict[int, int] = field(init=False)  # server: place in the arrays
    start: Ints = field(init=False)
    end: Ints = field(init=False)
    step: Floats = field(init=False)  # seconds per block
    free: Ints = field(init=False)
    online: Bools = field(init=False)
    source: Ints = field(init=False)  # of each link that was measured
    target: Ints = field(init=False)
    link: Floats = field(init=False)  # seconds one way
    links: dict[int, Ints] = field(default_factory=dict[int, Ints])
    total: Floats | None = None

    def __post_init__(self) -> None:
        entries = self.entries
        self.at = {entry.index: place for place, entry in enumerate(entries)}
        self.start = np.array([entry.blocks.start for entry in entries], np.intp)
        self.end = np.array([entry.blocks.end for entry in entries], np.intp)
        self.step = np.array([1 / entry.speed for entry in entries])
        self.free = np.array([entry.free_tokens for entry in entries], np.intp)
        self.online = np.array([entry.online for entry in entries], bool)
        found = [
            (place, self.at[other], rtt / 2)
            for place, entry in enumerate(entries)
            for other, rtt in entry.next_rtts.items()
            if other in self.at
        ]
        table = np.array(found, float).reshape(-1, 3)
        self.source, self.target = table[:, 0].astype(np.intp), table[:, 1].astype(np.intp)
        self.link = table[:, 2]

    def throughputs(self) -> Floats:
        """Of each block, by the servers that hold it or are about to."""
        if self.total is None:
            self.total = np.zeros(self.num_blocks)
            for entry in self.entries:
                self.total[entry.blocks.start : entry.blocks.end] += entry.throughput
        return self.total.copy()

    def links_at(self, border: int) -> Ints:
        """The links that were measured between servers that end there and possible next ones."""
        if border not in self.links:
            fits = (self.end[self.source] == border) & (self.start[self.target] <= border)
            self.links[border] = np.flatnonzero(fits & (self.end[self.target] > border))
        return self.links[border]


def best_start(throughputs: Floats, length: int) -> int:
    """The first window whose sorted throughputs come first in the dictionary."""
    weakest = np.flatnonzero(throughputs == throughputs.min())  # one is in the window that we want
    low = max(0, int(weakest[0]) - length + 1)
    high = min(len(throughputs) - length, int(weakest[-1]))
    windows = np.sort(sliding_window_view(throughputs[low : high + length], length), axis=1)
    return low + int(np.lexsort(windows.T[::-1])[0])


def balance_quality(picture: Picture, rng: random.Random) -> float:
    """Present throughput over what it would be when nobody gains by moving any more."""
    throughputs = picture.throughputs()
    present = float(throughputs.min())
    work = sum(entry.throughput * len(entry.blocks) for entry in picture.entries)
    if present >= BALANCE_QUALITY * work / picture.num_blocks:
        return 1.0  # no placement could be so much better
    starts = [entry.blocks.start for entry in picture.entries]
    for _ in range(_MOST_ROUNDS):
        moved = False
        for place in rng.sample(range(len(starts)), len(starts)):
            entry = picture.entries[place]
            size, old = len(entry.blocks), starts[place]
            throughputs[old : old + size] -= entry.throughput * (1 + _ALMOST)
            new = best_start(throughputs, size)
            throughputs[old : old + size] += entry.throughput * _ALMOST
            throughputs[new : new + size] += entry.throughput
            starts[place] = new
            moved |= new != old
        if not moved:
            break
    reached = float(throughputs.min())
    return present / reached if reached > max(present, _ALMOST) else 1.0


def shortest(
    picture: Picture, wanted: Wanted, rtts: dict[int, float], banned: set[int]
) -> list[Leg]:
    """Sweep over the borders between blocks; servers are used from where they are entered."""
    usable = picture.online.copy()
    for index in banned & picture.at.keys():
        usable[picture.at[index]] = False
    first, last = wanted.blocks.start, wanted.blocks.end
    ends = np.minimum(picture.end, last)
    half = np.full(len(usable), UNKNOWN_DELAY)
    for index in rtts.keys() & picture.at.keys():
        half[picture.at[index]] = rtts[index] / 2
    toll = HOP_SECONDS + np.where(picture.free < wanted.positions, FULL_DELAY, 0.0)
    cost = np.full(len(usable), np.inf)  # until it has done its blocks
    entered = np.full(len(usable), -1)
    before = np.full(len(usable), -1)
    for border in range(first, last):
        here = np.flatnonzero(usable & (picture.start <= border) & (ends > border))
        if border == first:
            arrival, came = half[here], np.full(len(here), -1, np.intp)
        else:
            done = np.flatnonzero((ends == border) & (cost < np.inf))
            if not len(done) or not len(here):
                continue
            arrival, came = _from(picture, border, int(done[cost[done].argmin()]), cost)
            arrival, came = arrival[here], came[here]
        total = arrival + toll[here] + picture.step[here] * (ends[here] - border)
        better = total < cost[here]
        chosen = here[better]
        cost[chosen], entered[chosen], before[chosen] = total[better], border, came[better]
    final = np.flatnonzero((ends == last) & (cost < np.inf) & usable)
    if not len(final):
        raise NoRoute(f"no servers hold all of {wanted.blocks}")
    place = int(final[(cost + half)[final].argmin()])
    legs: list[Leg] = []
    while place >= 0:
        legs.append(
            (picture.entries[place].index, BlockRange(int(entered[place]), int(ends[place])))
        )
        place = int(before[place])
    return legs[::-1]


def _from(picture: Picture, border: int, first: int, cost: Floats) -> tuple[Floats, Ints]:
    """For each server the best way there: seconds, and over which server. `first` is done first."""
    arrival = np.full(len(cost), cost[first] + UNKNOWN_DELAY)
    came = np.full(len(cost), first, np.intp)
    links = picture.links_at(border)
    source, target = picture.source[links], picture.target[links]
    ways = cost[source] + picture.link[links]
    won = np.flatnonzero(ways < arrival[target])
    won = won[np.argsort(-ways[won])]  # of several to one server the last one counts
    arrival[target[won]], came[target[won]] = ways[won], source[won]
    return arrival, came


def throughput(machine: Machine, blocks: int) -> float:
    """Tokens per second through so many blocks; the network may be the least."""
    return min(machine.speed / blocks, machine.up / TOKEN_BYTES)


class Client:
    """Its pings, its bans, and routes by them."""

    def __init__(self, rules: PetalsRules, client: int) -> None:
        self._rules, self._client = rules, client
        self._rng = random.Random(f"petals {client}")
        self._rtts: dict[int, float] = {}
        self._failures: dict[int, int] = {}
        self._banned: dict[int, float] = {}
        self._seen: Picture | None = None
        self._removed: set[int] = set()  # who failed since that look

    def route(self, picture: Picture, wanted: Wanted, now: float) -> Sequence[Leg]:
        new = picture is not self._seen
        if new:
            self._seen, self._removed = picture, set()
        banned = {index for index, until in self._banned.items() if now < until}
        try:
            return shortest(picture, wanted, self._rtts, banned | self._removed)
        except NoRoute:
            if not new:
                raise  # and look again
            return shortest(picture, wanted, self._rtts, set())  # when all are banned, nobody is

    def better(
        self, picture: Picture, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[Leg] | None:
        return None  # routes stay until a server fails

    def expect(
        self, picture: Picture, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[float] | None:
        return None

    def look(self, picture: Picture, now: float) -> None:
        """Pings a few; the holders of the first block only if they hold another one as well."""
        online = np.flatnonzero(picture.online)
        if not len(online):
            return
        last = picture.num_blocks - 1
        inner = np.minimum(picture.end, last) - np.maximum(picture.start, 1)
        weights: list[float] = inner[online].clip(0).tolist()
        middle = self._rng.choices(list(online), weights, k=_CLIENT_PINGS) if any(weights) else []
        ending = online[picture.end[online] == last + 1]
        some = self._rng.sample(list(ending), min(_CLIENT_PINGS, len(ending)))
        for place in {*middle, *some}:
            index = picture.entries[place].index
            self._rtts[index] = self._rules.client_rtt(self._client, index)

    def failed(self, server: Server, now: float) -> None:
        count = self._failures.get(server.index, 0)
        self._failures[server.index] = count + 1
        self._banned[server.index] = now + FIRST_BAN * 2.0 ** min(count, 30)
        self._removed.add(server.index)

    def busy(self, server: Server, now: float) -> None:
        self.failed(server, now)

    def opened(self, server: Server, rtt: float) -> None:
        self._failures.pop(server.index, None)

    def worked(self, server: Server, blocks: int, now: float) -> None: ...


class PetalsRules:
    """Servers announce each minute, and look each two minutes whether to move."""

    name = "petals"
    fetches_first = False
    look_period = 60.0
    announce_period = 60.0

    def __init__(self, stage: Stage) -> None:
        self._num_blocks = stage.scenario.num_blocks
        self._server_rtt, self.client_rtt = stage.server_rtt, stage.client_rtt
        self._rng = random.Random(f"petals {stage.scenario.seed}")
        self._entries: dict[int, Entry] = {}
        self._last: Picture | None = None
        self._quality, self._judged = 1.0, -math.inf

    def announce(self, server: Server, now: float) -> None:
        if not server.alive:
            self._entries.pop(server.index, None)
            return
        machine, blocks = server.machine, server.blocks
        known = self._entries.get(server.index)
        pinged = known.next_rtts if known is not None and known.blocks == blocks else {}
        self._entries[server.index] = Entry(
            server.index,
            blocks,
            throughput(machine, len(blocks)),
            machine.speed,
            server.state is ServerState.ONLINE,
            server.free_tokens,
            pinged | self._ping(server),
            now,
        )

    def _ping(self, server: Server) -> dict[int, float]:
        if self._last is None or server.blocks.end == self._num_blocks:
            return {}
        end, last = server.blocks.end, self._last
        following = np.flatnonzero(last.online & (last.start <= end) & (last.end > end))
        count = min(_SERVER_PINGS, len(following))
        chosen = self._rng.sample(range(len(following)), count)
        others = (last.entries[following[place]].index for place in chosen)
        return {other: self._server_rtt(server.index, other) for other in others}

    def picture(self, now: float) -> Picture:
        for index in [i for i, entry in self._entries.items() if now > entry.since + LIFETIME]:
            del self._entries[index]
        self._last = Picture(list(self._entries.values()), self._num_blocks)
        return self._last

    def settle(self, machines: Sequence[Machine]) -> list[BlockRange]:
        throughputs = np.zeros(self._num_blocks)
        spans: list[BlockRange] = []
        for machine in machines:
            start = best_start(throughputs, machine.blocks)
            spans.append(BlockRange(start, start + machine.blocks))
            throughputs[start : start + machine.blocks] += throughput(machine, machine.blocks)
        return spans

    def choose(self, server: Server, picture: Picture) -> BlockRange:
        size = server.machine.blocks
        start = best_start(picture.throughputs(), size)
        return BlockRange(start, start + size)

    def next_check(self, random: float) -> float:
        return 2 * CHECK_PERIOD * random

    def tend(self, server: Server, picture: Picture, random: float) -> float:
        return math.inf  # it pings when it announces

    def confirm(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        return self.consider(server, picture, now)

    def consider(self, server: Server, picture: Picture, now: float) -> BlockRange | None:
        """Where to go, if that pays. Everybody's moves are worked out for all who ask at a time."""
        place = picture.at.get(server.index)
        if place is None:
            return None
        entry, size = picture.entries[place], len(server.blocks)
        if now > self._judged + _JUDGED_EVERY:
            self._quality, self._judged = balance_quality(picture, self._rng), now
        if self._quality >= BALANCE_QUALITY - _ALMOST:
            return None
        throughputs = picture.throughputs()
        present = throughputs.min()
        throughputs[entry.blocks.start : entry.blocks.end] -= entry.throughput * (1 + _ALMOST)
        if present > _ALMOST and throughputs.min() <= 0:
            return None  # that would leave a hole
        start = best_start(throughputs, size)
        return None if start == entry.blocks.start else BlockRange(start, start + size)

    def memory(self, client: int) -> Client:
        return Client(self, client)
