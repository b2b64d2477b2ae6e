"""libp2p's daemon (p2pd) as a child process that never outlives us, however we end."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swarm.errors import SwarmError
from swarm.identity import Identity

logger = logging.getLogger(__name__)

# The shell holds the read end of a pipe whose write end is ours alone: when that closes, by our
# doing or because we were killed, it kills the daemon and removes the folder. It lets go of the
# daemon's output, so that we see the daemon's end there. (macOS has nothing like Linux'
# PR_SET_PDEATHSIG, and that one needs code between fork and exec, which threads make unsafe.)
# It does not `wait`, which was seen to hang in dash when the child had died already.
_GUARDIAN = (
    "folder=$1; shift; trap '' HUP INT TERM; "
    '"$@" </dev/null & exec >/dev/null 2>&1; '
    'read -r _; kill -9 $!; rm -rf "$folder"'
)
_STOP_SECONDS, _LOOK_SECONDS = 3.0, 0.005
_START_SECONDS = 15.0
_SOCKET = "p2pd.sock"


class DaemonFailed(SwarmError):
    """The daemon did not come up; the message is its own."""


class Daemon:
    """A running p2pd; `control` is the path of its Unix socket. Made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.control = folder / _SOCKET
        self.alive = True
        self._process = process
        self._ready = asyncio.Event()
        self._last_line = "it says nothing"
        self._reader = asyncio.create_task(self._read_output())

    @classmethod
    async def start(cls, binary: Path, identity: Identity, arguments: Sequence[str]) -> Daemon:
        """Raises DaemonFailed."""
        folder = Path(tempfile.mkdtemp(prefix="swarm-dht-", dir=_short_temporary_folder()))
        try:
            identity.write(folder / "identity")
            daemon = cls(_spawn(binary, folder, arguments), folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        try:
            async with asyncio.timeout(_START_SECONDS):
                await daemon._ready.wait()
            if not daemon.alive:
                raise DaemonFailed(daemon._last_line)
        except TimeoutError as error:
            await daemon.stop()
            raise DaemonFailed(f"no sign of life in {_START_SECONDS:.0f} s") from error
        except BaseException:
            await daemon.stop()
            raise
        (folder / "identity").unlink()  # it has been read; no key stays in a temporary folder
        return daemon

    async def stop(self) -> None:
        """Kill the daemon; returns when it and its folder are gone. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for _ in range(round(_STOP_SECONDS / _LOOK_SECONDS)):
            if self._process.poll() is not None:
                break
            await asyncio.sleep(_LOOK_SECONDS)
        else:  # the guardian has not noticed, for example because somebody inherited its pipe
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            shutil.rmtree(self.control.parent, ignore_errors=True)
        await self._reader

    async def _read_output(self) -> None:
        output = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), self._process.stdout
        )
        async for line in output:
            self._last_line = line.decode(errors="replace").strip()[:300]
            logger.debug("p2pd: %s", self._last_line)
            if self._last_line.startswith("Peer ID:"):
                self._ready.set()
        self.alive = False
        self._ready.set()


def _spawn(binary: Path, folder: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Not asyncio's: under uvloop the child inherits ends of pipes that must close with us."""
    return subprocess.Popen(
        [
            *("/bin/sh", "-c", _GUARDIAN, "swarm-dht", folder, binary),
            *(f"-id={folder / 'identity'}", f"-listen=/unix{folder / _SOCKET}"),
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"GOLOG_LOG_LEVEL": "error"},
        start_new_session=True,  # Ctrl-C is ours to answer: sessions drain first
    )


def _short_temporary_folder() -> str:
    """Unix sockets' paths end at 104 bytes (macOS) or 108 (Linux)."""
    return folder if len(folder := tempfile.gettempdir()) < 60 else "/tmp"  # noqa: S108
