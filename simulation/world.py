"""What happens to every rule alike: machines, links, lifetimes, clients. All of it from one seed.

Where a figure has a source it is named; the others are assumed (docs/scale.md lists them).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]

MEGABIT = 125_000.0  # bytes
TOKEN_BYTES = 16_384  # one position between two hops: 8,192 values of two bytes
BLOCK_BYTES = 440e6  # weights of one block that a server has to fetch (70 billion numbers, 4 bit)
DISK = 1e9  # bytes per second
START_SECONDS = 10.0  # of a server, besides its blocks: imports, joining, self-test
_SPREAD = 0.99  # of a log-normal whose 1st and 99th percentile are a factor of 100 apart
_MEAN_SPEED_AND_MEMORY = 0.5  # correlation of the logarithms: fast devices tend to be large
_EARTH = 6371.0  # km
_SECONDS_PER_KM = 1.5e-5  # there and back at two thirds of light's speed, on a detour of a half
_FLOOR = 0.002  # seconds there and back, between two neighbours with perfect lines
_DETOUR = 0.25  # spread of the logarithm of how much longer the way between two is than is usual
_LUCKS = 1024
_DETOURS = [math.exp(_DETOUR * NormalDist().inv_cdf((i + 0.5) / _LUCKS)) for i in range(_LUCKS)]

# Latitude, longitude, share of all machines, degrees of scatter.
_REGIONS = (
    (50.0, 8.0, 0.33, 7.0),
    (39.0, -78.0, 0.22, 6.0),
    (38.0, -119.0, 0.13, 5.0),
    (33.0, 118.0, 0.15, 9.0),
    (17.0, 78.0, 0.08, 7.0),
    (-22.0, -46.0, 0.06, 5.0),
    (-34.0, 149.0, 0.03, 4.0),
)


class Leaving(Enum):
    """How a server goes: SIGTERM, a dead process, or a machine that falls silent."""

    POLITE = "polite"
    KILLED = "killed"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated; times are in seconds."""

    servers: int = 1000
    clients: int = 2000
    hours: float = 2.0
    seed: int = 0
    num_blocks: int = 80
    lifetime: float = 3600.0  # median
    # Weibull shape: most leave soon, few stay for days. Session lengths of Gnutella, BitTorrent and
    # Kad fit 0.34 to 0.59 (Stutzbach and Rejaie, Understanding Churn in P2P Networks, IMC 2006).
    shape: float = 0.6
    warmup: float = 600.0  # not counted
    tick: float = 1.0  # how often loads and progress are worked out

    @property
    def end(self) -> float:
        return self.warmup + 3600.0 * self.hours

    @property
    def mean_lifetime(self) -> float:
        return self._scale * math.gamma(1 + 1 / self.shape)

    @property
    def _scale(self) -> float:
        return self.lifetime / math.log(2) ** (1 / self.shape)

    def lifetimes(self, rng: np.random.Generator, count: int) -> Floats:
        return self._scale * rng.weibull(self.shape, count)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine is, and the seconds that its own line adds to each trip there and back.

    `lot` decides, with the other end's, how much of a detour the way there is.
    """

    x: float
    y: float
    z: float
    access: float
    lot: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A server from birth to death, whatever it serves meanwhile."""

    block_seconds: float  # one decode step of one row through one block
    blocks: int  # that its memory holds
    up: float  # bytes per second
    down: float
    place: Place
    born: float
    dies: float
    leaving: Leaving

    @property
    def speed(self) -> float:
        """Block-tokens per second of a single stream."""
        return 1 / self.block_seconds

    def fetch_seconds(self, blocks: int) -> float:
        return blocks * BLOCK_BYTES / self.down

    def load_seconds(self, blocks: int) -> float:
        """From having the weights on the disk to serving them."""
        return blocks * BLOCK_BYTES / DISK

    def start_seconds(self, blocks: int) -> float:
        """From choosing to serving, with nothing there yet."""
        return START_SECONDS + self.fetch_seconds(blocks) + self.load_seconds(blocks)


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt of a chat and its answer, after `pause` seconds of thought."""

    pause: float
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class World:
    """One history that all rules live through."""

    scenario: Scenario
    machines: tuple[Machine, ...]
    clients: tuple[Place, ...]

    def chats(self, client: int) -> Iterator[list[Turn]]:
        """The same endless row of chats, whatever becomes of them."""
        rng = random.Random(f"chats {self.scenario.seed} {client}")
        while True:
            yield [
                Turn(
                    pause=rng.expovariate(1 / 30.0),
                    prompt=_clipped(rng.lognormvariate(math.log(200), 1.0), 8, 4096),
                    answer=_clipped(rng.lognormvariate(math.log(150), 0.8), 8, 2048),
                )
                for _ in range(1 + min(11, int(rng.expovariate(1 / 3.0))))
            ]


def make_world(scenario: Scenario) -> World:
    """Machines that are there at the beginning, as many more as come, and the clients."""
    rng = np.random.default_rng(scenario.seed)
    count = scenario.servers
    pool = scenario.lifetimes(rng, 100_000)
    # Who is met at any one moment has a long life, by its length, and is somewhere in it.
    present = rng.choice(pool, count, p=pool / pool.sum()) * rng.random(count)
    born = [0.0] * count
    dies = [float(left) for left in present]
    now = 0.0
    while (now := now + rng.exponential(scenario.mean_lifetime / count)) < scenario.end:
        born.append(now)
        dies.append(now + float(scenario.lifetimes(rng, 1)[0]))
    total = len(born)
    speed, memory = _correlated(rng, total)
    seconds = 0.003 * np.exp(-_SPREAD * speed)
    blocks = np.clip(np.round(10 * np.exp(0.7 * memory)), 2, scenario.num_blocks)
    up = np.clip(50 * np.exp(_SPREAD * rng.standard_normal(total)), 5, 1000) * MEGABIT
    down = np.clip(up * rng.uniform(1, 5, total), 20 * MEGABIT, 1000 * MEGABIT)
    places = _places(rng, total + scenario.clients)
    leaving = rng.choice([0, 1, 2], total, p=[0.5, 0.35, 0.15])
    machines = tuple(
        Machine(
            float(seconds[i]),
            int(blocks[i]),
            float(up[i]),
            float(down[i]),
            places[i],
            born[i],
            dies[i],
            list(Leaving)[leaving[i]],
        )
        for i in range(total)
    )
    return World(scenario, machines, tuple(places[total:]))


def rtt(one: Place, other: Place) -> float:
    """Seconds there and back between two machines."""
    chord = math.dist((one.x, one.y, one.z), (other.x, other.y, other.z))
    arc = 2 * math.asin(min(1.0, chord / 2))
    detour = _DETOURS[(one.lot ^ other.lot) * 0x9E3779B1 % (1 << 32) % _LUCKS]
    return _FLOOR + one.access + other.access + _SECONDS_PER_KM * _EARTH * arc * detour


def _correlated(rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    one, other = rng.standard_normal(count), rng.standard_normal(count)
    share = _MEAN_SPEED_AND_MEMORY
    return one, share * one + math.sqrt(1 - share**2) * other


def _places(rng: np.random.Generator, count: int) -> list[Place]:
    regions = rng.choice(len(_REGIONS), count, p=[region[2] for region in _REGIONS])
    scatter = rng.standard_normal((count, 2))
    access = np.clip(0.008 * np.exp(0.8 * rng.standard_normal(count)), 0.001, 0.15)
    lots = rng.integers(0, 1 << 32, count)
    places: list[Place] = []
    for region, (north, east), line, lot in zip(regions, scatter, access, lots, strict=True):
        lat, lon, _, degrees = _REGIONS[region]
        phi, theta = math.radians(lat + degrees * north), math.radians(lon + degrees * east)
        x, y = math.cos(phi) * math.cos(theta), math.cos(phi) * math.sin(theta)
        places.append(Place(x, y, math.sin(phi), float(line), int(lot)))
    return places


def _clipped(value: float, least: int, most: int) -> int:
    return min(most, max(least, round(value)))
