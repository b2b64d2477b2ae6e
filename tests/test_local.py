"""LocalSwarm's processes do as they are told, and none outlives the swarm or its owner."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from swarm import LocalSwarm
from swarm.cli import main
from swarm.errors import UsageError
from swarm.identity import SwarmKey

KEY = SwarmKey.generate()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set logging up, with this test's stderr in it."""
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """Private, so that keys are passed everywhere; tests add what they end."""
    with LocalSwarm(spans=["0:16", "16:24"], swarm_key=KEY) as swarm:
        yield swarm


def status(swarm: LocalSwarm, key: SwarmKey, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("SWARM_PEERS", f" , {swarm.peers[0]} ")
    monkeypatch.setenv("SWARM_KEY", key.text())
    return main(["status", "--json"])


def test_everybody_is_there(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(swarm, KEY, monkeypatch) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert (model["name"], model["num_blocks"]) == ("swarm-demo", 24)
    assert model["health"] == "degraded"  # one server for each block
    assert model["missing"] == []
    seen = {(s["blocks"], s["address"], s["peer_id"]) for s in model["servers"]}
    assert {(str(s.blocks), s.address, s.peer_id) for s in swarm.servers[:2]} <= seen


def test_without_the_key_nobody_sees_anything(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(swarm, SwarmKey.generate(), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "check the swarm key" in err


def test_servers_come_freeze_and_go(swarm: LocalSwarm) -> None:
    index = swarm.add("20:24")
    server = swarm.servers[index]
    assert server.alive
    assert server.address.startswith("127.0.0.1:")
    swarm.freeze(index)
    assert psutil.Process(server.pid).status() == psutil.STATUS_STOPPED
    swarm.thaw(index)
    daemons = [p for p in psutil.Process(server.pid).children(recursive=True) if p.is_running()]
    assert daemons  # libp2p's, and who watches over it
    assert swarm.stop(index) == 0
    assert not server.alive
    assert psutil.wait_procs(daemons, timeout=5)[1] == []


def test_what_a_server_complains_about_is_shown() -> None:
    swarm = LocalSwarm(spans=["0:2"], server_args=["--bogus"])
    with pytest.raises(UsageError, match=r"unrecognized arguments: --bogus"):
        swarm.__enter__()
    assert not any(server.alive for server in swarm.servers)


OWNER = """
import sys, time
from swarm import LocalSwarm
with LocalSwarm(spans=["0:2"]) as swarm:
    swarm.freeze(0)
    print(swarm._folder, flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    assert folder.parent == Path(tempfile.gettempdir())
    family = [p for p in psutil.process_iter() if _folder_of(p) == str(folder)]
    assert len(family) >= 6  # bootstrap node and server, each with p2pd and its guardian
    guardians = psutil.Process(owner.pid).children()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert psutil.wait_procs(family + guardians, timeout=10)[1] == []
    assert not folder.exists()


def _folder_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("TMPDIR")
    except psutil.Error:
        return None
