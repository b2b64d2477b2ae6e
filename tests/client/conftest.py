"""A house that the tests of one file share; everybody is back before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.twins import House


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    """Three spans, two servers for each."""
    with House() as house:
        yield house


@pytest.fixture
def house(shared: House) -> Iterator[House]:
    shared.swarm.no_trap()
    for server in shared.servers:
        shared.swarm.revive(server)
    shared.swarm.router.failures.clear()
    yield shared
    shared.swarm.no_trap()
    shared.swarm.assert_quiet()
