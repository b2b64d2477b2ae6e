"""Who came, moved, left or was lost, from look to look."""

from swarm.dht.records import ServerRecord, ServerState
from swarm.monitor.roster import LOST_SECONDS, Event, Kind, Roster, State
from swarm.types import BlockRange
from tests.monitor.simulated import NOW, record


def look(roster: Roster, at: float, *records: ServerRecord, **doubts: set[str]) -> list[Event]:
    usual: dict[str, set[str]] = {"silent": set(), "unreachable": set()}
    return roster.update(records, now=NOW + at, **(usual | doubts))


def renewed(old: ServerRecord, at: float, **fields: object) -> ServerRecord:
    return old.model_copy(update={"announced_at": int(1000 * (NOW + at)), **fields})


def kinds(events: list[Event]) -> list[Kind]:
    return [event.kind for event in events]


def test_nobody_joins_in_the_first_look_and_later_ones_do() -> None:
    roster, a, b = Roster(), record(0), record(1, "8:16", public_name="Bea")
    assert look(roster, 0, a) == []
    [event] = look(roster, 3, a, b)
    assert event == Event(NOW + 3, Kind.JOINED, b.peer_id, "Bea", (8, 16))
    assert look(roster, 6, a, b) == []


def test_who_does_not_answer_is_lost_and_may_come_back() -> None:
    roster, a = Roster(), record(0)
    look(roster, 0, a)
    assert kinds(look(roster, 3, a, unreachable={a.peer_id})) == [Kind.LOST]
    assert roster.members[a.peer_id].state is State.LOST
    assert look(roster, 6, a, unreachable={a.peer_id}) == []
    assert kinds(look(roster, 9, a)) == [Kind.BACK]
    assert roster.members[a.peer_id].state is State.ONLINE


def test_who_is_silent_and_then_dropped_by_the_dht_is_lost_once_and_forgotten_later() -> None:
    roster, a = Roster(), record(0)
    look(roster, 0, a)
    assert kinds(look(roster, 100, a, silent={a.peer_id})) == [Kind.LOST]
    assert look(roster, 110) == []
    assert roster.members[a.peer_id].state is State.LOST
    assert look(roster, 100 + LOST_SECONDS + 1) == []
    assert roster.members == {}


def test_whose_record_runs_out_is_lost_and_who_takes_it_back_has_left() -> None:
    roster, a, b = Roster(), record(0), record(1)
    look(roster, 0, a, b)
    fresh = renewed(b, 80)
    look(roster, 80, a, fresh)
    events = look(roster, 95)
    assert {event.peer_id: event.kind for event in events} == {
        a.peer_id: Kind.LOST,
        b.peer_id: Kind.LEFT,
    }
    assert list(roster.members) == [a.peer_id]


def test_a_polite_end_is_no_loss_even_if_the_door_closes_before_the_farewell_is_seen() -> None:
    roster, a = Roster(), record(0)
    look(roster, 0, a)
    leaving = renewed(a, 3, state=ServerState.DRAINING)
    assert look(roster, 3, leaving, unreachable={a.peer_id}) == []
    assert roster.members[a.peer_id].state is State.DRAINING
    assert kinds(look(roster, 5)) == [Kind.LEFT]


def test_who_says_two_things_at_a_time_is_believed_the_first() -> None:
    """A stranger may sign both; state and record must be of one of them."""
    roster, a = Roster(), record(0, state=ServerState.DRAINING)
    look(roster, 0, a)
    look(roster, 3, a.model_copy(update={"state": ServerState.ONLINE}))
    member = roster.members[a.peer_id]
    assert (member.state, member.record.state) == (State.DRAINING, ServerState.DRAINING)


def test_a_move_is_told_and_older_records_change_nothing() -> None:
    roster, a = Roster(), record(0, "0:8")
    look(roster, 0, a)
    moved = renewed(a, 3, blocks=BlockRange(8, 16), state=ServerState.JOINING)
    [event] = look(roster, 3, moved)
    assert (event.kind, event.blocks) == (Kind.MOVED, (8, 16))
    assert look(roster, 6, a) == []  # a replica that lags behind
    member = roster.members[a.peer_id]
    assert (member.record.blocks, member.state) == (BlockRange(8, 16), State.JOINING)
