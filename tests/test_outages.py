"""What the swarm outlives: its bootstrap nodes, whoever a client knew, restarts, wrong clocks.

All of it happens in one swarm, in which every clock but this process's is an hour wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.client.network import SwarmNetwork
from swarm.models.demo import DEMO_MODEL, DEMO_NAME
from tests.machines import PROMPT, Machine, Machines, go_on, see, stop
from tests.waits import wait_until

HOUR = 3600.0
SPANS = {"0:12": HOUR, "12:24": -HOUR}
LONG = 60
pytestmark = pytest.mark.timeout(300)  # as many programs start, on a machine that may be busy


@cache
def expected(count: int) -> list[int]:
    local: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    length = {"max_new_tokens": count, "min_new_tokens": count}
    ids = local.generate(torch.tensor([PROMPT]), do_sample=False, **length)
    return ids[0, len(PROMPT) :].tolist()


class Town:
    """A bootstrap node, a server for each half of the model, two clients: all with odd clocks."""

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        self.bootstrap = self.start_bootstrap("0").ready()
        self.servers = {span: self.start_server(span) for span in SPANS}
        self.clients = [machines.start(["client", self.bootstrap.peers], c) for c in (HOUR, -HOUR)]
        for server in self.servers.values():
            server.ready()
        for client in self.clients:
            client.ask("join")
        for client in self.clients:
            client.ready()

    def start_bootstrap(self, port: str) -> Machine:
        identity = str(self.machines.folder / "bootstrap")
        return self.machines.start(
            ["dht", "--host", "127.0.0.1", "--port", port, "--identity", identity], -HOUR
        )

    def start_server(self, span: str, name: str = "") -> Machine:
        identity = str(self.machines.folder / (name or span))
        arguments = ["--blocks", span, "--host", "127.0.0.1", "--identity", identity]
        command = ["server", DEMO_NAME, *arguments, "--peers", self.bootstrap.peers]
        return self.machines.start(command, SPANS[span])

    @property
    def peer_ids(self) -> set[str]:
        return {server.peer_id for server in self.servers.values()}

    def wait_until_seen_by(self, *peers: str) -> None:
        """By a new client, here, that joins by these; it may have to see records advance."""
        try:
            network = SwarmNetwork.connect(peers, None)
            wait_until(lambda: set(see(network)) == self.peer_ids, 60.0)
        finally:
            SwarmNetwork.leave_all()


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with Machines() as machines:
        yield Town(machines)
    SwarmNetwork.leave_all()


def tells(client: Machine, count: int) -> bool:
    client.ask(f"tell {count}")
    return client.told() == expected(count)


def test_clocks_that_are_wrong_by_an_hour_hide_nobody(town: Town) -> None:
    for client in town.clients:
        wait_until(lambda client=client: client.see() == town.peer_ids)
        assert tells(client, 4)
    town.wait_until_seen_by(town.bootstrap.peers)


def test_a_server_that_is_started_again_is_welcomed_at_once(town: Town) -> None:
    """In the middle of a text that has nobody else to go on with, so that it is soon banned."""
    client, was = town.clients[0], town.servers["12:24"]
    client.ask(f"tell {LONG}")
    told = [client.line() for _ in range(3)]
    was.kill()
    town.servers["12:24"] = town.start_server("12:24").ready()
    assert town.servers["12:24"].peer_id == was.peer_id
    assert [*map(int, told), *client.told()] == expected(LONG)
    for client in town.clients:
        wait_until(lambda client=client: client.see() == town.peer_ids)


def test_the_swarm_goes_on_without_its_bootstrap_node_and_meets_it_again(town: Town) -> None:
    town.bootstrap.kill()
    early, late = (server.peers for server in town.servers.values())
    for peers in (early, late):  # whoever is there can be joined by
        town.wait_until_seen_by(peers)
    for client in town.clients:
        wait_until(lambda client=client: client.see() == town.peer_ids)
        assert tells(client, 4)
    port = town.bootstrap.peers.split("/")[4]
    town.bootstrap = town.start_bootstrap(port).ready()
    town.wait_until_seen_by(town.bootstrap.peers)


def test_a_client_that_slept_while_everybody_was_replaced_goes_on(town: Town) -> None:
    client, gone = town.clients[1], list(town.servers.values())
    client.ask(f"tell {LONG}")
    told = [client.line() for _ in range(3)]
    stop(client)
    for server in gone:
        server.kill()
    town.servers = {span: town.start_server(span, f"new {span}") for span in SPANS}
    for server in town.servers.values():
        server.ready()
    town.wait_until_seen_by(town.bootstrap.peers)  # and nobody else: records died
    go_on(client)
    assert [*map(int, told), *client.told()] == expected(LONG)
    wait_until(lambda: client.see() == town.peer_ids)
