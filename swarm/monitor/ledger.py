"""Keeps histories in an SQLite file, so that they outlive the process: small, and never fatal.

A file that cannot be read is set aside; one that cannot be written costs the history, not the page.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from swarm.dht.directory import ModelListing
from swarm.errors import UsageError
from swarm.monitor.history import DAY, History, Minute, Served
from swarm.monitor.roster import Event, Kind
from swarm.types import ModelId

logger = logging.getLogger(__name__)

_VERSION = 1
_PAGES = 1 << 14  # of 4 KiB: the file's greatest size is 64 MiB
_FORGOTTEN = 30 * DAY
_SCHEMA = f"""
pragma user_version = {_VERSION};
create table models (
    key text primary key, name text, fingerprint text, num_blocks integer, seen real);
create table minutes (
    key text, at integer, tokens real, servers integer, low blob, primary key (key, at)
) without rowid;
create table events (
    key text, at real, kind text, peer_id text, name text, first integer, beyond integer,
    primary key (key, at, peer_id, kind)) without rowid;
create table served (
    key text, peer_id text, name text, block_seconds real, first real, last real,
    primary key (key, peer_id)) without rowid;
"""
_MODEL = "insert or replace into models values (?, ?, ?, ?, ?)"
_MINUTE = "insert or replace into minutes values (?, ?, ?, ?, ?)"
_EVENT = "insert or replace into events values (?, ?, ?, ?, ?, ?, ?)"
_SERVED = "insert or replace into served values (?, ?, ?, ?, ?, ?)"
_DAMAGE = (sqlite3.Error, ValueError, TypeError, UsageError)  # of what is read: also by a stranger

Changes = dict[str, list[tuple[object, ...]]]
"""Rows by the statement that writes them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A model and its history; `seen` is when somebody last served it, in seconds since 1970."""

    listing: ModelListing
    seen: float
    history: History


class Ledger:
    """None as a path: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        """Raises UsageError if the file cannot be made."""
        self._path = path
        self._saved: dict[str, float] = {}  # until when each model's history is in the file
        self._connection: sqlite3.Connection | None = None
        self._failing = False
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._open(path)
        except (sqlite3.Error, OSError) as error:
            raise UsageError(
                f"cannot keep a history in {path}: {error}; choose another --history"
            ) from error

    def load(self, now: float) -> dict[str, Kept]:
        """What is in the file, by model key. A damaged one is set aside."""
        if self._connection is None:
            return {}
        try:
            return self._read(self._connection, now)
        except _DAMAGE as error:
            self._set_aside(str(error))
            return {}

    def changes(self, kept: Mapping[str, Kept]) -> Changes:
        """What is not in the file yet, as rows: values that stay as they are."""
        changes: Changes = {statement: [] for statement in (_MODEL, _MINUTE, _EVENT, _SERVED)}
        for key, one in kept.items():
            model, history = one.listing.model, one.history
            since = self._saved.get(key, float("-inf")) - 120  # the last minute was not over then
            changes[_MODEL].append(
                (key, model.name, model.fingerprint, one.listing.num_blocks, one.seen)
            )
            changes[_MINUTE] += [
                (key, m.at, m.tokens, m.servers, m.low) for m in history.minutes if m.at > since
            ]
            changes[_EVENT] += [
                (key, e.at, str(e.kind), e.peer_id, e.name, *e.blocks)
                for e in history.events
                if e.at > since
            ]
            changes[_SERVED] += [
                (key, peer_id, s.name, s.block_seconds, s.first, s.last)
                for peer_id, s in history.served.items()
                if s.last > since
            ]
        return changes

    def save(self, changes: Changes, now: float) -> None:
        """Write them, and forget what is old; in any one thread. What fails is logged, once."""
        if self._connection is None:
            return
        try:
            with self._connection as connection:
                for statement, rows in changes.items():
                    connection.executemany(statement, rows)
                _prune(connection, now)
        except sqlite3.Error as error:
            if not self._failing:
                logger.warning("the history is not kept for now (%s): %s", self._path, error)
            self._failing = True
        else:
            self._failing = False
            self._saved = {str(row[0]): now for row in changes[_MODEL]}

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self, path: Path) -> sqlite3.Connection:
        # Used by one thread at a time, not always the same one.
        connection = sqlite3.connect(path, timeout=2.0, check_same_thread=False)
        try:
            connection.execute(f"pragma max_page_count = {_PAGES}")
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
            version = connection.execute("pragma user_version").fetchone()[0]
            whole = connection.execute("pragma quick_check(1)").fetchone()[0]
            if version == 0 and whole == "ok":
                connection.executescript(f"begin; {_SCHEMA} commit;")
            elif version != _VERSION or whole != "ok":
                raise sqlite3.DatabaseError(f"it is of version {version}: {whole}"[:200])
        except sqlite3.OperationalError:  # locked, read-only, no room: not the file's fault
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            if not path.exists():
                raise
            self._move(path, str(error))
            return self._open(path)
        return connection

    def _set_aside(self, why: str) -> None:
        path = self._path
        assert path is not None
        self.close()
        try:
            self._move(path, why)
            self._connection = self._open(path)
        except (sqlite3.Error, OSError) as error:
            logger.warning("no history is kept: %s", error)

    def _move(self, path: Path, why: str) -> None:
        """One damaged file is kept for whoever wants to look; never more."""
        aside = path.with_name(f"{path.name}.damaged")
        logger.warning("%s cannot be read (%s): it is now %s", path, why, aside.name)
        path.replace(aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                path.with_name(path.name + suffix).unlink()

    def _read(self, connection: sqlite3.Connection, now: float) -> dict[str, Kept]:
        _prune(connection, now)
        kept: dict[str, Kept] = {}
        with closing(connection.cursor()) as cursor:
            for key, name, fingerprint, num_blocks, seen in cursor.execute(
                "select key, name, fingerprint, num_blocks, seen from models"
            ):
                listing = ModelListing(ModelId(str(name), str(fingerprint)), int(num_blocks))
                kept[str(key)] = Kept(listing, float(seen), History())
            for key, at, tokens, servers, low in cursor.execute(
                "select key, at, tokens, servers, low from minutes order by at"
            ):
                if key in kept:
                    minute = Minute(int(at), float(tokens), int(servers), bytes(low))
                    kept[key].history.minutes.append(minute)
            for key, at, kind, peer_id, name, first, beyond in cursor.execute(
                "select key, at, kind, peer_id, name, first, beyond from events order by at"
            ):
                if key in kept:
                    blocks = int(first), int(beyond)
                    event = Event(float(at), Kind(kind), str(peer_id), str(name), blocks)
                    kept[key].history.events.append(event)
            for key, peer_id, *rest in cursor.execute(
                "select key, peer_id, name, block_seconds, first, last from served"
            ):
                if key in kept:
                    name, seconds, first, last = rest
                    served = Served(str(name), float(seconds), float(first), float(last))
                    kept[key].history.served[str(peer_id)] = served
        self._saved = dict.fromkeys(kept, now)
        return kept


def _prune(connection: sqlite3.Connection, now: float) -> None:
    for statement, before in (
        ("delete from minutes where at <= ?", now - DAY),
        ("delete from events where at <= ?", now - DAY),
        ("delete from served where last <= ?", now - _FORGOTTEN),
        ("delete from models where seen <= ?", now - _FORGOTTEN),
    ):
        connection.execute(statement, (before,))
    for table in ("minutes", "events", "served"):
        connection.execute(f"delete from {table} where key not in (select key from models)")  # noqa: S608
    connection.commit()
