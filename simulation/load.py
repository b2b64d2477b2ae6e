"""How long a step takes at each server, by who else is there: mean values, all servers at once.

A server takes all steps that wait into one pass, as ours does. A pass of `n` rows takes
`FIXED + n x ROW` of one row's time: 16 rows cost 1.5 times one (docs/benchmarks.md, model A). That
agrees with real schedulers, pass by pass, to a fifth (tests/simulation/test_load.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulation.world import TOKEN_BYTES, Floats, Ints

ROW = 0.5 / 15
FIXED = 1 - ROW
_BULK = 1.5  # prompts lengthen the mean pass by so much: threefold, then rest (server/pace.py)
_ROUNDS = 3  # towards agreement between what clients ask and how long it takes; then once a tick
_FULL = 0.98  # of a link: more is not queued on, the closed loop of clients slows down instead


@dataclass(frozen=True, slots=True)
class Demand:
    """Hops of all sessions that decode, in one flat list; `owner` counts sessions from 0."""

    owner: Ints
    server: Ints
    blocks: Floats
    network: Floats  # per session: seconds of one step on the way

    def steps(self, delay: Floats) -> Floats:
        """Seconds of a step, per session, when each server takes `delay`."""
        spent = np.bincount(self.owner, delay[self.server], len(self.network))
        return self.network + spent


class Loads:
    """Per server: rows of a pass, its seconds, how busy it is, what a step spends there."""

    def __init__(self, block_seconds: Floats, up: Floats) -> None:
        self.unit = block_seconds
        self.link = 2 * TOKEN_BYTES / up  # to the next hop, and the client's copy
        count = len(block_seconds)
        self.span = np.ones(count)  # blocks held
        self.bulk = np.zeros(count)  # sessions whose prompts it works on
        self.rows = np.ones(count)
        self.sessions = np.zeros(count)
        self.rate = np.zeros(count)  # steps per second
        self.seconds = np.zeros(count)  # of a pass
        self.busy = np.zeros(count)  # share of the time
        self.link_wait = np.zeros(count)

    @property
    def wait(self) -> Floats:
        """Mean seconds until a step's pass begins: half of the one it comes into, if any.

        Whoever is alone never meets a pass: their next step comes after their last one.
        """
        others = 1 - 1 / np.maximum(self.sessions, 1)
        return self.busy * self.seconds / 2 * others

    @property
    def delay(self) -> Floats:
        return self.seconds + self.wait + self.link / 2 + self.link_wait

    def wait_of(self, server: int) -> float:
        others = 1 - 1 / max(self.sessions[server], 1.0)
        return float(self.busy[server] * self.seconds[server] / 2 * others)

    def delay_of(self, server: int) -> float:
        link = self.link[server] / 2 + self.link_wait[server]
        return float(self.seconds[server] + link) + self.wait_of(server)

    def link_use(self, server: int) -> float:
        """Which share of the uplink is in use."""
        return float(min(self.rate[server] * self.link[server], _FULL))

    def settle(self, demand: Demand, steps: Floats) -> Floats:
        """Steps take what loads make of them, and loads come from steps. Returns the new steps."""
        count = len(self.unit)
        self.sessions = np.bincount(demand.server, minlength=count).astype(float)
        for _ in range(_ROUNDS):
            rates = (1 / steps)[demand.owner]
            self.rate = np.bincount(demand.server, rates, count)
            used = np.bincount(demand.server, rates * demand.blocks, count)
            blocks = used / np.maximum(self.rate, 1e-9)
            self._passes(blocks)
            steps = (steps + demand.steps(self.delay)) / 2
        return steps

    def _passes(self, blocks: Floats) -> None:
        # A pass goes through what its sessions have in common; more of them use more of the span.
        joined = blocks + (self.span - blocks).clip(0) * (1 - 1 / self.rows)
        work = self.unit * (FIXED * joined + ROW * blocks * self.rows)
        self.seconds = work * np.where(self.bulk > 0, _BULK, 1.0)
        rows = np.clip(self.rate * self.seconds, 1, np.maximum(self.sessions, 1))
        self.rows = (self.rows + rows) / 2
        self.busy = np.minimum(1, self.rate * self.seconds / self.rows)
        full = np.minimum(self.rate * self.link, _FULL)
        queue = self.link * full / (2 * (1 - full))
        self.link_wait = np.minimum(queue, self.link * (self.sessions - 1).clip(0))

    def samples(self, demand: Demand, rng: np.random.Generator) -> Floats:
        """One step of each session with its luck: which passes it comes into, and how far they are.

        Their mean is `demand.steps(self.delay)`.
        """
        seconds, wait = self.seconds[demand.server], self.wait[demand.server]
        chance = np.divide(2 * wait, seconds, out=np.zeros_like(wait), where=seconds > 0)
        luck = rng.random((2, len(wait)))
        waited = seconds * luck[0] * (luck[1] < chance)
        spent = seconds + waited + (self.link / 2 + self.link_wait)[demand.server]
        return demand.network + np.bincount(demand.owner, spent, len(demand.network))
