"""Processes with wrong clocks, in networks of their own that can be cut; gone when we are.

A network namespace is held by a process and has no name, so it ends with the last process in it.
All of them are in one process group, with a guardian who kills it when our end of its pipe closes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from tests.nursery import ROOT, Program
from tests.waits import wait_until

if TYPE_CHECKING:
    from swarm.client.network import SwarmNetwork

PROMPT = [1, 17, 42, 5, 9, 23, 77, 3]
LIFETIME = 4  # seconds, of records
_START_SECONDS = 120.0
_GUARDIAN = "trap '' HUP INT TERM; cat >/dev/null; kill -9 0"


class Machine:
    """One process, that is spoken to and speaks in lines."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.peers = ""
        self._lines = SimpleQueue[str]()
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put("(it ended)")

    def line(self, seconds: float = _START_SECONDS) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except Empty:
            pytest.fail(f"nothing in {seconds:g} s; its log ends:\n{self._tail()}")

    def ready(self) -> Machine:
        line = self.line()
        assert line.startswith("ready"), f"{line}\n{self._tail()}"
        if found := re.search(r"peers=(\S+)", line):
            self.peers = found[1]
        return self

    @property
    def peer_id(self) -> str:
        return self.peers.rpartition("/")[2]

    def ask(self, question: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()

    def see(self) -> set[str]:
        """A client's: the peer ids of servers that are there."""
        self.ask("see")
        return set(self.line().split())

    def told(self) -> list[int]:
        """A client's: the rest of what it tells."""
        return [int(line) for line in iter(lambda: self.line(60.0), "end")]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Network:
    """A hub, in a namespace of its own like its hosts'; `split` loses all that crosses it."""

    def __init__(self, machines: Machines) -> None:
        self._hub = machines.namespace()
        self._in(self._hub, "link add hub type bridge forward_delay 0", "link set hub up")
        self.hosts: list[int] = []
        for number in (1, 2):
            host, port = machines.namespace(), f"port{number}"
            self._in(self._hub, f"link add {port} type veth peer name eth0 netns {host}")
            self._in(self._hub, f"link set {port} master hub", f"link set {port} up")
            self._in(host, "link set lo up", f"addr add 10.77.0.{number}/24 dev eth0")
            self._in(host, "link set eth0 up")
            self.hosts.append(host)

    def split(self) -> None:
        """No connection breaks: nothing arrives any more."""
        self._in(self._hub, "link set port2 nomaster")

    def heal(self) -> None:
        self._in(self._hub, "link set port2 master hub")

    @staticmethod
    def _in(namespace: int, *commands: str) -> None:
        for command in commands:
            _must([*_enter(namespace), "ip", *command.split()])


class Machines:
    """`with Machines() as machines:`; everything that it started is gone afterwards."""

    def __enter__(self) -> Machines:
        self.folder = Path(tempfile.mkdtemp(prefix="m-"))
        self._processes: list[subprocess.Popen[str]] = []
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDIAN], stdin=subprocess.PIPE, process_group=0, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError), self._guardian:  # closes its pipe, and waits
            pass
        for process in self._processes:
            with suppress(BrokenPipeError), process:
                pass
        wait_until(lambda: not any(self.folder.glob("swarm-dht-*")), 5.0)
        shutil.rmtree(self.folder)

    def start(
        self, command: Sequence[str], clock: float = 0.0, namespace: int | None = None
    ) -> Machine:
        """A `swarm` command, or `client PEERS`, of tests/odd.py."""
        log = self.folder / f"{len(self._processes)}.log"
        with log.open("w") as errors:
            process = Program(
                ["tests.odd", str(clock), str(LIFETIME), *command],
                f"/proc/{namespace}/ns/net" if namespace else "",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder)},
                process_group=self._guardian.pid,
            )
        self._processes.append(process)
        return Machine(process, log)

    def namespace(self) -> int:
        """The process id of who holds a new network namespace."""
        command = ["unshare", "--net", "sleep", "infinity"]
        try:
            holder = subprocess.Popen(
                command, stderr=subprocess.PIPE, process_group=self._guardian.pid, text=True
            )
        except OSError as error:
            pytest.fail(f"no network namespaces without util-linux and iproute2: {error}")
        self._processes.append(holder)
        ours = Path("/proc/self/ns/net").readlink()

        def made() -> bool:
            if holder.poll() is not None:
                assert holder.stderr is not None
                pytest.fail(f"this machine makes no network namespaces: {holder.stderr.read()}")
            return Path(f"/proc/{holder.pid}/ns/net").readlink() != ours

        wait_until(made)
        return holder.pid


def see(network: SwarmNetwork) -> list[str]:
    """The peer ids of servers that are there, after another look."""
    from swarm.client.network import ClientConfig
    from swarm.config import ClientTimeouts
    from swarm.dht.directory import list_models
    from swarm.errors import SwarmError

    try:
        [listing] = network.loop.call(list_models(network.dht))
    except (SwarmError, ValueError):
        return []
    config = ClientConfig(timeouts=ClientTimeouts(refresh=0.0))
    view = network.router(listing.model, listing.num_blocks, config).view
    there = {server.record.peer_id for server in view.servers} - view.silent
    return sorted(there)


def stop(machine: Machine) -> None:
    """SIGSTOP; returns when it has."""
    machine.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, machine.process.pid, os.WSTOPPED)


def go_on(machine: Machine) -> None:
    machine.process.send_signal(signal.SIGCONT)


def _enter(namespace: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{namespace}/ns/net", "--"]


def _must(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.fail(f"no network namespaces without util-linux and iproute2: {error}")
    if done.returncode:
        pytest.fail(
            f"this machine cannot make networks (root and iproute2 are needed): "
            f"'{' '.join(command)}' says {done.stderr.strip()}"
        )
