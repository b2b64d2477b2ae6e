"""`python -m` as often as wanted, for the price of importing torch and transformers once.

One process imports them, and nothing of ours; each program is a fork of it that goes on as `python
-m` would: with its own arguments, environment, files and pipes, and as a child of whoever asked.
What a start itself is like is for tests that start programs as people do (tests/test_local.py).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

from swarm.local import LocalSwarm, _Child

ROOT = Path(__file__).parent.parent
_CHILD_SUBREAPER = 36  # of prctl(2): orphans below us become our children
_NEW_NET = 0x40000000  # of setns(2)
SLOW = (
    *("cryptography.x509", "grpc.aio", "numpy", "pydantic", "torch"),
    *("transformers.conversion_mapping", "transformers.integrations.flash_attention"),
    *("transformers.modeling_utils", "transformers.models.llama.modeling_llama"),
)
_READ_ONCE = ("HF_", "TRANSFORMERS_", "OMP_NUM_THREADS", "TORCH_")


def read_once(env: Mapping[str, str]) -> Mapping[str, str]:
    """The variables that are read when torch and transformers are imported."""
    return {name: value for name, value in env.items() if name.startswith(_READ_ONCE)}


class Nursery:
    """The process that is forked; it starts when first asked, and ends when we do."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def bear(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """The process id of a new child of ours."""
        libc = ctypes.CDLL(None, use_errno=True)
        with self._lock:
            if self._process is None:
                self._start()
            assert read_once(request["env"]) == self._known, "too late for such an environment"
            # It is born a grandchild of the nursery whose parent ends at once, and so comes to us.
            assert libc.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
            try:
                socket.send_fds(self._ours, [json.dumps(request).encode()], list(files))
                return int(self._ours.recv(64))
            finally:
                libc.prctl(_CHILD_SUBREAPER, 0, 0, 0, 0)

    def close(self) -> None:
        if self._process is not None:
            self._ours.close()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._known = read_once(os.environ)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.nursery", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=ROOT,
            )


NURSERY = Nursery()


class Program(subprocess.Popen[str]):
    """`Program(["swarm", "status"], env=…, stdout=PIPE)` is `Popen` of `python -m swarm status`.

    `namespace` is the file of a network namespace to be in. Takes what `Popen` does of pipes,
    `env`, `process_group` and `start_new_session`.
    """

    def __init__(self, arguments: Sequence[str], namespace: str = "", **options: Any) -> None:
        self._namespace = namespace
        super().__init__(list(map(str, arguments)), text=True, **options)

    def _execute_child(self, args: list[str], *rest: Any) -> None:  # type: ignore[override]
        env: Mapping[str, str] = dict(os.environ if rest[5] is None else rest[5])
        read, write, error = rest[9], rest[12], rest[14]
        request = {
            "argv": args,
            "env": env,
            "cwd": os.getcwd(),
            "session": rest[20],
            "group": rest[21],
            "namespace": self._namespace,
        }
        files = [end if end != -1 else ours for ours, end in enumerate((read, write, error))]
        self.pid = NURSERY.bear(request, files)
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])  # type: ignore[attr-defined]


class QuickSwarm(LocalSwarm):
    """A LocalSwarm whose processes are born here."""

    def _spawn(self, arguments: Sequence[str], name: str) -> _Child:
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        log = self._folder / f"{name}.log"
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        with log.open("w") as errors:
            process = Program(
                ["swarm", *arguments], env=self._env, stderr=errors, start_new_session=True, **pipes
            )
        self._guardian.stdin.write(f"{process.pid}\n".encode())
        self._guardian.stdin.flush()
        return _Child(process, log)


def _import_what_is_slow() -> None:
    from swarm.cli.common import quick_imports

    with quick_imports():
        for name in SLOW:
            import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] == "swarm":  # as a program's first act may be to change it
            del sys.modules[name]


def _wait_to_be_born(asked: socket.socket) -> dict[str, Any]:
    """Returns in each new process, with what it is to be."""
    while True:
        data, files, _, _ = socket.recv_fds(asked, 1 << 20, 3)
        if not data:
            os._exit(0)
        reading, telling = os.pipe()
        if parent := os.fork():
            os.waitpid(parent, 0)  # from now on it is a child of who asked
            os.close(telling)
            asked.send(os.read(reading, 64))
            for file in (reading, *files):
                os.close(file)
        elif os.fork():
            os._exit(0)
        else:
            asked.close()
            request = json.loads(data)
            if request["session"]:
                os.setsid()
            elif request["group"] >= 0:
                os.setpgid(0, request["group"])
            os.write(telling, str(os.getpid()).encode())
            for number, file in enumerate(files):
                os.dup2(file, number)
            for file in (reading, telling, *files):
                os.close(file)
            return request


def _be(request: Mapping[str, Any]) -> None:
    if request["namespace"]:
        with open(request["namespace"]) as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), _NEW_NET):
                raise OSError(ctypes.get_errno(), "setns")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    module, *sys.argv[1:] = request["argv"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tests' to answer
    _import_what_is_slow()
    gc.freeze()
    request = _wait_to_be_born(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _be(request)


if __name__ == "__main__":
    _main()
