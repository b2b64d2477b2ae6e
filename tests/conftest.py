"""The house rules of every test: seeded, offline, in a folder of its own, and nothing left behind.

They hold from this file's import on, which comes before any test imports torch or huggingface_hub.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import psutil
import pytest

# Folders of failed tests stay where people look for them; everything else goes to HOUSE.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
HOUSE = Path(tempfile.mkdtemp(prefix="t-"))  # short: sockets in it have at most 107 characters
tempfile.tempdir = str(HOUSE)
for name in ("HF_TOKEN", "SWARM_PEERS", "SWARM_KEY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
os.environ |= {
    "TMPDIR": str(HOUSE),  # children inherit it, and are known by it
    "XDG_CACHE_HOME": str(HOUSE / "cache"),
    "SWARM_CACHE": str(HOUSE / "cache" / "swarm"),
    "HF_HOME": str(HOUSE / "cache" / "hf"),
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody there; tests/hub.py stands in where one is needed
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}

# Machines are shared and slow at times, hence no deadline; the same examples for everybody.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


def stay_at_home(event: str, args: tuple[object, ...]) -> None:
    """An audit hook that lets nobody in this process connect to another machine."""
    if event != "socket.connect" or not isinstance(args[1], tuple):
        return
    host = str(args[1][0]).partition("%")[0]
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        pytest.fail(f"a test connects to {host}, but tests never leave this machine")


sys.addaudithook(stay_at_home)


# Those that take longest, which go first, so that no worker has to wait for another's in the end.
LONGEST = (
    *("end_to_end", "beginnings", "outages", "local", "monitor.page", "split", "leaving"),
    *("server.moving", "client.families", "cli", "api.page", "client.training_deaths"),
    *("server.node", "client.mixture", "dht.node", "client.training_lora", "client.federated"),
    *("examples", "client.streams", "models.selftest", "client.keep", "client.moving"),
    *("api.process", "simulation.simulation", "client.survival_of_all", "readme", "dht.hivemind"),
)


def rank(item: pytest.Item) -> int:
    file = item.path.relative_to(Path(__file__).parent).with_suffix("")
    name = ".".join(file.parts).replace("test_", "")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if all(item.path.is_relative_to(Path(__file__).parent) for item in items):
        items.sort(key=rank)


def pytest_unconfigure() -> None:
    if "tests.nursery" in sys.modules:
        sys.modules["tests.nursery"].NURSERY.close()
    shutil.rmtree(HOUSE, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def unlogged() -> Iterator[None]:
    """A command that a test runs in this process logs to that test's stderr, which ends with it.

    Written to later, each line ends in a traceback; Python before 3.11.8 parses to show one, and
    two threads that parse at once (the other: pytest, at any import of anyio) end in a SystemError.
    """
    ours, root = logging.getLogger("swarm"), logging.getLogger()
    levels = ours.level, root.level
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    ours.setLevel(levels[0])
    root.setLevel(levels[1])


def nursery_pid() -> int | None:
    """It lives as long as we do (tests/nursery.py)."""
    return sys.modules["tests.nursery"].NURSERY.pid if "tests.nursery" in sys.modules else None


def our_processes() -> list[psutil.Process]:
    """What tests of this process started, also if its parent is dead by now (as p2pd's may be)."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            home = process.environ().get("TMPDIR", "")  # or in it, as LocalSwarm's children
            if not home.startswith(str(HOUSE)) or process.pid in (os.getpid(), nursery_pid()):
                continue
            # Python's own helper of shared memory lives as long as we do.
            if not any("resource_tracker" in word for word in process.cmdline()):
                found.append(process)
    return found


def our_ports() -> list[int]:
    connections = psutil.Process().net_connections("tcp")
    return [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Processes, ports and folders live no longer than the file of tests that made them."""
    yield
    _, alive = psutil.wait_procs(our_processes(), timeout=20)
    left = [f"process {' '.join(process.cmdline()[:4])}" for process in alive]
    for process in alive:
        process.kill()
    left += [f"port {port}" for port in our_ports()]
    for path in HOUSE.glob("swarm-*"):
        left.append(f"path {path.name}")
        with suppress(OSError):  # else every later file of tests is blamed for it, too
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left:
        pytest.fail("left behind: " + "; ".join(left))
