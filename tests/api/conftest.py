"""What the tests of the API share."""

from collections.abc import Iterator

import pytest

from tests.api.site import DemoSwarm, serving
from tests.browser import browser, visit

__all__ = ["browser", "visit"]


@pytest.fixture(scope="module")
def demo() -> Iterator[DemoSwarm]:
    """Everybody is back before each test that uses `talk`."""
    demo = DemoSwarm()
    with demo.swarm:
        yield demo
        demo.swarm.assert_quiet()


@pytest.fixture(scope="module")
def address(demo: DemoSwarm) -> Iterator[str]:
    """Of an API over that swarm."""
    with serving(demo.api) as url:
        yield url


@pytest.fixture
def whole(demo: DemoSwarm) -> Iterator[DemoSwarm]:
    """All servers live, before and after."""
    for server in demo.swarm.servers:
        demo.swarm.revive(server)
    yield demo
    for server in demo.swarm.servers:
        demo.swarm.revive(server)
