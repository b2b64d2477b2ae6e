"""What a node keeps for others is bounded, and no older than a record may be."""

import pytest
from hivemind.dht.routing import DHTID

from swarm.dht import keeping as module
from swarm.dht.keeping import MAX_OF_ONE, Storage
from swarm.dht.pages import MAX_ON_PAGE
from swarm.dht.records import MAX_LIFETIME

KEY, OTHER = DHTID.generate("page"), DHTID.generate("another page")
FAR = 1e12  # as far in the future as its announcer wishes


class Keeping:
    def __init__(self) -> None:
        self.now = 0.0
        self.storage = Storage(lambda: self.now)

    def store(self, name: str, key: DHTID = KEY, version: int = 0) -> bool:
        return self.storage.store_subkey(key, name, b"record", FAR + version)

    def names(self, key: DHTID = KEY) -> set[str]:
        page = self.storage.get(key)
        return {name for name, _ in page.value.items()} if page else set()


def test_who_is_not_heard_of_is_forgotten_whatever_its_clock_says() -> None:
    keeping = Keeping()
    assert keeping.store("gone")
    assert keeping.store("here")
    keeping.now = MAX_LIFETIME - 1
    assert keeping.store("here", version=1)
    assert keeping.names() == {"gone", "here"}
    keeping.now += 60
    assert keeping.names() == {"here"}
    keeping.now += 2 * MAX_LIFETIME
    assert keeping.names() == set()
    assert not len(keeping.storage)
    assert keeping.store("here", version=2)
    assert keeping.names() == {"here"}


def test_a_page_that_is_flooded_keeps_whom_it_knows_and_takes_nobody_else() -> None:
    keeping = Keeping()
    assert keeping.store("honest")
    taken = [keeping.store(f"flood{i}") for i in range(2 * MAX_ON_PAGE)]
    assert sum(taken) == MAX_ON_PAGE - 1
    assert keeping.store("honest", version=1)
    assert not keeping.store("late")
    assert keeping.store("late", OTHER)


def test_an_older_record_never_takes_the_place_of_a_newer_one() -> None:
    keeping = Keeping()
    assert keeping.store("a", version=2)
    assert not keeping.store("a", version=1)


def test_a_peer_that_invents_models_keeps_few_records_and_others_theirs() -> None:
    keeping = Keeping()
    pages = [DHTID.generate(f"invented {i}") for i in range(2 * MAX_OF_ONE)]
    assert sum(keeping.store("flood", page) for page in pages) == MAX_OF_ONE
    assert keeping.store("flood", pages[0], version=1)
    assert keeping.store("honest", pages[0])
    keeping.now = MAX_LIFETIME + 60
    assert keeping.names(pages[0]) == set()
    assert keeping.store("flood", pages[-1])  # those that it had are gone


def test_many_peers_together_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 10)
    keeping = Keeping()
    assert keeping.store("honest")
    pages = [DHTID.generate(f"page {i}") for i in range(20)]
    assert sum(keeping.store(f"flood{i}", page) for i, page in enumerate(pages)) == 9
    assert keeping.store("honest", version=1)


def test_renewals_leave_nothing_behind() -> None:
    """Not even the same one, again and again."""
    keeping = Keeping()
    assert keeping.store("a", version=1000)
    for _ in range(100):
        assert not keeping.store("a", version=1000)
    for version in range(1001, 1101):
        assert keeping.store("a", version=version)
    keeping.now = 60
    page = keeping.storage.get(KEY)
    assert len(keeping.storage.expiration_heap) == len(page.value.expiration_heap) == 1
    assert keeping.names() == {"a"}
    keeping.now += 2 * MAX_LIFETIME
    assert keeping.names() == set()
