"""What a set of rules must decide, and the state it may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from simulation.world import Machine, Scenario
from swarm.dht.records import ServerRecord, ServerState
from swarm.types import BlockRange

KV_TOKENS = 2 * 65_536  # positions that a server promises: as roomy as ours, twice overcommitted


@dataclass(slots=True, eq=False)
class Server:
    """A machine's present. Peer ids end in the index, by which short tags differ, too."""

    index: int
    machine: Machine
    state: ServerState = ServerState.JOINING
    blocks: BlockRange = field(default_factory=lambda: BlockRange(0, 1))
    moved: float = 0.0  # when it began to load these blocks
    generation: int = 0  # of its blocks; events of older ones mean nothing
    sessions: set[int] = field(default_factory=set[int])  # slots
    promised: int = 0  # positions x blocks
    queue: float = 0.0  # steps that wait or are in the pass, at present
    pass_seconds: float = 0.0
    delay: float = 0.0  # seconds that a step spends here, with waiting and sending
    uplink: float = 0.0  # bytes per second that others leave of it

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.index)

    @property
    def alive(self) -> bool:
        return self.state is not ServerState.OFFLINE

    @property
    def free_tokens(self) -> int:
        return max(0, KV_TOKENS - self.promised // len(self.blocks))


def peer_id_of(index: int) -> str:
    return f"server{index:08d}"


def index_of(record: ServerRecord) -> int:
    return int(record.peer_id.removeprefix("server"))


@dataclass(frozen=True, slots=True)
class Stage:
    """Where rules are played. RTTs are in seconds, by index, the client's first."""

    scenario: Scenario
    server_rtt: Callable[[int, int], float]
    client_rtt: Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A route through `blocks` for a session of at most so many positions."""

    blocks: BlockRange
    positions: int
    held: int = 0  # positions that new hops must be told first
    prompt: int = 0


Leg = tuple[int, BlockRange]
"""A server's index, and which of its blocks."""


class Memory(Protocol):
    """One client's: what it has learnt, and how it chooses by that. Raises NoRoute.

    `expect`: seconds of a step at each hop, as the client sees them, by which it knows a slow one
    (None: it does not care).
    """

    def route(self, picture: Any, wanted: Wanted, now: float) -> Sequence[Leg]: ...
    def better(
        self, picture: Any, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[Leg] | None: ...
    def expect(
        self, picture: Any, legs: Sequence[Leg], wanted: Wanted, now: float
    ) -> Sequence[float] | None: ...
    def look(self, picture: Any, now: float) -> None: ...
    def failed(self, server: Server, now: float) -> None: ...
    def busy(self, server: Server, now: float) -> None: ...
    def opened(self, server: Server, rtt: float) -> None: ...
    def worked(self, server: Server, blocks: int, now: float) -> None: ...


class Rules(Protocol):
    """A `picture` is what anybody sees who looks into the DHT at that time.

    `settle`: the first machines choose one after the other, each seeing all before it.
    `next_check`: seconds until a server thinks about moving; `consider`: where to; `confirm`: the
    same after it has fetched the weights, if `fetches_first`. `tend`: what a server does now and
    then besides; returns when again.
    """

    name: str
    fetches_first: bool  # weights, while it serves what it has; else it ends, and starts anew
    look_period: float  # seconds between two looks of a client
    announce_period: float  # mean seconds between two announcements

    def announce(self, server: Server, now: float) -> None: ...
    def picture(self, now: float) -> Any: ...
    def settle(self, machines: Sequence[Machine]) -> list[BlockRange]: ...
    def choose(self, server: Server, picture: Any) -> BlockRange: ...
    def next_check(self, random: float) -> float: ...
    def consider(self, server: Server, picture: Any, now: float) -> BlockRange | None: ...
    def confirm(self, server: Server, picture: Any, now: float) -> BlockRange | None: ...
    def tend(self, server: Server, picture: Any, random: float) -> float: ...
    def memory(self, client: int) -> Memory: ...
