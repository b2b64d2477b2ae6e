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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from swarm.errors import SwarmError, UsageError
from swarm.joining import swarm_key_of
from swarm.models.demo import DEMO_NAME
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


class _Child:
    """A process of ours that says in one line when it is ready; `log` has its standard error."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self._lines = SimpleQueue[str]()
        threading.Thread(target=self._listen, name="swarm-child", daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self._lines.put(self.process.stdout.readline())

    def ready(self) -> Mapping[str, str]:
        """What that line says, once it is there. Raises SwarmError, with the end of the log.

        Raises UsageError if the process said that it was asked for what cannot be.
        """
        try:
            line = self._lines.get(timeout=_START_SECONDS)
        except Empty as error:
            raise SwarmError(f"not ready after {_START_SECONDS:g} s:\n{self._tail()}") from error
        if found := _READY.fullmatch(line.strip()):
            return found.groupdict(default="")
        status = self.process.wait()
        kind = UsageError if status == 2 else SwarmError
        raise kind(f"a process of the local swarm ended ({status}):\n{self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-15:]) or "it says nothing"


@dataclass(slots=True)
class LocalServer:
    """One server process. `address` is HOST:PORT of its gRPC service."""

    index: int
    blocks: BlockRange
    child: _Child
    address: str = ""
    peer_id: str = ""

    @property
    def pid(self) -> int:
        return self.child.process.pid

    @property
    def alive(self) -> bool:
        return self.child.process.poll() is None


class LocalSwarm:
    """`with LocalSwarm(model, spans=["0:8", "8:16", "16:24"]) as swarm:` then `swarm.peers`.

    A bootstrap node and one server process per span, on loopback; None is the bundled model. With a
    `swarm_key` it is private; None takes that from SWARM_KEY. The processes inherit the
    environment, changed by `env`; `server_args` are more arguments of `swarm-server`.
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
    ) -> None:
        self.peers: list[str] = []
        self.servers: list[LocalServer] = []
        self._spans = [BlockRange.parse(span) for span in spans]
        self._key = swarm_key_of(swarm_key)  # as clients read it, or they would not get in
        self._server_args = [str(model or DEMO_NAME), "--dtype", dtype, *server_args]
        self._env = _environment(env or {})
        self._guardian: subprocess.Popen[bytes] | None = None
        self._bootstrap: _Child | None = None

    def __enter__(self) -> LocalSwarm:
        self._folder = Path(tempfile.mkdtemp(prefix="swarm-"))
        # DHT daemons put their sockets there, so that we can see when they are gone.
        self._env["TMPDIR"] = str(self._folder)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """For more processes that join it: they find this very package, the peers and the key."""
        key = {} if self._key is None else {"SWARM_KEY": self._key.text()}
        return {**self._env, **key, "SWARM_PEERS": " ".join(self.peers)}

    def kill(self, index: int) -> None:
        """SIGKILL; returns when the process is gone."""
        process = self._process(index)
        process.kill()
        with suppress(BrokenPipeError), process:  # closes its pipes and waits
            pass

    def stop(self, index: int) -> int:
        """SIGTERM, and wait for the polite end. Returns the exit status (0 if it was polite)."""
        process = self._process(index)
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
            self._process(index).send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.servers[index].pid, os.WSTOPPED)

    def thaw(self, index: int) -> None:
        """SIGCONT."""
        self._process(index).send_signal(signal.SIGCONT)

    def add(self, span: str) -> int:
        """Start another server and wait until it is ready. Returns its index."""
        server = self._start_server(BlockRange.parse(span))
        self._await([server])
        return server.index

    def close(self) -> None:
        """End every process and remove what they left. Idempotent.

        Not politely: there is nobody left to whom it would matter.
        """
        bootstrap = [self._bootstrap] if self._bootstrap else []
        children = [*bootstrap, *(server.child for server in self.servers)]
        for child in children:
            child.process.kill()
        for child in children:  # close its pipes and wait; what it never read is still in one
            with suppress(BrokenPipeError), child.process:
                pass
        deadline = time.monotonic() + _CLOSE_SECONDS
        while any(self._folder.glob("swarm-dht-*")) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if self._guardian is not None:
            self._guardian.kill()
            with self._guardian:
                pass
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDIAN, "swarm-guardian", self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        arguments = ["dht", "--host=127.0.0.1", "--port=0"]
        arguments += ["--identity", str(self._folder / "dht.identity")]
        if self._key is not None:
            from swarm.identity import write_secret

            write_secret(self._folder / "swarm.key", self._key.text().encode())
            in_private = ["--swarm-key", str(self._folder / "swarm.key")]
            arguments += in_private
            self._server_args += in_private
        self._bootstrap = self._spawn(arguments, "bootstrap")
        # All import what they need at the same time; then the servers wait for the peers.
        servers = [self._start_server(blocks) for blocks in self._spans]
        self.peers = self._bootstrap.ready()["peers"].split(",")
        self._await(servers)

    def _start_server(self, blocks: BlockRange) -> LocalServer:
        index = len(self.servers)
        arguments = ["server", *self._server_args, f"--blocks={blocks}", "--host=127.0.0.1"]
        child = self._spawn([*arguments, "--peers", "-"], f"server-{index}")
        self.servers.append(LocalServer(index, blocks, child))
        return self.servers[-1]

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
        return _Child(process, log)

    def _await(self, servers: Sequence[LocalServer]) -> None:
        """Tell them the peers, and wait until each is ready."""
        for stdin in (server.child.process.stdin for server in servers):
            assert stdin is not None
            with suppress(BrokenPipeError):  # it has ended, and its log says why
                stdin.write(" ".join(self.peers) + "\n")
                stdin.flush()
        for server in servers:
            ready = server.child.ready()
            server.address = ready["address"]
            server.peer_id = ready["peers"].rpartition("/")[2]

    def _process(self, index: int) -> subprocess.Popen[str]:
        return self.servers[index].child.process


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    env = {**os.environ, **changes}
    for name in ("SWARM_PEERS", "SWARM_KEY"):  # of some other swarm
        env.pop(name, None)
    # The children must find this very package, and nothing in the folder we happen to stand in.
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])]
    )
    return env
