"""A town that the tests of one file share; after each test nobody is owed anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.stranger import Stranger, Talk, assert_same, expected_of, hidden_of
from tests.server.town import Town


@pytest.fixture(scope="module")
def shared() -> Iterator[Town]:
    with Town() as town:
        yield town


@pytest.fixture
def town(shared: Town) -> Iterator[Town]:
    """Somebody else's session goes on whatever a test does, and all memory comes back."""
    text = hidden_of(shared.local, 6, seed=7)
    bystander: Talk = shared.run(Stranger(shared.swarm, client=96).open(shared.server))
    shared.run(bystander.ask(text[:, :4]))
    yield shared
    got = shared.run(bystander.ask(text[:, 4:]))
    assert_same(got, expected_of(shared.local, text[:, :4], text[:, 4:]))
    shared.swarm.on_loop(bystander.stream.cancel)
    shared.run(shared.honest())
    shared.swarm.assert_quiet()
