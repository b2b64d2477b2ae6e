"""What a client has learnt about each peer: how far, how fast, and whether to ask it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from swarm.client.pace import Pace
from swarm.coordinates import Coordinates, locate

MAX_PEERS = 4096  # remembered at once; whoever was heard of longest ago is forgotten
_FIRST_BAN = 1.0  # seconds; doubled with each failure in a row
_LONGEST_BAN = 300.0  # seconds
_LONGEST_WAIT = 120.0  # seconds that one who refuses again and again is left alone, if it says less
_PROVEN = 8  # steps in a row, until what was before them is forgotten...
_RELAPSES = 3  # ...of which so many cost nothing
_RESTARTS = 3  # new certificates by which one who does not work is tried at once
_JITTER = 0.25  # so that the clients of a server that comes back do not come back all at once
_SMOOTHING = 0.2  # weight of the newest observation
_NEARER = 0.5  # the same for an RTT that is shorter than known: nothing but a queue makes it longer
_FRESH = 600.0  # seconds for which a speed is believed that was observed: servers' loads change
_DECODE_TOKENS = 8  # a pass of more positions tells nothing about the time of a decode step


class Rng(Protocol):
    """A `random.Random`, whose seed is the caller's business."""

    def random(self) -> float: ...


@dataclass(slots=True)
class Peer:
    """What is known of one. Read it, do not keep it."""

    rtt: float | None = None
    asked_at: float = float("-inf")
    block_seconds: float | None = None
    worked_at: float = float("-inf")
    failures: int = 0
    banned_until: float = float("-inf")
    failed_with: bytes = b""  # the certificate that it had then
    forgiven: bool = False  # once, since it last worked
    steps: int = 0  # since it last failed
    relapses: int = 0  # failures after fewer than _PROVEN steps, in a row
    restarts: int = 0  # since it was last proven
    refusals: int = 0  # since it last worked

    def decode_seconds(self, now: float) -> float | None:
        """One decode step through one block, smoothed; None if it was not observed of late."""
        return self.block_seconds if now - self.worked_at <= _FRESH else None


class PeerBook:
    """One client's memory of its peers. All times are in seconds, `now` by one monotonic clock."""

    def __init__(self, rng: Rng) -> None:
        self.pace = Pace()  # what prompts have shown
        self.coordinates: Coordinates | None = None  # where we are
        self._rng = rng
        self._peers: dict[str, Peer] = {}

    def failed(self, peer_id: str, now: float, certificate: bytes = b"") -> None:
        """Ban a peer: 1 s at first, twice as long each time, at most five minutes (+- 25 %).

        Who fails, works for a step or two and fails again is banned for longer, too.
        """
        peer = self._touch(peer_id)
        peer.failed_with = certificate
        worked = peer.worked_at > float("-inf") and peer.failures == 0
        peer.relapses = peer.relapses + worked if peer.steps < _PROVEN else 0
        peer.steps = 0
        doubled = peer.failures + max(0, peer.relapses - _RELAPSES)
        ban = min(_LONGEST_BAN, _FIRST_BAN * 2.0 ** min(doubled, 30))
        peer.failures += 1
        peer.banned_until = now + ban * (1 + _JITTER * (2 * self._rng.random() - 1))

    def busy(self, peer_id: str, now: float, retry_after: float | None) -> None:
        """A peer has no room; that is no failure, but it is left alone for as long as it says, and
        longer each time."""
        peer = self._touch(peer_id)
        least = min(_LONGEST_WAIT, _FIRST_BAN * 2.0 ** min(peer.refusals, 30))
        wait = min(max(least, retry_after or 0.0), _LONGEST_BAN)
        peer.refusals += 1
        peer.banned_until = now + wait * (1 + _JITTER * self._rng.random())

    def worked(
        self,
        peer_id: str,
        tokens: int,
        seconds: float,
        blocks: int = 0,
        *,
        elapsed: float = 0.0,
        now: float = float("inf"),
    ) -> None:
        """A peer computed `tokens` positions through `blocks` (0: unknown): all is forgiven.

        It says that it took `seconds`. We saw its answer `elapsed` seconds after the answer of the
        hop before it (or after the step was sent), of which its RTT at most was not its own.
        """
        peer = self._touch(peer_id)
        peer.failures, peer.forgiven, peer.refusals = 0, False, 0
        peer.steps += 1
        if peer.steps >= _PROVEN:
            peer.restarts = 0
        peer.banned_until = float("-inf")
        if blocks and 0 < tokens <= _DECODE_TOKENS:
            if peer.rtt is not None:
                seconds = max(seconds, elapsed - peer.rtt)
            known = None if now - peer.worked_at > _FRESH else peer.block_seconds
            peer.block_seconds = _smoothed(known, seconds / blocks)
            peer.worked_at = now

    def seen(self, peer_id: str, certificate: bytes) -> None:
        """A peer with another certificate than it failed with was started anew: try it at once,
        unless it does nothing else."""
        peer = self._peers.get(peer_id)
        if peer is None or not peer.failures or peer.failed_with == certificate:
            return
        if peer.restarts < _RESTARTS:
            peer.restarts += 1
            peer.failures = 0
            peer.banned_until = float("-inf")

    def asked(self, peer_id: str, now: float) -> None:
        """A peer is being asked how far it is."""
        self._touch(peer_id).asked_at = now

    def asked_at(self, peer_id: str) -> float:
        peer = self._peers.get(peer_id)
        return peer.asked_at if peer else float("-inf")

    def measured(self, peer_id: str, rtt: float) -> None:
        """A question was answered after `rtt` seconds."""
        peer = self._touch(peer_id)
        nearer = peer.rtt is not None and rtt < peer.rtt
        peer.rtt = _smoothed(peer.rtt, rtt, _NEARER if nearer else _SMOOTHING)

    def locate(self, places: Iterable[tuple[str, Coordinates]]) -> None:
        """Find out where we are, by where peers say that they are and how far those are."""
        near = ((where, self.rtt(name)) for name, where in places)
        known = [(where, rtt) for where, rtt in near if rtt is not None]
        self.coordinates = locate(known, self.coordinates)

    def banned(self, now: float) -> frozenset[str]:
        """Who must not be asked at present."""
        return frozenset(name for name, peer in self._peers.items() if now < peer.banned_until)

    def forgive(self, now: float) -> bool:
        """Nobody else is left: lift bans of those that worked and then failed just once, as when a
        connection broke. Whether there were any; each has this chance once."""
        lifted = [
            peer
            for peer in self._peers.values()
            if now < peer.banned_until
            and peer.worked_at > float("-inf")
            and (peer.failures, peer.forgiven) == (1, False)
        ]
        for peer in lifted:
            peer.banned_until, peer.forgiven = float("-inf"), True
        return bool(lifted)

    def banned_until(self, peer_id: str) -> float:
        peer = self._peers.get(peer_id)
        return peer.banned_until if peer else float("-inf")

    def failures(self, peer_id: str) -> int:
        """Failures since it last worked."""
        peer = self._peers.get(peer_id)
        return peer.failures if peer else 0

    def rtt(self, peer_id: str) -> float | None:
        """There and back, smoothed; None if it was never measured."""
        peer = self._peers.get(peer_id)
        return peer.rtt if peer else None

    def block_seconds(self, peer_id: str, now: float = 0.0) -> float | None:
        """As `Peer.decode_seconds`."""
        peer = self._peers.get(peer_id)
        return peer.decode_seconds(now) if peer else None

    def recall(self, peer_ids: Iterable[str]) -> Iterator[tuple[int, Peer]]:
        """Those of them that are known, with their places."""
        for place, peer in enumerate(map(self._peers.get, peer_ids)):
            if peer is not None:
                yield place, peer

    def __len__(self) -> int:
        return len(self._peers)

    def _touch(self, peer_id: str) -> Peer:
        peer = self._peers.pop(peer_id, None) or Peer()
        self._peers[peer_id] = peer  # dicts keep order: the last is the one heard of last
        if len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return peer


def _smoothed(old: float | None, new: float, weight: float = _SMOOTHING) -> float:
    return new if old is None else old + weight * (new - old)
