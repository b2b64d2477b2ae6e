"""p2pd as our child: it starts, it ends with us however that happens, and it leaves nothing."""

import importlib.resources
import os
import socket
import stat
import tempfile
from pathlib import Path

import psutil
import pytest
from hivemind import hivemind_cli

from swarm.dht import daemon as daemon_module
from swarm.dht.daemon import Daemon, DaemonFailed, inbox_of
from swarm.loop import run
from tests.dht.samples import ALICE

P2PD = Path(str(importlib.resources.files(hivemind_cli) / "p2pd"))


def left() -> tuple[int, list[str]]:
    """Our open descriptors, and what lies in the temporary folder."""
    names = sorted(path.name for path in Path(tempfile.gettempdir()).iterdir())
    return psutil.Process().num_fds(), names


@pytest.mark.parametrize("killed", [False, True])
def test_a_daemon_leaves_no_process_no_socket_and_no_descriptor(killed: bool) -> None:
    async def scenario() -> None:
        before = left()
        for _ in range(3):
            daemon = await Daemon.start(P2PD, ALICE, ["-noListenAddrs=1"])
            (process,) = (p for p in psutil.Process().children() if p.name() == "p2pd")
            assert stat.S_IMODE(daemon.control.stat().st_mode) == 0o700
            if killed:
                process.kill()
            await daemon.stop()
            await daemon.stop()
            assert not process.is_running()
            assert left() == before

    run(scenario())


def test_a_daemon_that_fails_says_why_and_leaves_nothing() -> None:
    async def scenario() -> None:
        before = left()
        with pytest.raises(DaemonFailed, match=r"nonsense"):
            await Daemon.start(P2PD, ALICE, ["-hostAddrs=nonsense"])
        assert left() == before

    run(scenario())


def test_sockets_of_the_dead_are_swept_away_and_others_are_not() -> None:
    folder = Path(tempfile.gettempdir())
    dead, young, living = (folder / f"swarm-dht-{name}.sock" for name in ("dead", "young", "live"))
    for path in (dead, young):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))

    async def scenario() -> None:
        await (await Daemon.start(P2PD, ALICE, ["-noListenAddrs=1"])).stop()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(living))
        server.listen()
        for path in (dead, living):
            os.utime(path, (0, 0))
        run(scenario())
    assert [path.exists() for path in (dead, young, living)] == [False, True, True]
    young.unlink()
    living.unlink()


def test_inboxes_of_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody connects to find out: who listens there takes every caller for its daemon."""
    monkeypatch.setattr(daemon_module, "_short_temporary_folder", lambda: tmp_path)

    async def scenario() -> None:
        daemon = await Daemon.start(P2PD, ALICE, ["-noListenAddrs=1"])
        inbox, stale = inbox_of(daemon.control), inbox_of(tmp_path / "swarm-dht-gone.sock")
        inbox.touch()
        stale.touch()
        other = await Daemon.start(P2PD, ALICE, ["-noListenAddrs=1"])
        assert inbox.exists()
        assert not stale.exists()
        await other.stop()
        await daemon.stop()

    run(scenario())
