"""Real DHT nodes: who gets in, whose records are believed, and what survives whom."""

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, PeerID

from swarm.dht import node as node_module
from swarm.dht.node import DhtNode
from swarm.dht.records import SignedRecord, dht_key, keys_of, open_record
from swarm.errors import PeerUnavailable, UsageError
from swarm.identity import Identity, SwarmKey
from swarm.loop import BackgroundLoop
from tests.dht.samples import ALICE, BOB, EVE, KEY, MODEL, OTHER_KEY, signed
from tests.waits import wait_until

T = TypeVar("T")


@pytest.fixture(scope="module")
def loop() -> Iterator[BackgroundLoop]:
    background = BackgroundLoop()
    yield background
    background.close()


class Swarm:
    """Nodes that a test makes, and that end with it."""

    def __init__(self, loop: BackgroundLoop) -> None:
        self.loop, self.nodes = loop, []
        self.addresses: list[str] = []

    def call(self, work: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await work

        return self.loop.call(awaited(), 60)

    def add(self, identity: Identity | None = None, **options: Any) -> DhtNode:
        options = {"initial_peers": self.addresses} | options
        node = self.call(DhtNode.create(identity or Identity.ephemeral(), **options))
        self.nodes.append(node)
        self.addresses = self.addresses or self.call(node.visible_addresses())
        return node

    def announce(self, node: DhtNode, blocks: str = "0:8") -> SignedRecord:
        server = signed(node.identity, blocks, now=node.now(), key=node.key)
        keys = keys_of(server.record, node.key)
        assert self.call(node.store(keys, server.data, server.record.kept_until))
        return server

    def look(self, node: DhtNode) -> list[bytes]:
        found = self.call(node.get_many([dht_key(MODEL, i, "", node.key) for i in range(3)]))
        return [value for values in found.values() for value in values]


@pytest.fixture
def swarm(loop: BackgroundLoop) -> Iterator[Swarm]:
    swarm = Swarm(loop)
    yield swarm
    for node in swarm.nodes:
        swarm.call(node.close())


def test_identity_files_are_those_of_libp2p(tmp_path: Path) -> None:
    ours = Identity.load_or_create(tmp_path / "ours")
    P2P.generate_identity(str(tmp_path / "theirs"))
    theirs = Identity.load_or_create(tmp_path / "theirs")
    for name, identity in [("ours", ours), ("theirs", theirs)]:
        expected = PeerID.from_identity((tmp_path / name).read_bytes()).to_base58()
        assert identity.peer_id == expected


@pytest.mark.parametrize("key", [None, KEY])
def test_records_reach_clients_and_outlive_the_bootstrap_node(
    swarm: Swarm, key: SwarmKey | None
) -> None:
    bootstrap = swarm.add(key=key)
    alice, bob = swarm.add(ALICE, key=key), swarm.add(BOB, key=key)
    reader = swarm.add(key=key, client_mode=True)
    announced = [swarm.announce(alice, "0:8").data, swarm.announce(bob, "0:16").data]
    assert sorted(swarm.look(reader)) == sorted(announced)
    swarm.call(bootstrap.close())
    assert sorted(swarm.look(reader)) == sorted(announced)
    assert sorted(swarm.look(alice)) == sorted(announced)


def test_a_node_on_loopback_listens_nowhere_else_and_says_so(swarm: Swarm) -> None:
    node = swarm.add(ALICE)
    (address,) = swarm.call(node.visible_addresses())
    assert address.startswith("/ip4/127.0.0.1/tcp/")
    assert address.endswith(f"/p2p/{ALICE.peer_id}")


def test_a_node_relays_nothing_for_strangers(swarm: Swarm) -> None:
    """p2pd does, unless it is told twice not to."""
    node, stranger = swarm.add(), swarm.add(client_mode=True)
    them = PeerID.from_base58(node.identity.peer_id)
    p2p = swarm.call(stranger.p2p())
    with pytest.raises(P2PDaemonError, match="protocols not supported"):
        swarm.call(p2p.call_binary_stream_handler(them, "/libp2p/circuit/relay/0.2.0/hop"))


def test_forged_records_are_refused_and_hide_nobody(swarm: Swarm) -> None:
    bootstrap, eve = swarm.add(), swarm.add(EVE)
    reader = swarm.add(client_mode=True)
    honest = swarm.announce(swarm.add(ALICE), "0:8")
    bucket = DHTID.generate(keys_of(honest.record, None)[0])
    own = signed(EVE, "0:8", now=eve.now())
    internals: Any = eve._dht
    internals.protocol.record_validator = None  # Eve runs a program of her own
    boss = PeerID.from_base58(bootstrap.identity.peer_id)

    async def store(value: bytes, subkey: str | None, kept_until: float) -> list[bool]:
        return await internals.protocol.call_store(boss, [bucket], [value], kept_until, [subkey])

    for value, subkey, kept_until in [
        (own.data, ALICE.peer_id, own.record.kept_until),
        (honest.data, ALICE.peer_id, honest.record.kept_until + 60),
        (own.data, None, own.record.kept_until),
        (b"\xff" * 600, EVE.peer_id, own.record.kept_until),
        (own.data + bytes(1 << 20), EVE.peer_id, own.record.kept_until),
        (own.data, "x" * 46, own.record.kept_until),
    ]:
        assert swarm.call(store(value, subkey, kept_until)) == [False]
    for subkey in (ALICE.peer_id, EVE.peer_id, "x"):  # Eve lies when she is asked
        internals.protocol.storage.store(bucket, b"lie", honest.record.kept_until + 9, subkey)
    assert swarm.look(reader) == [honest.data]
    assert swarm.look(bootstrap) == [honest.data]


def test_a_record_put_into_a_cache_hides_nobody(swarm: Swarm) -> None:
    """hivemind's nodes keep whatever others call cached beside what is stored, and prefer it."""
    bootstrap, eve = swarm.add(), swarm.add(EVE)
    honest = swarm.announce(swarm.add(ALICE), "0:8")
    later = signed(EVE, "0:8", now=eve.now() + 3600)
    bucket = DHTID.generate(keys_of(honest.record, None)[0])
    internals: Any = eve._dht
    kept_until = later.record.kept_until

    async def cache() -> None:
        for node in swarm.nodes:
            if node is not eve:
                boss = PeerID.from_base58(node.identity.peer_id)
                entry = [bucket], [later.data], kept_until, [EVE.peer_id]
                assert await internals.protocol.call_store(boss, *entry, in_cache=True) == [True]
        internals.protocol.cache.store(bucket, later.data, kept_until, EVE.peer_id)

    swarm.call(cache())
    reader = swarm.add(client_mode=True)
    assert set(swarm.look(reader)) == {honest.data, later.data}
    assert set(swarm.look(bootstrap)) == {honest.data, later.data}


def test_a_node_that_claims_to_be_all_of_the_nearest_hides_nobody(swarm: Swarm) -> None:
    """Where a node is in the table follows from who it is."""
    swarm.add()
    eve = swarm.add(EVE)
    honest = swarm.announce(swarm.add(ALICE), "0:8")
    protocol: Any = eve._dht.protocol  # pyright: ignore[reportOptionalMemberAccess]
    me = PeerID.from_base58(EVE.peer_id)

    def nearest(key: DHTID, k: int, exclude: object = None) -> list[tuple[DHTID, PeerID]]:
        return [(DHTID(int(key) ^ number), me) for number in range(2, 2 + k)]

    protocol.routing_table.get_nearest_neighbors = nearest
    protocol.storage.get = protocol.cache.get = lambda key: None
    assert swarm.look(swarm.add(client_mode=True)) == [honest.data]


@pytest.mark.parametrize(("ours", "theirs"), [(None, KEY), (KEY, None), (OTHER_KEY, KEY)])
def test_nobody_joins_without_the_swarm_key(
    swarm: Swarm, ours: SwarmKey | None, theirs: SwarmKey | None, caplog: pytest.LogCaptureFixture
) -> None:
    bootstrap = swarm.add(key=theirs)
    with (
        caplog.at_level(logging.INFO, "swarm.dht"),
        pytest.raises(UsageError, match="check the swarm key"),
    ):
        swarm.add(key=ours)
    assert re.search(r"peer \w+ does not (let us in: its swarm|hold our swarm key)", caplog.text)
    assert "Error" not in caplog.text
    internals: Any = bootstrap._dht
    assert theirs is None or not internals.protocol.routing_table.uid_to_peer_id


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("foo", "is not the address of a peer"),
        ("/ip4/127.0.0.1/tcp/9", "is not the address of a peer"),
        (f"/ip4/127.0.0.1/p2p/{BOB.peer_id}", "is not the address of a peer"),
        (f"/ip4/1.2.3/tcp/9/p2p/{BOB.peer_id}", "is not the address of a peer"),
        (f"/ip4/127.0.0.1/tcp/9/p2p/{BOB.peer_id}", "no peers reachable at .*: check"),
    ],
    ids=["word", "no peer", "no port", "no host", "nobody"],  # BOB's id is another in each worker
)
def test_wrong_peers_are_told_in_one_sentence(swarm: Swarm, address: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        swarm.add(initial_peers=[address])


def test_a_peer_with_another_identity_is_not_the_one_we_meant(swarm: Swarm) -> None:
    (address,) = swarm.call(swarm.add().visible_addresses())
    wrong = address.rsplit("/", 1)[0] + "/" + BOB.peer_id
    with pytest.raises(UsageError, match="no peers reachable"):
        swarm.add(initial_peers=[wrong])


def test_a_silent_peer_is_not_said_to_refuse_us(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm.add()
    monkeypatch.setattr(node_module, "_GREETING_SECONDS", 0.0)
    with pytest.raises(UsageError, match="do not answer: try again"):
        swarm.add()


def test_a_port_in_use_is_told_in_one_sentence(swarm: Swarm) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UsageError, match=r"in use.*check its host and port"),
    ):
        swarm.add(port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="not an IP address"):
        swarm.add(host="example.invalid")


def test_one_answering_peer_of_several_is_enough(swarm: Swarm) -> None:
    bootstrap = swarm.add()
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{BOB.peer_id}"
    server = swarm.announce(swarm.add(ALICE, initial_peers=[dead, *swarm.addresses]))
    assert swarm.look(bootstrap) == [server.data]


@pytest.mark.parametrize("dead", ["daemon", "reader"])
def test_a_daemon_that_dies_is_replaced(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, dead: str
) -> None:
    monkeypatch.setattr(node_module, "_REJOIN_SECONDS", 0.05)
    swarm.add()
    alice, bob = swarm.add(ALICE), swarm.add(BOB)
    server = swarm.announce(alice)
    internals: Any = bob
    if dead == "daemon":
        internals._daemon._process.kill()
    else:  # what reads from it for us, which makes us deaf
        swarm.loop.call_soon(internals._control._read_task.cancel)

    def found() -> bool:
        try:
            return swarm.look(bob) == [server.data]
        except PeerUnavailable:
            return False

    wait_until(found)


def test_a_bootstrap_node_that_comes_back_is_met_again(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "_REJOIN_SECONDS", 0.05)
    bootstrap = swarm.add(BOB)
    port = int(swarm.addresses[0].split("/")[4])
    alice = swarm.add(ALICE)
    server = swarm.announce(alice)
    swarm.call(bootstrap.close())
    assert swarm.look(alice) == [server.data]  # its own copy
    with pytest.raises(PeerUnavailable):
        swarm.look(alice)  # it has noticed that nobody is left to ask
    swarm.add(BOB, port=port, initial_peers=[])
    reader = swarm.add(client_mode=True)
    wait_until(lambda: swarm.look(reader) == [server.data])


def test_a_wrong_clock_is_corrected_by_the_others(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm.add()
    real = time.time
    monkeypatch.setattr(node_module.time, "time", lambda: real() - 3_000)
    late = swarm.add(client_mode=True)
    assert abs(late.now() - real()) < 5


_CHILD = """
import asyncio, sys
from swarm.dht.node import DhtNode
from swarm.identity import Identity
from swarm.loop import run

async def main():
    node = await DhtNode.create(Identity.ephemeral())
    print(node._daemon.control, *(await node.visible_addresses()), flush=True)
    await asyncio.Event().wait()

run(main())
"""


def test_no_daemon_outlives_a_parent_that_is_killed(swarm: Swarm) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    with parent:
        control, address = parent.stdout.readline().split()
        port = int(address.split("/")[4])
        socket.create_connection(("127.0.0.1", port), 5).close()
        parent.kill()
        _, errors = parent.communicate(timeout=60)
    wait_until(lambda: not Path(control).exists())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    assert errors == ""


def test_closing_leaves_nothing_behind_and_may_be_repeated(swarm: Swarm) -> None:
    node = swarm.add()
    internals: Any = node._daemon
    swarm.call(node.close())
    swarm.call(node.close())
    assert not internals.control.exists()
    with pytest.raises(PeerUnavailable):
        swarm.look(node)


def test_plain_asyncio_will_do() -> None:
    async def scenario() -> bool:
        alice = await DhtNode.create(ALICE)
        server = signed(ALICE, now=alice.now())
        try:
            keys = keys_of(server.record, None)
            await alice.store(keys, server.data, server.record.kept_until)
            (data,) = (await alice.get_many(keys[:1]))[keys[0]]
            return open_record(data, key=None, now=alice.now()) == server.record
        finally:
            await alice.close()

    assert asyncio.run(scenario())
