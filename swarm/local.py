"""A swarm of real processes on this machine, for quickstarts, tests and benchmarks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.errors import SwarmError, UsageError
from swarm.models.demo import DEMO_MODEL, DEMO_NAME
from swarm.types import BlockRange

if TYPE_CHECKING:
    from swarm.identity import SwarmKey

_START_SECONDS = 180.0  # on a busy machine; every process imports torch and transformers
_STOP_SECONDS = 15.0
_CLOSE_SECONDS = 3.0
_LOOK_SECONDS = 0.02
_READY = re.compile(r"ready (?:model=.* blocks=\S+ address=(?P<address>\S+) )?peers=(?P<peers>\S+)")

# The shell tells the guardian its process id and becomes the server. The guardian's other end is
# ours alone: when it closes because we died, however we died, the guardian ends them all.
_LAUNCH = 'echo $$ >&2; log=$1; shift; exec "$@" 2>"$log"'
_GUARDIAN = (
    "trap '' HUP INT TERM; "
    'while read -r pid; do pids="$pids $pid"; done; kill -9 $pids; sleep 1; rm -rf "$1"'
)


@dataclass(slots=True)
class LocalServer:
    """One server process. `address` is HOST:PORT of its gRPC service."""

    index: int
    blocks: BlockRange
    process: subprocess.Popen[str]
    log: Path
    address: str = ""
    peer_id: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that says when it is ready; `line` is that line, or empty when it ended."""

    process: subprocess.Popen[str]
    log: Path
    line: list[str] = field(default_factory=list[str])

    def listen(self) -> None:
        assert self.process.stdout is not None
        self.line.append(self.process.stdout.readline())


class LocalSwarm:
    """`with LocalSwarm(model, spans=["0:8", "8:16", "16:24"]) as swarm:` then `swarm.peers`.

    A bootstrap node and one server process per span, on loopback; None is the bundled model. They
    inherit the environment, changed by `env`; `server_args` are more arguments of `swarm-server`;
    `on_ready` is called when the bootstrap node and each server is ready.
    All is gone when the block ends, and when this process does, however it ends.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        spans: Sequence[str] = ("0:8", "8:16", "16:24"),
        *,
        swarm_key: SwarmKey | str | None = None,
        dtype: str = "auto",
        env: Mapping[str, str] | None = None,
        server_args: Sequence[str] = (),
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        self.model_path = model or DEMO_MODEL
        self.peers: list[str] = []
        self.servers: list[LocalServer] = []
        self._spans = [BlockRange.parse(span) for span in spans]
        self._key = swarm_key if isinstance(swarm_key, str | None) else swarm_key.text()
        self._server_args = [str(model or DEMO_NAME), "--dtype", dtype, *server_args]
        self._env = _environment(env or {})
        self._on_ready = on_ready
        self._guardian: subprocess.Popen[bytes] | None = None
        self._bootstrap: _Child | None = None

    def __enter__(self) -> LocalSwarm:
        self._folder = Path(tempfile.mkdtemp(prefix="swarm-"))
        # The servers' DHT daemons put their folders there, so that we can see when they are gone.
        self._env["TMPDIR"] = str(self._folder)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kill(self, index: int) -> None:
        """SIGKILL; returns when the process is gone."""
        self.servers[index].process.kill()
        self.servers[index].process.wait()

    def stop(self, index: int) -> int:
        """SIGTERM, and wait for the polite end. Returns the exit status (0 if it was polite)."""
        process = self.servers[index].process
        self.thaw(index)
        process.terminate()
        try:
            return process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def freeze(self, index: int) -> None:
        """SIGSTOP: the connections stay open, but nobody answers. Returns when that holds."""
        if self.servers[index].alive:
            self.servers[index].process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.servers[index].pid, os.WSTOPPED)

    def thaw(self, index: int) -> None:
        """SIGCONT."""
        self.servers[index].process.send_signal(signal.SIGCONT)

    def add(self, span: str) -> int:
        """Start another server and wait until it is ready. Returns its index."""
        index = len(self.servers)
        child = self._start_server(BlockRange.parse(span))
        self._await_servers([(self.servers[index], child)])
        return index

    def close(self) -> None:
        """End every process and remove what they left. Idempotent.

        Not politely: there is nobody left to whom it would matter.
        """
        processes = [server.process for server in self.servers]
        if self._bootstrap is not None:
            processes.append(self._bootstrap.process)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # what it never read is still in the pipe
                    if pipe is not None:
                        pipe.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while any(self._folder.glob("swarm-dht-*")) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.wait()
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
            self._guardian = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDIAN, "swarm-guardian", self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._key is not None:
            path = self._folder / "swarm.key"
            path.touch(mode=0o600)
            path.write_text(self._key)
            self._server_args += ["--swarm-key", str(path)]
        arguments = ["dht", "--host=127.0.0.1", "--port=0"]
        arguments += ["--identity", str(self._folder / "dht.identity")]
        arguments += self._server_args[-2:] if self._key is not None else []
        self._bootstrap = self._spawn(arguments, "bootstrap")
        # All import what they need at the same time; then the servers wait for the peers.
        children = [self._start_server(blocks) for blocks in self._spans]
        self.peers = _await_ready(self._bootstrap)["peers"].split(",")
        self._on_ready()
        self._await_servers(list(zip(self.servers, children, strict=True)))

    def _start_server(self, blocks: BlockRange) -> _Child:
        index = len(self.servers)
        arguments = ["server", *self._server_args, f"--blocks={blocks}", "--host=127.0.0.1"]
        child = self._spawn([*arguments, "--peers", "-"], f"server-{index}")
        self.servers.append(LocalServer(index, blocks, child.process, child.log))
        return child

    def _spawn(self, arguments: Sequence[str], name: str) -> _Child:
        assert self._guardian is not None
        log = self._folder / f"{name}.log"
        command = [sys.executable, "-P", "-m", "swarm", *arguments]
        process = subprocess.Popen(
            ["/bin/sh", "-c", _LAUNCH, "swarm-launch", log, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._guardian.stdin,
            env=self._env,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to answer
        )
        child = _Child(process, log)
        threading.Thread(target=child.listen, name=f"swarm-{name}", daemon=True).start()
        return child

    def _await_servers(self, started: Sequence[tuple[LocalServer, _Child]]) -> None:
        for server, _ in started:
            assert server.process.stdin is not None
            try:
                server.process.stdin.write(" ".join(self.peers) + "\n")
                server.process.stdin.flush()
            except BrokenPipeError:
                continue  # it has ended, and its log says why
        for server, child in started:
            ready = _await_ready(child)
            server.address = ready["address"]
            server.peer_id = ready["peers"].rpartition("/")[2]
            self._on_ready()


def _await_ready(child: _Child) -> Mapping[str, str]:
    """Raises UsageError if the process said that it was asked for what cannot be."""
    deadline = time.monotonic() + _START_SECONDS
    while not child.line and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    if not child.line:
        raise SwarmError(f"not ready after {_START_SECONDS:g} s:\n{_tail(child.log)}")
    found = _READY.fullmatch(child.line[0].strip())
    if found is None:
        status = child.process.wait()
        kind = UsageError if status == 2 else SwarmError
        raise kind(f"a process of the local swarm ended ({status}):\n{_tail(child.log)}")
    return found.groupdict(default="")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-15:]) or "it says nothing"


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    env = {**os.environ, **changes}
    for name in ("SWARM_PEERS", "SWARM_KEY"):  # of some other swarm
        env.pop(name, None)
    # The children must find this very package, and nothing in the folder we happen to stand in.
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])]
    )
    return env
