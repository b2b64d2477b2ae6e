"""A server's record: fresh while it lives, prompt when it changes, withdrawn when it leaves."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from swarm.dht import directory as directory_module
from swarm.dht.announcer import REGISTRY_ENTRIES, Announcer, should_register
from swarm.dht.memory import MemoryDht, Values
from swarm.dht.records import REGISTRY, ServerRecord, ServerState, keys_of, open_record
from swarm.errors import PeerUnavailable
from swarm.identity import Identity
from tests.dht.samples import ALICE, KEY, NOW, record


class Server:
    """Announces itself; `told` is what the DHT has heard from it, in order."""

    def __init__(self, identity: Identity = ALICE, values: Values | None = None) -> None:
        self.dht = _ListeningDht(identity.peer_id, values)
        self.facts: ServerRecord = record(identity, "0:8", now=0, lifetime=90)
        self.announcer = Announcer(self.dht, identity, lambda: self.facts, random.Random(1))

    @property
    def told(self) -> list[ServerRecord]:
        return [open_record(v, key=None, now=self.dht.time) for _, v in self.dht.stores]


class _ListeningDht(MemoryDht):
    def __init__(self, peer_id: str, values: Values | None) -> None:
        super().__init__(peer_id, values)
        self.stores: list[tuple[list[str], bytes]] = []
        self.heard = asyncio.Event()

    async def store(self, keys: Sequence[str], value: bytes, kept_until: float) -> bool:
        stored = await super().store(keys, value, kept_until)
        self.stores.append((list(keys), value))
        self.heard.set()
        return stored


async def _until(condition: Callable[[], bool], dht: _ListeningDht) -> None:
    async with asyncio.timeouts.timeout(5):
        while not condition():
            dht.heard.clear()
            await dht.heard.wait()


def _skip_waits(monkeypatch: pytest.MonkeyPatch, waited: Callable[[float], None]) -> None:
    def timeout(seconds: float) -> asyncio.Timeout:
        waited(seconds)
        return asyncio.timeouts.timeout(0)

    monkeypatch.setattr("swarm.dht.announcer.asyncio.timeout", timeout)


def test_a_change_is_told_at_once() -> None:
    async def scenario() -> None:
        server = Server()
        task = asyncio.create_task(server.announcer.run())
        await _until(lambda: len(server.told) == 1, server.dht)
        server.facts = server.facts.model_copy(update={"queue": 9})
        server.announcer.changed()
        await _until(lambda: len(server.told) == 2, server.dht)
        task.cancel()
        first, second = server.told
        assert (first.queue, second.queue) == (0, 9)
        assert second.announced_at > first.announced_at  # or nodes would keep the first
        assert server.announcer.signed is not None
        assert server.announcer.signed.record == second

    asyncio.run(scenario())


def test_records_are_refreshed_before_they_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        server = Server()
        waits: list[float] = []
        _skip_waits(monkeypatch, waits.append)
        task = asyncio.create_task(server.announcer.run())
        await _until(lambda: len(server.told) == 20, server.dht)
        task.cancel()
        assert all(24 <= wait <= 36 for wait in waits)  # a third of 90 s, a fifth more or less
        assert len(set(waits)) > 10

    asyncio.run(scenario())


def test_a_dht_that_is_down_is_tried_again_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        server = Server()
        server.dht.down = True
        waits: list[float] = []

        def waited(seconds: float) -> None:
            waits.append(seconds)
            server.dht.down = len(waits) < 8

        _skip_waits(monkeypatch, waited)
        task = asyncio.create_task(server.announcer.run())
        await _until(lambda: len(server.told) == 1, server.dht)
        task.cancel()
        assert 0.8 <= waits[0] <= 1.2
        assert waits[0] < waits[1] < waits[2] < waits[3]
        assert max(waits) <= 36

    asyncio.run(scenario())


def test_a_farewell_replaces_the_record_everywhere() -> None:
    async def scenario() -> None:
        server = Server()
        await server.announcer.publish()
        await server.announcer.withdraw()
        for key in keys_of(server.facts, None):
            (data,) = (await server.dht.get_many([key]))[key]
            assert open_record(data, key=None, now=NOW).state is ServerState.OFFLINE
        server.dht.down = True
        await server.announcer.withdraw()  # nobody listens: no error, nothing to wait for

    asyncio.run(scenario())


def test_publishing_into_a_dead_dht_says_so() -> None:
    async def scenario() -> None:
        server = Server()
        server.dht.down = True
        with pytest.raises(PeerUnavailable):
            await server.announcer.publish()

    asyncio.run(scenario())


def test_a_clock_that_was_set_back_does_not_silence_a_server() -> None:
    async def scenario() -> None:
        before = Server()
        before.dht.time = NOW + 1_800
        await before.announcer.publish()
        after = Server(values=before.dht.values)  # restarted, half an hour earlier
        await after.announcer.publish()
        key = keys_of(after.facts, None)[0]
        (data,) = (await after.dht.get_many([key]))[key]
        assert after.announcer.signed is not None
        assert data == after.announcer.signed.data

    asyncio.run(scenario())


def test_the_registry_lists_some_servers_of_each_model_and_not_all() -> None:
    async def scenario() -> None:
        values: Values = {}
        servers = [Server(Identity.ephemeral(), values) for _ in range(REGISTRY_ENTRIES + 3)]
        for server in servers:
            await server.announcer.publish()
        assert len(values[REGISTRY]) == REGISTRY_ENTRIES
        assert len(values[keys_of(servers[0].facts, None)[0]]) == len(servers)
        for server in servers:
            await server.announcer.publish()
        assert len(values[REGISTRY]) == REGISTRY_ENTRIES

    asyncio.run(scenario())


def test_the_registry_makes_room_for_the_dead() -> None:
    listed = [record(Identity.ephemeral(), lifetime=90) for _ in range(REGISTRY_ENTRIES)]
    assert not should_register(record(ALICE), listed, NOW)
    assert should_register(record(ALICE), listed, NOW + 91)


def test_private_records_are_sealed() -> None:
    async def scenario() -> None:
        dht = MemoryDht(ALICE.peer_id, key=KEY)
        facts = record(ALICE)
        published = await Announcer(dht, ALICE, lambda: facts, random.Random(1)).publish()
        assert set(dht.values) == set(keys_of(facts, KEY))
        assert open_record(published.data, key=KEY, now=NOW).peer_id == ALICE.peer_id
        assert ALICE.public_key not in published.data

    asyncio.run(scenario())


class Crowded(Server):
    """Among others, whose records are not really signed, as keys take long to make."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: int, bits: int) -> None:
        super().__init__()
        like = record(ALICE, page_bits=bits)
        self.others = {
            str(i).encode(): like.model_copy(update={"peer_id": f"other{i}"}) for i in range(others)
        }
        really = directory_module.open_record

        def opened(data: bytes, **options: Any) -> ServerRecord:
            return self.others.get(data) or really(data, **options)

        monkeypatch.setattr(directory_module, "open_record", opened)
        for count, (name, other) in enumerate(self.others.items()):
            for key in keys_of(other, None)[: None if count < REGISTRY_ENTRIES else -1]:
                self.dht.values.setdefault(key, {})[other.peer_id] = (name, NOW + 1e6)

    def publish(self) -> int:
        """How many bits its page has then."""
        return asyncio.run(self.announcer.publish()).record.page_bits


@pytest.mark.parametrize(("others", "bits", "chosen"), [(5, 0, 0), (40, 0, 1), (300, 4, 4)])
def test_a_newcomer_finds_out_how_finely_the_others_cut(
    monkeypatch: pytest.MonkeyPatch, others: int, bits: int, chosen: int
) -> None:
    server = Crowded(monkeypatch, others, bits)
    assert server.publish() == chosen
    (keys, _), *_ = server.dht.stores
    assert len(keys) <= 4
    assert set(keys) <= set(keys_of(server.told[0], None))


def test_a_server_follows_the_others_and_looks_at_little(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Crowded(monkeypatch, 600, 5)
    server.announcer._bits, server.announcer._bucket = 1, 0  # from when there were few
    assert [server.publish() for _ in range(40)][-1] in (4, 5)
    assert sum(map(len, server.dht.asked)) < 2.5 * 40
    assert sum(REGISTRY in keys for keys in server.dht.asked) <= 4


def test_where_there_is_no_room_a_server_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Crowded(monkeypatch, 256, 0)
    server.announcer._bucket = 0  # it was here before the others came, and does not count them

    async def refuse(*_: object) -> bool:
        return False

    monkeypatch.setattr(server.dht, "store", refuse)
    server.publish()
    assert server.announcer._bits == 1
