"""Whether the hops of a route are as quick as they were expected to be when they were chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from swarm.client.hop import Hop
from swarm.client.routing import JUDGED, is_slow

_PAUSE = 10.0  # seconds between two looks, since a look that changed nothing would change nothing


class Watch:
    """Of one session. Times are in seconds."""

    def __init__(self) -> None:
        self._expected: dict[Hop, float] = {}
        self._recent: dict[Hop, deque[float]] = {}
        self._observed = 0
        self._looked = float("-inf")

    def expect(self, hops: Sequence[Hop], seconds: Sequence[float] | None) -> None:
        """The route is another one: what a step is to take at each hop (None: nobody knows). Of
        hops that were in it before, what was expected first goes on to be."""
        if seconds is None:
            seconds = [float("inf")] * len(hops)
        before = self._expected
        self._expected = {h: before.get(h, s) for h, s in zip(hops, seconds, strict=True)}
        self._recent = {h: self._recent.get(h, deque(maxlen=JUDGED)) for h in hops}

    def observe(self, hop: Hop, seconds: float) -> None:
        """A step of one position took so long at a hop, the way there included."""
        if hop in self._recent:
            self._recent[hop].append(seconds)

    def doubts(self, now: float) -> bool:
        """Whether some hop is slow by now, so that it pays to look for a better route."""
        self._observed += 1
        if self._observed % JUDGED or now < self._looked + _PAUSE:
            return False
        slow = any(is_slow(list(self._recent[h]), s) for h, s in self._expected.items())
        if slow:
            self._looked = now
        return slow
