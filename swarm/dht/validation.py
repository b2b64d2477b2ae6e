"""Which values a DHT node keeps, passes on and believes: the same rules on every node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarm.dht.records import ServerRecord, keys_of, open_record
from swarm.errors import InvalidRecord
from swarm.identity import SwarmKey


@dataclass(frozen=True, slots=True)
class Entry:
    """One value as the DHT holds it: under a hashed key, for a subkey, until a time (seconds)."""

    key: bytes
    subkey: str
    value: bytes
    kept_until: float


def check_entry(
    entry: Entry, *, swarm_key: SwarmKey | None, now: float, hashed: Callable[[str], bytes]
) -> ServerRecord:
    """The record in an acceptable entry; `hashed` turns a key's name into the DHT's key.

    Raises InvalidRecord, unless the value is a record signed by the peer that the subkey names,
    lies under a key where that record belongs, and is kept exactly as long as it says: a longer
    time would shut out the owner's next record, as the DHT prefers what is kept longest.
    """
    record = open_record(entry.value, key=swarm_key, now=now)
    if entry.subkey != record.peer_id:
        raise InvalidRecord(f"a record of {record.peer_id} in the place of {entry.subkey[:60]}")
    if entry.kept_until != record.kept_until:
        raise InvalidRecord(f"a record of {record.peer_id} with somebody else's expiry")
    if entry.key not in map(hashed, keys_of(record, swarm_key)):
        raise InvalidRecord(f"a record of {record.peer_id} under a key of others")
    return record
