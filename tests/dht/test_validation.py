"""The rules by which every DHT node judges values."""

from dataclasses import replace

import pytest

from swarm.dht.records import REGISTRY, ServerRecord, SignedRecord, keys_of
from swarm.dht.validation import Entry, check_entry
from swarm.errors import InvalidRecord
from swarm.identity import SwarmKey
from tests.dht.samples import ALICE, BOB, KEY, NOW, OTHER_KEY, signed


def entry(server: SignedRecord, key: SwarmKey | None = None, place: int = 0) -> Entry:
    name = keys_of(server.record, key)[place]
    return Entry(name.encode(), server.record.peer_id, server.data, server.record.kept_until)


def check(value: Entry, key: SwarmKey | None = None) -> ServerRecord:
    return check_entry(value, swarm_key=key, now=NOW, hashed=str.encode)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("place", [0, 1])
def test_a_record_is_kept_in_its_bucket_and_in_the_registry(
    key: SwarmKey | None, place: int
) -> None:
    server = signed(ALICE, "8:16", key=key)
    assert check(entry(server, key, place), key) == server.record


def test_a_peer_may_not_write_in_anothers_place() -> None:
    with pytest.raises(InvalidRecord, match="in the place of"):
        check(replace(entry(signed(ALICE)), subkey=BOB.peer_id))


def test_an_old_record_cannot_be_given_a_longer_life() -> None:
    good = entry(signed(ALICE))
    for kept_until in (good.kept_until + 1, float("inf"), float("nan"), 0.0):
        with pytest.raises(InvalidRecord, match="expiry"):
            check(replace(good, kept_until=kept_until))


def test_a_record_under_anothers_key_is_refused() -> None:
    elsewhere = entry(signed(BOB, "16:24"))
    with pytest.raises(InvalidRecord, match="under a key of others"):
        check(replace(entry(signed(ALICE, "0:8")), key=elsewhere.key))


def test_strangers_cannot_write_into_a_private_swarm() -> None:
    for key in (None, OTHER_KEY):
        stranger = signed(ALICE, key=key)
        hidden = KEY.hide(REGISTRY).encode()
        with pytest.raises(InvalidRecord):
            check(replace(entry(stranger, key), key=hidden), KEY)
