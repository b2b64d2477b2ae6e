"""Who serves one model, from look to look: who came, moved, left or was lost.

Pure: what was seen comes in, what happened comes out; times are arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from swarm.dht.records import ServerRecord, ServerState

LOST_SECONDS = 600.0  # so long somebody who is lost is still shown
_POLITE = 0.9  # of its lifetime: whose record goes earlier took it back itself


class State(StrEnum):
    """As a server announces it, or LOST: it does not answer, or announces nothing any more."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    LOST = "lost"


class Kind(StrEnum):
    """What may happen to a server."""

    JOINED = "joined"
    BACK = "back"
    MOVED = "moved"
    LEFT = "left"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Event:
    """`at` is in seconds since 1970; `blocks` are those after it."""

    at: float
    kind: Kind
    peer_id: str
    name: str
    blocks: tuple[int, int]


@dataclass(slots=True)
class Member:
    """A server with its newest record. Times are in seconds since 1970, by our clock."""

    record: ServerRecord
    state: State
    seen: float  # first
    advanced: float  # when its newest record came
    gone: float | None = None  # since when it is lost


@dataclass(slots=True)
class Roster:
    """Everybody who is there, or was until a short while ago."""

    members: dict[str, Member] = field(default_factory=dict[str, Member])
    _begun: bool = False

    def update(
        self,
        records: Iterable[ServerRecord],
        *,
        silent: Collection[str],
        unreachable: Collection[str],
        now: float,
    ) -> list[Event]:
        """Take in a look: `silent` ones announce nothing, `unreachable` ones do not answer."""
        events: list[Event] = []
        listed: set[str] = set()
        for record in records:
            listed.add(record.peer_id)
            gone = record.peer_id in silent or (
                # who drains may close its door before its farewell is seen
                record.peer_id in unreachable and record.state is not ServerState.DRAINING
            )
            events += self._meet(record, gone, now)
        for peer_id, member in list(self.members.items()):
            if peer_id not in listed:
                events += self._miss(member, now)
        self._begun = True
        return events

    def _meet(self, record: ServerRecord, gone: bool, now: float) -> list[Event]:
        member = self.members.get(record.peer_id)
        if member is not None and record.announced_at <= member.record.announced_at:
            record = member.record  # of two that are as new, the one that came first
        state = State.LOST if gone else State(record.state)
        if member is None:
            lost_at = now if gone else None
            self.members[record.peer_id] = Member(record, state, now, now, lost_at)
            return [_event(Kind.JOINED, record, now)] if self._begun and not gone else []
        events: list[Event] = []
        if record.announced_at > member.record.announced_at:
            if record.blocks != member.record.blocks:
                events.append(_event(Kind.MOVED, record, now))
            member.record, member.advanced = record, now
        return events + _turn(member, state, now)

    def _miss(self, member: Member, now: float) -> list[Event]:
        """Its record is gone: taken back if that was early, else it ran out."""
        if now - member.advanced < _POLITE * member.record.lifetime:
            del self.members[member.record.peer_id]
            return [_event(Kind.LEFT, member.record, now)]
        events = _turn(member, State.LOST, now)
        if member.gone is not None and now - member.gone > LOST_SECONDS:
            del self.members[member.record.peer_id]
        return events


def _turn(member: Member, state: State, now: float) -> list[Event]:
    before, member.state = member.state, state
    if (before is State.LOST) == (state is State.LOST):
        return []
    member.gone = now if state is State.LOST else None
    return [_event(Kind.LOST if state is State.LOST else Kind.BACK, member.record, now)]


def _event(kind: Kind, record: ServerRecord, now: float) -> Event:
    blocks = record.blocks.start, record.blocks.end
    return Event(now, kind, record.peer_id, record.public_name, blocks)
