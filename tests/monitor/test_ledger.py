"""Histories outlive the process, and no file on the disk can keep the page from working."""

import logging
import sqlite3
from pathlib import Path

import pytest

from swarm.dht.directory import ModelListing
from swarm.errors import UsageError
from swarm.monitor.history import DAY, History
from swarm.monitor.ledger import Kept, Ledger
from swarm.monitor.roster import Event, Kind
from tests.monitor.simulated import MODEL, NOW

LISTING = ModelListing(MODEL, 4)


def kept(minutes: int = 5, begin: float = NOW) -> dict[str, Kept]:
    history = History()
    history.events.append(Event(begin + 1, Kind.JOINED, "QmA", "Ada", (0, 4)))
    for minute in range(minutes):
        history.look(begin + 60 * minute, 7.0, [1, 2, 300, 0], [("QmA", "Ada", 4)])
    return {"key": Kept(LISTING, begin, history)}


def written(path: Path, what: dict[str, Kept], now: float = NOW) -> None:
    ledger = Ledger(path)
    ledger.load(now)
    ledger.save(ledger.changes(what), now)
    ledger.close()


def read(path: Path, now: float = NOW) -> dict[str, Kept]:
    ledger = Ledger(path)
    try:
        return ledger.load(now)
    finally:
        ledger.close()


def same(one: History, other: History) -> bool:
    for minute in [*one.minutes, *other.minutes]:
        minute.looks = 1  # which nobody needs to know again
    return (one.minutes, one.events, one.served) == (other.minutes, other.events, other.served)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    path, before = tmp_path / "folder" / "h.sqlite", kept()
    written(path, before)
    after = read(path, NOW + 400)
    assert after["key"].listing == LISTING
    assert after["key"].seen == NOW
    assert same(after["key"].history, before["key"].history)


def test_later_changes_are_added_to_what_is_there(tmp_path: Path) -> None:
    path, growing = tmp_path / "h.sqlite", kept()
    ledger = Ledger(path)
    ledger.save(ledger.changes(growing), NOW + 240)
    history = growing["key"].history
    history.look(NOW + 245, 1.0, [0, 0, 0, 0], [])  # in the minute that was written already
    history.look(NOW + 300, 9.0, [1, 1, 1, 1], [("QmB", "", 2)])
    ledger.save(ledger.changes(growing), NOW + 300)
    ledger.close()
    assert same(read(path, NOW + 300)["key"].history, history)


def test_the_file_forgets_what_is_old_and_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    written(path, kept())
    written(path, kept(begin=NOW + 2 * DAY), NOW + 2 * DAY)
    with sqlite3.connect(path) as connection:
        assert connection.execute("select min(at) from minutes").fetchone()[0] >= NOW + 2 * DAY
        assert connection.execute("select count(*) from events").fetchone() == (1,)
    connection.close()
    assert read(path, NOW + 40 * DAY) == {}


@pytest.mark.parametrize("damage", ["noise", "cut", "of another program", "nonsense in it"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "h.sqlite"
    written(path, kept(200))
    if damage == "noise":
        path.write_bytes(b"noise" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        connection = sqlite3.connect(path)
        with connection:
            if damage == "of another program":
                connection.execute("pragma user_version = 99")
            else:
                connection.execute("update events set kind = 'exploded'")
        connection.close()
    with caplog.at_level(logging.WARNING):
        assert read(path) == {}
    assert "damaged" in caplog.text
    assert (tmp_path / "h.sqlite.damaged").exists()
    written(path, kept())
    assert "key" in read(path)


def test_a_disk_that_is_full_is_told_once_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "h.sqlite")
    changes = ledger.changes(kept())
    other = sqlite3.connect(tmp_path / "h.sqlite")
    other.execute("drop table minutes")
    other.commit()
    other.close()
    with caplog.at_level(logging.WARNING):
        ledger.save(changes, NOW)
        ledger.save(changes, NOW)
    assert len(caplog.records) == 1
    assert len(ledger.changes(kept())) == 4, "what was not saved is still to be saved"
    ledger.close()


def test_no_path_means_no_file_and_a_bad_one_is_said_at_once(tmp_path: Path) -> None:
    nowhere = Ledger(None)
    assert nowhere.load(NOW) == {}
    nowhere.save(nowhere.changes(kept()), NOW)
    nowhere.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--history"):
        Ledger(tmp_path / "file" / "h.sqlite")
