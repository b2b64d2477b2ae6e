"""Event loops, and the only door to uvloop: one for a whole program, or one behind a sync API."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar, cast

from swarm.errors import UsageError

T = TypeVar("T")

WORK_THREAD = "swarm-work"
"""The name of the threads of `in_thread`."""

_CLOSE_SECONDS = 5.0  # how long tasks may take to notice that they are cancelled


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows has none; asyncio's own loop does all that we need
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on the fastest loop there is. Ctrl-C cancels `main`."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(main)


def heed_cancelling(error: Exception) -> None:
    """Before an error out of a task group is caught: Python 3.11's groups forget that their task is
    being cancelled. Raises CancelledError."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


async def in_thread(function: Callable[[], T]) -> T:
    """Run it in a thread that does not keep the process alive if nobody waits any more."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  # carried to whoever waits
            settle, value = future.set_exception, error
        else:
            settle, value = future.set_result, result
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(lambda: future.done() or settle(cast(Any, value)))

    threading.Thread(target=run, name=WORK_THREAD, daemon=True).start()
    return await future


class BackgroundLoop:
    """A loop in a daemon thread, for synchronous callers in any number of threads."""

    _shared: BackgroundLoop | None = None
    _shared_lock = threading.Lock()

    def __init__(self) -> None:
        self._process = os.getpid()
        self._loop = _new_loop()
        self._spawned: set[asyncio.Task[object]] = set()
        self._thread = threading.Thread(target=self._run, name="swarm-loop", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @classmethod
    def shared(cls) -> BackgroundLoop:
        """The process's one background loop, started when first asked for. Raises UsageError."""
        with cls._shared_lock:
            if cls._shared is not None and cls._shared._process != os.getpid():
                raise UsageError(
                    "this process was forked from one that uses a swarm, and cannot use its "
                    "connections: have it spawned (multiprocessing_context='spawn' of a DataLoader)"
                )
            if cls._shared is None or not cls._shared._thread.is_alive():
                cls._shared = cls()
            return cls._shared

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run `coroutine` on the loop and return what it returns.

        Raises TimeoutError after `timeout` seconds; then, and if the caller is interrupted
        (Ctrl-C), the coroutine is cancelled. Must not be called on the loop itself.
        """
        assert threading.current_thread() is not self._thread, "the loop would wait for itself"
        future = self.start(coroutine)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # does nothing to what is done

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the loop; cancelling the future cancels it. From any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have `function` called on the loop, soon; any thread may ask."""
        self._loop.call_soon_threadsafe(function)

    def spawn(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run `function()` on the loop without waiting for it; for farewells that may fail."""

        def start() -> None:
            task = self._loop.create_task(function())
            self._spawned.add(task)
            task.add_done_callback(self._spawned.discard)

        if self._thread.is_alive():
            self.call_soon(start)

    def close(self) -> None:
        """Cancel every task, wait a little for them, and end the thread. Idempotent."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self.call_soon(self._loop.stop)
            self._thread.join(2 * _CLOSE_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
