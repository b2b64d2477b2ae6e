"""Who averages together meets in the DHT, under the rules of all records there."""

from __future__ import annotations

import pytest

from swarm.dht.meeting import Meeting, layout_of
from swarm.dht.memory import MemoryDht
from swarm.dht.records import CLOCK_SLACK, keys_of, open_record
from swarm.dht.validation import Entry, check_entry
from swarm.errors import InvalidRecord
from swarm.identity import Identity, SwarmKey
from tests.dht.samples import ALICE, BOB, KEY, OTHER_KEY

LAYOUT = layout_of([("a", (3, 4), "float32"), ("b", (5,), "float32")])


def meeting(
    identity: Identity = ALICE, key: SwarmKey | None = KEY, run: str = "run", layout: bytes = LAYOUT
) -> Meeting:
    return Meeting(run, layout, identity, MemoryDht(identity.peer_id, key=key), gather=30.0)


def test_notices_are_records_that_every_node_keeps() -> None:
    ours = meeting()
    now = MemoryDht("x").now()
    last = 0.0
    for until, looking in [(now + 30, True), (now + 30, False), (now + 30.5, True)]:
        notice = ours.notice(until, looking=looking)
        entry = Entry(ours.key.encode(), ALICE.peer_id, notice.data, notice.record.kept_until)
        record = check_entry(entry, swarm_key=KEY, now=now, hashed=str.encode)
        assert record.expires_at == pytest.approx(until, abs=0.01)
        assert record.kept_until > last  # or nodes would keep the one before
        assert len(notice.data) < 700
        assert ours.key in keys_of(record, KEY)
        assert meeting(BOB).waiting([notice.data]) == (
            [(ALICE.peer_id, pytest.approx(until, abs=0.01))] if looking else []
        )
        last = record.kept_until


def test_others_are_elsewhere_and_are_not_believed() -> None:
    ours = meeting()
    now = MemoryDht("x").now()
    others = [
        meeting(run="another"),
        meeting(layout=layout_of([("a", (3, 4), "float32")])),
        meeting(key=OTHER_KEY),
        meeting(key=None),
    ]
    assert len({ours.key, *(other.key for other in others)}) == 5
    for other in others:
        assert ours.waiting([other.notice(now + 9, looking=True).data, b"", b"x" * 999]) == []
        with pytest.raises(InvalidRecord):
            ours.member(ALICE.peer_id, 1, True, other.introduction())
    with pytest.raises(InvalidRecord, match="others"):
        ours.member(BOB.peer_id, 1, True, meeting(ALICE).introduction())
    assert ours.member(BOB.peer_id, 7, False, meeting(BOB).introduction()).samples == 7


def test_old_introductions_are_not_believed_for_ever() -> None:
    ours, dht = meeting(), MemoryDht(BOB.peer_id, key=KEY)
    bob = Meeting("run", LAYOUT, BOB, dht, gather=30.0)
    dht.time -= CLOCK_SLACK + 120
    old = bob.introduction()
    assert open_record(old, key=KEY, now=dht.now()).peer_id == BOB.peer_id
    with pytest.raises(InvalidRecord):
        ours.member(BOB.peer_id, 1, True, old)


def test_a_layout_is_of_names_shapes_and_dtypes() -> None:
    told = [
        [("a", (2, 3), "float32")],
        [("b", (2, 3), "float32")],
        [("a", (3, 2), "float32")],
        [("a", (2, 3), "bfloat16")],
        [("a", (2, 3), "float32"), ("b", (1,), "float32")],
    ]
    assert len({layout_of(one) for one in told}) == len(told)
