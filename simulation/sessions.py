"""Clients and their chats: routes are opened, prompts fed, answers decoded, lost hops replaced."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np

from simulation.engine import Clock, Swarm
from simulation.load import FIXED, ROW, Demand
from simulation.measure import Measure
from simulation.rules import KV_TOKENS, Leg, Memory, Server, Wanted
from simulation.session import Session, State
from simulation.world import MEGABIT, TOKEN_BYTES, Ints, Leaving, Turn, World, rtt
from swarm.client.routing import JUDGED, is_slow
from swarm.config import ClientTimeouts, ServerLimits
from swarm.dht.records import ServerState
from swarm.errors import NoRoute
from swarm.types import BlockRange

CLIENT_UP, CLIENT_DOWN = 20 * MEGABIT, 100 * MEGABIT  # bytes per second
BETWEEN_CHATS = 60.0  # mean seconds
WATCHED = 10  # seconds between two looks whether a hop became slow (watch.py)
_TIMEOUTS, _LIMITS = ClientTimeouts(), ServerLimits()
_SHARE = 1 / 3  # of a server's time that prompts get beside others' answers (server/pace.py)
_TRIES = 8  # openings in a row, before what has happened meanwhile must be looked at
_LEAST_POSITIONS = 1024  # that a session asks room for; else the next power of two
_SILENCE = (3.0, 1.0)  # a silent hop is given up after so many usual steps and so many seconds


class Sessions:
    """One session per client, numbered alike."""

    def __init__(self, world: World, swarm: Swarm, clock: Clock, measure: Measure) -> None:
        self.world, self.swarm, self.clock, self.measure = world, swarm, clock, measure
        count = len(world.clients)
        self._num_blocks = world.scenario.num_blocks
        self._chats: list[Iterator[list[Turn]]] = [world.chats(c) for c in range(count)]
        self.all = [Session(client) for client in range(count)]
        self._memories: list[Memory] = [swarm.rules.memory(c) for c in range(count)]
        self._rng = random.Random(f"sessions {world.scenario.seed}")
        self._luck = np.random.default_rng(world.scenario.seed)
        self._phase = [self._rng.random() * swarm.rules.look_period for _ in range(count)]
        self.decoding = np.zeros(count, bool)
        self._left = np.zeros(count)
        self._step = np.ones(count)
        self._network = np.zeros(count)
        self._servers = np.full((count, 16), -1)
        self._blocks = np.zeros((count, 16))
        swarm.on_lost = self._lost

    def begin(self) -> None:
        for session, phase in zip(self.all, self._phase, strict=True):
            self._new_chat(session, self._rng.random() * 2 * BETWEEN_CHATS)
            self.clock.at(phase, lambda client=session.client: self._look(client))

    # A chat ---------------------------------------------------------------------------------

    def _new_chat(self, session: Session, wait: float) -> None:
        session.turns, session.turn = next(self._chats[session.client]), 0
        total = sum(turn.prompt + turn.answer for turn in session.turns)
        session.positions = max(_LEAST_POSITIONS, 1 << (total - 1).bit_length())
        session.known = 0
        self._plan(session, wait + session.turns[0].pause, self._ask)

    def _ask(self, session: Session) -> None:
        turn = session.turns[session.turn]
        session.prompt, session.left = turn.prompt, float(turn.answer)
        session.since = self.clock.now
        if session.hops and not self._gaps(session):
            self._improve(session)
        self._mend(session)

    def _improve(self, session: Session) -> bool:
        """Whether it leaves for a better route; what cannot be opened is mended."""
        memory, now = self._memories[session.client], self.clock.now
        wanted = self._wanted(session, BlockRange(0, self._num_blocks))
        legs = memory.better(self._seen(session), session.hops, wanted, now)
        if legs is None:
            return False
        self.measure.count("routes left for better ones", now)
        for leg in [leg for leg in session.hops if leg not in legs]:
            session.hops.remove(leg)
            self._release(session, leg)
        for leg in legs:
            if leg not in session.hops:
                self._open(session, leg, now)
        return True

    def _look_around(self, session: Session) -> None:
        """In the middle of an answer: leave a route with a hop that became slow, if that pays."""
        if self._has_slow(session):
            self._note_work(session)
            if self._improve(session):
                self._pause(session)
                session.moving = True
                self._mend(session)

    def _has_slow(self, session: Session) -> bool:
        """As the client sees hops: from the answer of the one before to its own."""
        before: int | None = None
        for leg in session.hops:
            index, expected = leg[0], session.expected.get(leg)
            home = self.swarm.client_rtt(session.client, index)
            way = home
            if before is not None:
                back = self.swarm.client_rtt(session.client, before)
                way = (self.swarm.server_rtt(before, index) + home - back) / 2
            took = way + float(self.swarm.loads.delay_of(index))
            if expected is not None and is_slow([took] * JUDGED, expected):
                return True
            before = index
        return False

    def _note_work(self, session: Session) -> None:
        memory = self._memories[session.client]
        for index, blocks in session.hops:
            server = self.swarm.servers[index]
            self.swarm.feel(server)
            memory.worked(server, len(blocks), self.clock.now)

    def _pause(self, session: Session) -> None:
        """It decodes no more, and waits from now on."""
        client = session.client
        session.since, session.known = self.clock.now, self._held(session)
        session.left = float(self._left[client])
        self.decoding[client] = False

    def _turn_over(self, session: Session) -> None:
        self._note_work(session)
        self.measure.count("answers", self.clock.now)
        session.state = State.IDLE
        session.known += round(session.left)
        session.turn += 1
        if session.turn < len(session.turns):
            self._plan(session, session.turns[session.turn].pause, self._ask)
        else:
            self._close(session)

    def _close(self, session: Session) -> None:
        hops, session.hops, session.fresh = session.hops, [], []
        for leg in hops:
            self._release(session, leg)
        session.state = State.IDLE
        self._new_chat(session, self._rng.expovariate(1 / BETWEEN_CHATS))

    def _plan(self, session: Session, wait: float, then: Callable[[Session], None]) -> None:
        session.generation += 1
        generation = session.generation

        def do() -> None:
            if session.generation == generation:
                then(session)

        self.clock.at(self.clock.now + wait, do)

    # Its route ------------------------------------------------------------------------------

    def _mend(self, session: Session) -> None:
        """Open what is missing; a failed opening costs the time that it takes to fail."""
        session.state = State.MENDING
        memory, when = self._memories[session.client], self.clock.now
        picture = self._seen(session)
        for _ in range(_TRIES):
            legs: list[Leg] = []
            try:
                for gap in self._gaps(session):
                    legs += memory.route(picture, self._wanted(session, gap), when)
            except NoRoute:
                self._wait_for_a_route(session)
                return
            outcomes = [self._open(session, leg, when) for leg in legs]
            when += max((seconds for _, seconds in outcomes), default=0.0)
            if all(opened for opened, _ in outcomes):
                self._feed(session, when)
                return
        self._plan(session, when - self.clock.now, self._mend)

    def _wanted(self, session: Session, blocks: BlockRange) -> Wanted:
        return Wanted(blocks, session.positions, self._held(session), session.prompt)

    def _held(self, session: Session) -> int:
        """Positions that its hops hold."""
        decoding = bool(self.decoding[session.client])
        new = session.left - float(self._left[session.client]) if decoding else 0.0
        return session.known + round(new)

    def _wait_for_a_route(self, session: Session) -> None:
        now = self.clock.now
        session.blocked = now if session.blocked is None else session.blocked
        self.measure.count("looks of clients", now)
        if now - session.blocked < _TIMEOUTS.recovery:
            self._plan(session, _TIMEOUTS.refresh, self._mend)
            return
        self.measure.count("given up", now)
        self._unblock(session)
        self._close(session)

    def _unblock(self, session: Session) -> None:
        if session.blocked is not None:
            self.measure.was_blocked(self.clock.now, self.clock.now - session.blocked)
            session.blocked = None

    def _seen(self, session: Session) -> object:
        if session.blocked is not None:
            return self.swarm.fresh_picture()
        period = self.swarm.rules.look_period
        return self.swarm.picture((self.clock.now - self._phase[session.client]) % period)

    def _gaps(self, session: Session) -> list[BlockRange]:
        gaps: list[BlockRange] = []
        start = 0
        for first, end in [*((b.start, b.end) for _, b in session.hops), (self._num_blocks, 0)]:
            if start < first:
                gaps.append(BlockRange(start, first))
            start = end
        return gaps

    def _open(self, session: Session, leg: Leg, when: float) -> tuple[bool, float]:
        """Whether that succeeds, and the seconds until it is known."""
        index, blocks = leg
        server, memory = self.swarm.servers[index], self._memories[session.client]
        trip = self.swarm.client_rtt(session.client, index)
        self.measure.count("openings", when)
        if not server.alive and server.machine.leaving is Leaving.SILENT:
            memory.failed(server, when + _TIMEOUTS.connect)
            return False, _TIMEOUTS.connect
        if server.state is not ServerState.ONLINE or not server.blocks.contains(blocks):
            memory.failed(server, when + trip)
            return False, trip
        needed = session.positions * len(blocks)
        if server.promised + needed > KV_TOKENS * len(server.blocks):
            memory.busy(server, when + _LIMITS.kv_wait + trip)
            self.measure.count("refused as full", when)
            return False, _LIMITS.kv_wait + trip
        server.promised += needed
        server.sessions.add(session.client)
        session.hops = sorted([*session.hops, leg], key=lambda leg: leg[1])
        session.fresh.append(leg)
        memory.opened(server, trip)
        return True, trip

    def _release(self, session: Session, leg: Leg) -> None:
        server = self.swarm.servers[leg[0]]
        server.promised -= session.positions * len(leg[1])
        if all(index != leg[0] for index, _ in session.hops):
            server.sessions.discard(session.client)

    def _lost(self, server: Server, failed: bool) -> None:
        """All sessions lose their hops there; those that work notice, and whom to blame."""
        silent = failed and server.machine.leaving is Leaving.SILENT and not server.alive
        for client in sorted(server.sessions):
            session = self.all[client]
            for leg in [leg for leg in session.hops if leg[0] == server.index]:
                session.hops.remove(leg)
                server.promised -= session.positions * len(leg[1])
            if session.state in (State.IDLE, State.MENDING):
                continue
            if session.state is State.DECODING:
                self._pause(session)
            self._stop_feeding(session)
            session.state = State.MENDING
            steps, seconds = _SILENCE
            notice = self.swarm.client_rtt(client, server.index)
            notice = seconds + steps * float(self._step[client]) if silent else notice
            if failed:
                self._memories[client].failed(server, self.clock.now + notice)
            self._plan(session, notice, self._mend)
        server.sessions.clear()

    # Its positions --------------------------------------------------------------------------

    def _feed(self, session: Session, when: float) -> None:
        """A replay to new hops, then the prompt to all."""
        self._unblock(session)
        session.state = State.FEEDING
        new = [leg for leg in session.hops if leg in session.fresh]
        replay = self._passage(session, new, session.known if new else 0)
        prompt = self._passage(session, session.hops, session.prompt)
        session.fed = [index for index, _ in (session.hops if session.prompt else new)]
        for index in session.fed:
            self.swarm.loads.bulk[index] += 1
        self._plan(session, when - self.clock.now + replay + prompt, self._decode)

    def _passage(self, session: Session, hops: list[Leg], positions: int) -> float:
        """Seconds for so many positions through `hops`: small pieces, so the slowest stage counts.

        Each piece also travels; that is counted once.
        """
        if not positions or not hops:
            return 0.0
        stages, travel = [positions * TOKEN_BYTES / CLIENT_UP], 0.0
        for index, blocks in hops:
            machine = self.swarm.servers[index].machine
            share = _SHARE if self.swarm.loads.rate[index] > 0 else 1.0
            each = machine.block_seconds * len(blocks) * ROW / share
            stages.append(positions * max(each, TOKEN_BYTES / min(machine.up, machine.down)))
            travel += machine.block_seconds * len(blocks) * FIXED
            travel += self.swarm.client_rtt(session.client, index) / 2
        return max(stages) + travel

    def _stop_feeding(self, session: Session) -> None:
        for index in session.fed:
            self.swarm.loads.bulk[index] -= 1
        session.fed = []

    def _decode(self, session: Session) -> None:
        client, now = session.client, self.clock.now
        self._stop_feeding(session)
        session.fresh = []
        if session.prompt:
            self.measure.answered(now, now - session.since)
        else:
            self.measure.mended(now, now - session.since, moved=session.moving)
        session.moving = False
        self._expect(session)
        session.known += session.prompt
        session.prompt = 0
        session.state = State.DECODING
        self._left[client] = session.left
        self._network[client] = self._way(session)
        width = self._servers.shape[1]
        if len(session.hops) > width:
            more = ((0, 0), (0, len(session.hops) - width))
            self._servers = np.pad(self._servers, more, constant_values=-1)
            self._blocks = np.pad(self._blocks, more)
        self._servers[client] = -1
        self._servers[client, : len(session.hops)] = [index for index, _ in session.hops]
        self._blocks[client, : len(session.hops)] = [len(blocks) for _, blocks in session.hops]
        alone = sum(
            self.swarm.servers[index].machine.block_seconds * len(blocks)
            for index, blocks in session.hops
        )
        self._step[client] = self._network[client] + alone
        self.decoding[client] = True

    def _expect(self, session: Session) -> None:
        """Of hops that were in the route before, what was expected first goes on to be."""
        wanted = self._wanted(session, BlockRange(0, self._num_blocks))
        memory, picture = self._memories[session.client], self._seen(session)
        seconds = memory.expect(picture, session.hops, wanted, self.clock.now)
        before, session.expected = session.expected, {}
        if seconds is not None:
            session.expected = dict(zip(session.hops, seconds, strict=True)) | {
                leg: before[leg] for leg in session.hops if leg in before
            }

    def _way(self, session: Session) -> float:
        """Seconds of one step on links: from hop to hop, and back to the client."""
        home = self.world.clients[session.client]
        machines = [self.swarm.servers[index].machine for index, _ in session.hops]
        places = [home, *(machine.place for machine in machines), home]
        trips = sum(rtt(one, other) for one, other in itertools.pairwise(places)) / 2
        arriving = sum(TOKEN_BYTES / machine.down for machine in machines)
        return trips + arriving + TOKEN_BYTES / CLIENT_UP + TOKEN_BYTES / CLIENT_DOWN

    def _look(self, client: int) -> None:
        now = self.clock.now
        self.measure.count("looks of clients", now)
        self._memories[client].look(self.swarm.picture(), now)
        self.clock.at(now + self.swarm.rules.look_period, lambda: self._look(client))

    def tick(self, seconds: float) -> None:
        """All that decode get on for so long."""
        now = self.clock.now
        waiting = sum(session.state is not State.IDLE for session in self.all)
        self.measure.waited(now, waiting * seconds)
        active = np.flatnonzero(self.decoding)
        if not len(active):
            return
        demand = self._demand(active)
        steps = self.swarm.loads.settle(demand, self._step[active])
        self._step[active] = steps
        tokens = np.minimum(seconds / steps, self._left[active])
        self._left[active] -= tokens
        self.measure.decoded(now, self.swarm.loads.samples(demand, self._luck), tokens)
        for client in active[self._left[active] <= 0]:
            self.decoding[client] = False
            self._turn_over(self.all[client])
        for client in active[(active + int(now)) % WATCHED == 0]:
            if self.decoding[client]:
                self._look_around(self.all[client])

    def _demand(self, active: Ints) -> Demand:
        servers = self._servers[active]
        owner, hop = np.nonzero(servers >= 0)
        return Demand(
            owner, servers[owner, hop], self._blocks[active][owner, hop], self._network[active]
        )
