"""Two halves of a split network work apart and join again: hosts in network namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.models.demo import DEMO_NAME
from tests.machines import Machines, Network
from tests.test_outages import expected
from tests.waits import wait_until

COUNT = 12
pytestmark = pytest.mark.timeout(300)  # five programs start, on a machine that may be busy


class Half:
    """A server for all blocks, and a client, on one host."""

    def __init__(self, machines: Machines, host: int, address: str, peers: str) -> None:
        at = ["--host", address, "--blocks", "0:24", "--peers", peers]
        self.server = machines.start(["server", DEMO_NAME, *at], namespace=host)
        self.client = machines.start(["client", peers], namespace=host)

    def works(self) -> bool:
        self.client.ask(f"tell {COUNT}")
        return self.client.told() == expected(COUNT)


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


def test_halves_of_a_split_network_work_apart_and_join_again(
    machines: Machines, tmp_path: Path
) -> None:
    """The only bootstrap node dies meanwhile, so they must remember each other."""
    network = Network(machines)
    bootstrap = machines.start(
        ["dht", "--host", "10.77.0.1", "--port", "0", "--identity", str(tmp_path / "bootstrap")],
        namespace=network.hosts[0],
    ).ready()
    halves = [
        Half(machines, host, f"10.77.0.{number}", bootstrap.peers)
        for number, host in enumerate(network.hosts, 1)
    ]
    for half in halves:
        half.server.ready()
        half.client.ask("join")
    for half in halves:
        half.client.ready()
    everybody = {half.server.peer_id for half in halves}
    for half in halves:
        wait_until(lambda half=half: half.client.see() == everybody)

    network.split()
    bootstrap.kill()
    for half in halves:
        wait_until(lambda half=half: half.client.see() == {half.server.peer_id}, 60.0)
        assert half.works()

    network.heal()
    for half in halves:
        wait_until(lambda half=half: half.client.see() == everybody, 60.0)
    halves[0].server.kill()  # so that its client must use the other half's
    assert halves[0].works()
