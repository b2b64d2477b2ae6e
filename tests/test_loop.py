"""Loops: what runs on them ends with them, and callers are never left waiting."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from swarm.errors import UsageError
from swarm.loop import BackgroundLoop, run
from tests.waits import wait_until


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    background = BackgroundLoop()
    yield background
    background.close()


async def _double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_a_program_runs_on_uvloop_where_there_is_one() -> None:
    async def kind() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(kind()) == "uvloop"


def test_without_uvloop_asyncio_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(_double(4)) == 8


def test_many_threads_share_one_loop(loop: BackgroundLoop) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: loop.call(_double(i)), range(50))) == [
            2 * i for i in range(50)
        ]
    assert BackgroundLoop.shared() is BackgroundLoop.shared()


def test_a_fork_is_told_instead_of_waiting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a DataLoader's workers: there is no thread behind the loop."""
    BackgroundLoop.shared()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(UsageError, match="spawn"):
        BackgroundLoop.shared()


def test_errors_reach_the_caller(loop: BackgroundLoop) -> None:
    async def fail() -> None:
        raise KeyError("what was wrong")

    with pytest.raises(KeyError, match="what was wrong"):
        loop.call(fail())


class _Endless:
    """A coroutine that never returns, and tells when it begins and when it is cancelled."""

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), threading.Event()

    async def run(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def test_a_deadline_cancels_the_work(loop: BackgroundLoop) -> None:
    endless = _Endless()
    with pytest.raises(TimeoutError):
        loop.call(endless.run(), timeout=0.01)
    assert endless.cancelled.wait(30)


def test_ctrl_c_cancels_the_work(loop: BackgroundLoop) -> None:
    endless, caller, presses = _Endless(), threading.get_ident(), 0

    def interrupt(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            raise KeyboardInterrupt

    def press_ctrl_c() -> None:
        assert endless.begun.wait(30)
        wait_until(lambda: sys._current_frames()[caller].f_code.co_name == "wait")
        # A signal that comes just before the system call is noticed only when that returns.
        while not endless.cancelled.wait(0.02) and presses < 50:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    finger = threading.Thread(target=press_ctrl_c)
    try:
        finger.start()
        with pytest.raises(KeyboardInterrupt):
            loop.call(endless.run(), timeout=5)
    finally:
        finger.join(5)
        signal.signal(signal.SIGINT, before)
    assert endless.cancelled.is_set()


def test_closing_cancels_what_still_runs() -> None:
    background, endless = BackgroundLoop(), _Endless()
    background.call_soon(lambda: asyncio.ensure_future(endless.run()))
    assert endless.begun.wait(30)
    background.close()
    background.close()
    assert endless.cancelled.is_set()


def test_a_program_that_forgets_to_close_ends_quietly() -> None:
    program = (
        "import asyncio\n"
        "from swarm.loop import BackgroundLoop\n"
        "loop = BackgroundLoop.shared()\n"
        "loop.call_soon(lambda: asyncio.ensure_future(asyncio.sleep(1000)))\n"
        "loop.call(asyncio.sleep(0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, b"")
