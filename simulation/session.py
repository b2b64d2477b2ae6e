"""A client's present chat, as plain state: `sessions.py` moves it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from simulation.rules import Leg
from simulation.world import Turn


class State(Enum):
    IDLE = "idle"  # its user thinks
    MENDING = "mending"  # no whole route
    FEEDING = "feeding"  # a prompt, or a replay
    DECODING = "decoding"


@dataclass(slots=True)
class Session:
    """A client's present chat. `hops` are those that live, in order of their blocks."""

    client: int
    turns: list[Turn] = field(default_factory=list[Turn])
    turn: int = 0
    state: State = State.IDLE
    hops: list[Leg] = field(default_factory=list[Leg])
    positions: int = 0  # that it may grow to
    known: int = 0  # positions that a new hop must be given
    prompt: int = 0  # positions that all hops must still be given
    left: float = 0.0  # tokens of the answer
    since: float = 0.0  # when it began to wait: the prompt was sent, or a hop was lost
    blocked: float | None = None  # since when there is no route
    generation: int = 0  # of plans; older ones mean nothing
    fresh: list[Leg] = field(default_factory=list[Leg])  # hops that know nothing yet
    fed: list[int] = field(default_factory=list[int])  # servers that work on its prompt
    expected: dict[Leg, float] = field(default_factory=dict[Leg, float])  # seconds of a step
    moving: bool = False  # it mends a route that was left for a better one
