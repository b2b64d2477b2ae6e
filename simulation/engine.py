"""One history under one set of rules: events in a heap, and a tick that moves all sessions on."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable

import numpy as np

from simulation.load import Loads
from simulation.measure import Measure
from simulation.rules import Rules, Server, Stage
from simulation.world import START_SECONDS, Leaving, World, rtt
from swarm.dht.records import ServerState
from swarm.types import BlockRange

MakeRules = Callable[[Stage], Rules]
_ROUNDS, _LEAST_ROUNDS = 10, 3  # of tending, before it begins...
_TENDINGS = 20_000  # ...and of all together, about: in large swarms they take time
_SLOW = 30.0  # seconds for which servers that tend look at the same picture, to save time
_FIRST_TENDING = 10.0  # seconds in which those who are there already begin
SNAPSHOT = 5.0  # seconds, at least; clients' looks fall on these moments
_PER_SERVER = 0.001  # seconds: pictures of large swarms take long to make


class Clock:
    """What is to happen when. Events of equal time happen in the order they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._serial = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._serial), do))

    def run_until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = end


class Swarm:
    """Servers under `rules`: they join, load, announce, move and go. Sessions are not its concern,
    but for `on_lost(server, failed)`, by which it tells that those with this server are over."""

    def __init__(self, world: World, make: MakeRules, clock: Clock, measure: Measure) -> None:
        self.world, self.clock, self.measure = world, clock, measure
        scenario = world.scenario
        self.rules = make(Stage(scenario, self.server_rtt, self.client_rtt))
        self.servers = [Server(i, machine) for i, machine in enumerate(world.machines)]
        for server in self.servers:
            server.state = ServerState.OFFLINE
        self.loads = Loads(
            np.array([machine.block_seconds for machine in world.machines]),
            np.array([machine.up for machine in world.machines]),
        )
        self.on_lost: Callable[[Server, bool], None] = lambda server, failed: None
        self._rng = random.Random(f"swarm {scenario.seed}")
        self._slow: tuple[float, object] = (-math.inf, None)
        self._pictures: deque[tuple[float, object]] = deque()
        self._period = max(SNAPSHOT, _PER_SERVER * scenario.servers)
        self._keep = self.rules.look_period + 2 * self._period

    def server_rtt(self, one: int, other: int) -> float:
        return rtt(self.world.machines[one].place, self.world.machines[other].place)

    def client_rtt(self, client: int, server: int) -> float:
        return rtt(self.world.clients[client], self.world.machines[server].place)

    def begin(self) -> None:
        """Those that are there already chose their blocks one after the other."""
        first = [server for server in self.servers if server.machine.born == 0]
        spans = self.rules.settle([server.machine for server in first])
        for server, blocks in zip(first, spans, strict=True):
            self._take(server, blocks)
            self._serve(server)
            self.clock.at(server.machine.dies, lambda server=server: self._leave(server))
            self._plan_check(server)
            self._plan_announcement(server, self._rng.random() * self.rules.announce_period)
            self._plan_tending(server, self._rng.random() * _FIRST_TENDING)
        for server in self.servers[len(first) :]:
            self.clock.at(server.machine.born, lambda server=server: self._join(server))
        rounds = min(_ROUNDS, max(_LEAST_ROUNDS, _TENDINGS // len(first)))
        for _ in range(rounds):  # they have been there for hours, and know how far others are
            picture = self.rules.picture(0.0)
            for server in first:
                self.rules.tend(server, picture, self._rng.random())
            for server in first:
                self.rules.announce(server, 0.0)
        self._look()

    def picture(self, age: float = 0.0) -> object:
        """What somebody sees who looked `age` seconds ago."""
        for when, picture in reversed(self._pictures):
            if when <= self.clock.now - age:
                return picture
        return self._pictures[0][1]

    def fresh_picture(self) -> object:
        """For those who have reason to look again: a second old at most, in large swarms older."""
        if self.clock.now - self._pictures[-1][0] > self._period - SNAPSHOT + 1.0:
            self._pictures.append((self.clock.now, self.rules.picture(self.clock.now)))
        return self._pictures[-1][1]

    def _look(self) -> None:
        now = self.clock.now
        self._pictures.append((now, self.rules.picture(now)))
        while len(self._pictures) > 1 and self._pictures[1][0] <= now - self._keep:
            self._pictures.popleft()
        self.clock.at(now + self._period, self._look)

    def _join(self, server: Server) -> None:
        self.clock.at(server.machine.dies, lambda: self._leave(server))
        blocks = self.rules.choose(server, self.fresh_picture())
        self._load(server, blocks, server.machine.start_seconds(len(blocks)))
        self._plan_check(server)
        self._plan_announcement(server, self.rules.announce_period)
        self._plan_tending(server, 0.0)

    def _take(self, server: Server, blocks: BlockRange) -> None:
        server.blocks, server.moved = blocks, self.clock.now
        server.generation += 1
        self.loads.span[server.index] = len(blocks)

    def _load(self, server: Server, blocks: BlockRange, seconds: float) -> None:
        self._take(server, blocks)
        server.state = ServerState.JOINING
        self.announce(server)
        generation = server.generation

        def loaded() -> None:
            if server.alive and server.generation == generation:
                self._serve(server)

        self.clock.at(self.clock.now + seconds, loaded)

    def _serve(self, server: Server) -> None:
        server.state = ServerState.ONLINE
        self.announce(server)

    def announce(self, server: Server) -> None:
        self.feel(server)
        self.measure.count("announcements", self.clock.now)
        self.rules.announce(server, self.clock.now)

    def feel(self, server: Server) -> None:
        """What a server, or who has just used it, knows of its load."""
        index, loads = server.index, self.loads
        server.pass_seconds = float(loads.seconds[index])
        server.delay = float(loads.delay_of(index))
        server.queue = float(loads.rate[index]) * (loads.wait_of(index) + server.pass_seconds)
        server.uplink = server.machine.up * (1 - loads.link_use(index))

    def _plan_announcement(self, server: Server, wait: float) -> None:
        def again() -> None:
            if server.alive:
                self.announce(server)
                period = self.rules.announce_period
                self._plan_announcement(server, period * self._rng.uniform(0.8, 1.2))

        self.clock.at(self.clock.now + wait, again)

    def _plan_check(self, server: Server) -> None:
        wait = self.rules.next_check(self._rng.random())
        self.clock.at(self.clock.now + wait, lambda: self._check(server))

    def _plan_tending(self, server: Server, wait: float) -> None:
        def tend() -> None:
            if server.alive:
                if self._slow[0] < self.clock.now - _SLOW:
                    self._slow = self.clock.now, self.picture()
                self.feel(server)
                wait = self.rules.tend(server, self._slow[1], self._rng.random())
                self._plan_tending(server, wait)

        self.clock.at(self.clock.now + wait, tend)

    def _check(self, server: Server) -> None:
        if not server.alive:
            return
        blocks = None
        if server.state is ServerState.ONLINE:
            self.measure.count("looks of servers", self.clock.now)
            blocks = self.rules.consider(server, self.picture(), self.clock.now)
        if blocks is None or blocks == server.blocks:
            self._plan_check(server)
            return
        fetch = server.machine.fetch_seconds(len({*_each(blocks)} - {*_each(server.blocks)}))
        if self.rules.fetches_first:
            self.clock.at(self.clock.now + fetch, lambda: self._confirm(server, blocks))
        else:
            self._move(server, blocks, START_SECONDS + fetch)

    def _confirm(self, server: Server, blocks: BlockRange) -> None:
        if not server.alive:
            return
        self.measure.count("fetched to move", self.clock.now)
        if self.rules.confirm(server, self.picture(), self.clock.now) == blocks:
            self._move(server, blocks, 0.0)
        else:
            self._plan_check(server)

    def _move(self, server: Server, blocks: BlockRange, seconds: float) -> None:
        self.measure.moved(self.clock.now)
        server.state = ServerState.DRAINING
        self.on_lost(server, False)
        self._load(server, blocks, seconds + server.machine.load_seconds(len(blocks)))
        self._plan_check(server)

    def _leave(self, server: Server) -> None:
        leaving = server.machine.leaving
        server.state = ServerState.OFFLINE
        if leaving is Leaving.POLITE:
            self.announce(server)
        self.on_lost(server, leaving is not Leaving.POLITE)


def _each(blocks: BlockRange) -> range:
    return range(blocks.start, blocks.end)
