"""Whose graphs are kept between the way forward and the way back, and how much of them.

Pure: bytes are counted here, graphs are where they are (models/training.py). Whoever has most goes
first when room is needed, and of that the oldest: nobody can push out those who have less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from swarm.errors import LocalProtocolError


@dataclass(eq=False, slots=True)
class Place:
    """One batch's."""

    client: str
    nbytes: int
    leave: Callable[[], None] | None = None  # called when it has to go; None: it is computed with


class Keeping:
    """`budget` is in bytes, and hard. At most `most` places: small ones count for more."""

    def __init__(self, budget: int, most: int) -> None:
        self.budget = budget
        self.used = 0
        self._least = ceil(budget / most)
        self._places: dict[Place, None] = {}  # the oldest first
        self._held: Counter[str] = Counter()  # bytes of each client

    def __len__(self) -> int:
        return len(self._places)

    def ask(self, client: str, wanted: int) -> Place:
        """With as much of what is wanted as there is, after others had to leave."""
        wanted = min(max(wanted, self._least), self.budget)
        while self.used + wanted > self.budget and (other := self._victim(client, wanted)):
            leave = other.leave
            self.free(other)
            if leave is not None:
                leave()
        granted = min(wanted, self.budget - self.used)
        if granted < self._least or granted == 0:
            return Place(client, 0)
        place = Place(client, granted)
        self._places[place] = None
        self._count(place, granted)
        return place

    def settle(self, place: Place, nbytes: int, leave: Callable[[], None]) -> None:
        """So much of it was needed, and nobody computes with it until `use`."""
        if place not in self._places or nbytes > place.nbytes:
            raise LocalProtocolError(f"{nbytes} bytes are kept where {place.nbytes} were granted")
        nbytes = max(nbytes, self._least)
        self._count(place, nbytes - place.nbytes)
        place.nbytes, place.leave = nbytes, leave

    def use(self, place: Place) -> None:
        """It is computed with, and does not have to leave."""
        place.leave = None

    def free(self, place: Place) -> None:
        """It keeps nothing any more. Doing so twice is fine."""
        place.leave = None
        if place in self._places:
            del self._places[place]
            self._count(place, -place.nbytes)

    def _victim(self, client: str, wanted: int) -> Place | None:
        held = self._held + Counter({client: wanted})
        idle = [place for place in self._places if place.leave is not None]
        most = max(idle, key=lambda place: held[place.client], default=None)
        return most if most is not None and held[most.client] >= held[client] else None

    def _count(self, place: Place, change: int) -> None:
        self.used += change
        self._held[place.client] += change
        if not self._held[place.client]:
            del self._held[place.client]

    def check_integrity(self) -> None:
        """Raises LocalProtocolError if places do not add up."""
        if not sum(place.nbytes for place in self._places) == self.used <= self.budget:
            raise LocalProtocolError(f"{self.used} of {self.budget} bytes are kept")
        if self._held.total() != self.used:
            raise LocalProtocolError("clients are charged for more or less than is kept")
