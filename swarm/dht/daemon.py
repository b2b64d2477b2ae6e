"""libp2p's daemon (p2pd) as a child process that does not outlive us, however we end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import re
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from swarm.errors import SwarmError, UsageError
from swarm.identity import Identity
from swarm.loop import in_thread

logger = logging.getLogger(__name__)

CLIENT = "-dhtClient=1"  # stores nothing for others
_START_SECONDS = 15.0
_STALE_SECONDS = 60.0


class DaemonFailed(SwarmError):
    """The daemon did not come up; the message is its own."""


class Daemon:
    """A running p2pd; `control` is the path of its Unix socket. Made by `start`.

    It ends by itself, and removes its socket, when its client's connection ends: when we do. (If
    we end before there is one, its next word to us ends it, and its socket is left to `_sweep`.)
    """

    def __init__(self, process: subprocess.Popen[bytes], control: Path) -> None:
        assert process.stdout is not None
        self.control = control
        self._process, self._output = process, process.stdout
        self._said = b""
        self._ready = asyncio.Event()
        # Not connect_read_pipe: uvloop's closes the descriptor twice, the second time perhaps when
        # it is somebody else's (https://github.com/MagicStack/uvloop/issues/763).
        asyncio.get_running_loop().add_reader(self._output.fileno(), self._read)

    @classmethod
    async def start(cls, binary: Path, identity: Identity, arguments: Sequence[str]) -> Daemon:
        """Raises DaemonFailed."""
        folder = _short_temporary_folder()
        _sweep(folder)
        control = folder / f"swarm-dht-{secrets.token_hex(8)}.sock"
        daemon = cls(_spawn(binary, control, arguments), control)
        try:
            daemon._give(identity)
            async with asyncio.timeout(_START_SECONDS):
                await daemon._ready.wait()
            if daemon._output.closed:
                raise DaemonFailed(daemon._last_line())
        except TimeoutError as error:
            await daemon.stop()
            raise DaemonFailed(f"no sign of life in {_START_SECONDS:.0f} s") from error
        except BaseException:
            await daemon.stop()
            raise
        return daemon

    async def stop(self) -> None:
        """Kill the daemon; returns when it and its socket are gone. Idempotent."""
        self._process.kill()
        await in_thread(self._process.wait)
        self._close()
        self.control.unlink(missing_ok=True)

    def _give(self, identity: Identity) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # its output says why it ended
            pipe.write(identity.private_bytes())

    def _read(self) -> None:
        said = os.read(self._output.fileno(), 1 << 16)
        self._said = (self._said + said)[-2000:]
        logger.debug("p2pd: %s", said.decode(errors="replace").strip())
        if not said:
            self._close()
        elif b"Peer ID:" in self._said:
            self._ready.set()

    def _close(self) -> None:
        if not self._output.closed:
            asyncio.get_running_loop().remove_reader(self._output.fileno())
            self._output.close()
            self._ready.set()

    def _last_line(self) -> str:
        lines = self._said.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line), "it says nothing")
        return re.sub(r"^[\d/]+ [\d:]+ ", "", last)[:300]  # Go's loggers begin with date and time


def daemon_arguments(host: str, port: int, client_mode: bool) -> list[str]:
    """p2pd's. Relays and NAT tricks stay off: who cannot be dialled cannot serve gRPC either."""
    arguments = ["-relay=0", "-autonat=0", "-natPortMap=0", "-connManager=1", "-tls=1"]
    # By that flag alone it stays a relay for strangers, and 28 MB larger: it is one by default.
    arguments.append(f"-f={Path(__file__).with_name('p2pd.json')}")
    if client_mode:
        return [*arguments, CLIENT, "-noListenAddrs=1"]
    try:
        family = f"ip{ipaddress.ip_address(host).version}"
    except ValueError as error:
        raise UsageError(f"host '{host}' is not an IP address, such as 0.0.0.0") from error
    return [*arguments, "-dhtServer=1", f"-hostAddrs=/{family}/{host}/tcp/{port}"]


def _spawn(binary: Path, control: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(binary, "-id=/dev/stdin", f"-listen=/unix{control}"),
            f"-idleTimeout={_START_SECONDS:.0f}s",  # it ends when we have not connected by then
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"GOLOG_LOG_LEVEL": "error"},
        umask=0o077,  # the socket is for us alone
        start_new_session=True,  # Ctrl-C is ours to answer: sessions drain first
    )


def _sweep(folder: Path) -> None:
    """Remove the sockets of daemons that were killed, or whose starters were."""
    for path in folder.glob("swarm-dht-*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):  # others', or gone
            probe.setblocking(False)
            stale = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if stale and probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()
    for path in folder.glob("swarm-inbox-*.sock"):
        if not control_of(path).exists():  # whoever listens there takes callers for its daemon
            path.unlink(missing_ok=True)


def inbox_of(control: Path) -> Path:
    """The socket on which a daemon's client listens for streams that others open."""
    return control.with_name(control.name.replace("swarm-dht-", "swarm-inbox-", 1))


def control_of(inbox: Path) -> Path:
    """The inverse of `inbox_of`."""
    return inbox.with_name(inbox.name.replace("swarm-inbox-", "swarm-dht-", 1))


def _short_temporary_folder() -> Path:
    """Unix sockets' paths end at 104 bytes (macOS) or 108 (Linux)."""
    return Path(folder if len(folder := tempfile.gettempdir()) < 60 else "/tmp")  # noqa: S108
