"""Into which pieces a prompt is cut, by what earlier pieces have shown of links and servers.

Pure: times are arguments, in seconds of one clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# A piece costs its server as much as so many more rows x positions: measured were 12 to 20 of
# models A and B (benchmarks/models.py) for the pass, and some milliseconds for frames and wake-ups.
OVERHEAD = 24
_LEAST = 64  # rows x positions in a piece: smaller ones would take too much from other sessions
_HOLD = 0.1  # seconds that a piece may hold a link; a window of eight then fills 0.8 s of pipeline
_LARGE = 1 << 14  # bytes; smaller pieces say more of wake-ups than of links
_PIECES = 4  # that an observation spans: frames that were held up somewhere come in bunches
_SLOWER = 1.5  # times all else that pieces go through, before the link is what they wait for
_SMOOTHING = 0.5  # weight of the newest observation
_FADING = 0.9  # of what is believed of a link, whenever nothing had to wait for it
_REMEMBERED = 4096  # links and servers; who was seen longest ago is forgotten

Leg = tuple[str, int]
"""A hop of a route: the server's peer id, and of how many blocks."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A link or a server, which pieces pass one after the other: seconds for each position, and for
    each piece besides."""

    each: float
    fixed: float = 0.0


def best_width(positions: int, stages: Sequence[Stage], least: int = 1) -> int:
    """Positions per piece with which the last piece comes out of the last stage soonest.

    `m` equal pieces through a chain of stages take the sum of all stages' times for one, and
    `m - 1` times the slowest one's: small pieces overlap better, and cost more besides. (As for
    pipelined broadcasts: Pjesivac-Grbovic et al., Performance Analysis of MPI Collective
    Operations, Cluster Computing 10(2), 2007.) That is convex in `m`: the first one that is not
    better ends it.
    """
    best, soonest = positions, float("inf")
    for pieces in range(1, max(1, positions // least) + 1):
        width = positions / pieces
        times = [stage.fixed + stage.each * width for stage in stages]
        end = sum(times) + (pieces - 1) * max(times)
        if end >= soonest:
            break
        best, soonest = -(-positions // pieces), end
    return best


class Pace:
    """What the prompts of one model have shown; `""` is the client in the name of a link."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], float] = {}  # s per byte, of the slow ones
        self._carried: dict[str, float] = {}  # s per byte, at most, of all that lead to a server
        self._servers: dict[str, float] = {}  # s per block, row and position

    def width(self, route: Sequence[Leg], positions: int, rows: int, row_bytes: int) -> int:
        """Positions in a piece of a prompt of so many; a position of a row travels as `row_bytes`.

        Links that are not known to be slow count as free.
        """
        known = [self._servers[peer] for peer, _ in route if peer in self._servers]
        usual = sum(known) / len(known) if known else 1.0
        sources = ["", *(peer for peer, _ in route)]
        links = [self._links.get(link, 0.0) for link in pairwise(sources)]
        least = max(1, _LEAST // rows)
        stages = [Stage(link * rows * row_bytes) for link in links]
        for peer, blocks in route:
            seconds = self._servers.get(peer, usual) * blocks
            stages.append(Stage(seconds * rows, seconds * OVERHEAD))
        width = best_width(positions, stages, least)
        if any(links):
            width = min(width, int(_HOLD / max(links)) // (rows * row_bytes))
        return max(least, width)

    def computed(self, peer: str, blocks: int, tokens: int, seconds: float) -> None:
        """A piece of `tokens` rows x positions took a server so long."""
        each = seconds / blocks / (tokens + OVERHEAD)
        self._servers[peer] = _smoothed(self._servers.pop(peer, each), each)
        _forget(self._servers)

    def byte_seconds(self, peer: str) -> float | None:
        """Seconds per byte on the way to a server, at most; None: never seen."""
        return self._carried.get(peer)

    def token_seconds(self, peer: str) -> float | None:
        """Seconds per block for each position of a prompt; None: never seen."""
        return self._servers.get(peer)

    def crossed(self, link: tuple[str, str], seconds: float, *, waited: bool) -> None:
        """Pieces took so long per byte, and `waited` for the link, or for something else."""
        self._carried[link[1]] = _smoothed(self._carried.pop(link[1], seconds), seconds)
        _forget(self._carried)
        known = self._links.pop(link, seconds if waited else None)
        if known is not None:
            new = _smoothed(known, seconds) if waited else _FADING * min(known, seconds)
            self._links[link] = new
            _forget(self._links)


@dataclass(slots=True)
class _Track:
    """When pieces passed one point; and of some that had to wait there, since the last word."""

    times: list[float] = field(default_factory=list[float])
    pieces: int = 0
    elapsed: float = 0.0
    size: int = 0
    computing: float = 0.0
    crowded: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What a server's answer tells: rows x positions, the step's bytes, seconds of computing, and
    whether others' steps waited there, so that it may have waited for these."""

    tokens: int
    size: int
    computing: float
    crowded: bool = False


class Flight:
    """The pieces of one prompt on their way through a route.

    A piece that left the hop before so early that without waiting it would have been here by the
    time the piece ahead of it was has waited for that one. The time between the two, in which
    delays do not count, is what the link or computing takes, whichever takes longer.
    """

    def __init__(self, pace: Pace, route: Sequence[Leg]) -> None:
        self._pace = pace
        self._route = route
        self._tracks = [_Track() for _ in range(len(route) + 1)]

    def left(self, now: float) -> None:
        """The client has sent a piece."""
        self._tracks[0].times.append(now)

    def arrived(self, hop: int, piece: Piece, now: float) -> None:
        """What a hop made of the next piece is here."""
        peer, blocks = self._route[hop]
        self._pace.computed(peer, blocks, piece.tokens, piece.computing)
        before, track = self._tracks[hop].times, self._tracks[hop + 1]
        track.times.append(now)
        last = len(track.times) - 1
        if not 0 < last < len(before):
            return
        alone = track.times[0] - before[0]  # nobody was ahead of the first one
        if before[last] + alone > track.times[-2]:
            return
        track.pieces += 1
        track.elapsed += now - track.times[-2]
        track.size += piece.size
        track.computing += piece.computing
        track.crowded |= piece.crowded
        if track.pieces == _PIECES:
            if track.size > _PIECES * _LARGE and not track.crowded:
                source = self._route[hop - 1][0] if hop else ""
                waited = track.elapsed > _SLOWER * track.computing
                self._pace.crossed((source, peer), track.elapsed / track.size, waited=waited)
            self._tracks[hop + 1] = _Track(track.times)


def _smoothed(old: float, new: float) -> float:
    return old + _SMOOTHING * (new - old)


def _forget(known: dict[str, float] | dict[tuple[str, str], float]) -> None:
    if len(known) > _REMEMBERED:
        known.pop(next(iter(known)))  # pyright: ignore
