"""The one thread that owns the device: takes everything that is ready and runs it as one pass."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.server.backend import Backend, Work
from swarm.server.scheduler import Scheduler, Waiting

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Executor:
    """Start it inside the event loop; `submit` and `call` are for that loop's coroutines only."""

    def __init__(self, backend: Backend, pass_tokens: int) -> None:
        self.backend = backend
        self.step_ms: deque[float] = deque(maxlen=32)
        self._scheduler = Scheduler(pass_tokens)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._works: dict[int, Work] = {}
        self._futures: dict[int, asyncio.Future[Work]] = {}
        self._next_key = 0
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="swarm-device", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Finishes the pass that runs; what still waits is refused."""
        self._stopping = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        for future in self._futures.values():
            if not future.done():
                future.set_exception(_leaving())

    @property
    def queue_depth(self) -> int:
        return len(self._futures)

    @property
    def median_step_ms(self) -> float:
        return median(self.step_ms) if self.step_ms else 0.0

    def next_key(self) -> int:
        self._next_key += 1
        return self._next_key

    async def submit(self, work: Work) -> Work:
        """Wait for a step's result. Cancelling the wait drops the step if it has not begun.

        Raises RemoteProtocolError: CANNOT_REWIND, INTERNAL, DRAINING.
        """
        if self._stopping:
            raise _leaving()
        future: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
        self._futures[work.key] = future
        self._inbox.put(lambda: self._add(work))
        try:
            return await future
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._drop(work.key))
            raise
        finally:
            del self._futures[work.key]

    def _add(self, work: Work) -> None:
        self._works[work.key] = work
        rows, tokens = work.hidden.shape[:2]
        whole = self.backend.span.takes_whole_steps
        self._scheduler.add(Waiting(work.key, work.client, rows, tokens, whole))

    def _drop(self, key: int) -> None:
        self._scheduler.drop(key)
        self._works.pop(key, None)

    def _main(self) -> None:
        with torch.inference_mode():
            while self._receive():
                self._pass()

    def _receive(self) -> bool:
        """Takes all jobs there are; waits only when there is nothing to compute."""
        try:
            job = self._inbox.get(block=not len(self._scheduler))
            while True:
                if job is None:
                    return False
                job()
                job = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _pass(self) -> None:
        slices = self._scheduler.next_pass()
        if not slices:
            return
        begin = time.perf_counter()
        try:
            failures = self.backend.run(slices, self._works)
        except Exception as error:  # our defect: it must not end the thread that all share
            logger.exception("a pass of %d steps was lost", len(slices))
            refusal = RemoteProtocolError(ErrorCode.INTERNAL, f"{type(error).__name__} in pass")
            failures = {piece.key: refusal for piece in slices}
        elapsed_ms = (time.perf_counter() - begin) * 1e3
        finished: list[tuple[Work, RemoteProtocolError | None]] = []
        for piece in slices:
            work = self._works[piece.key]
            work.compute_ms += elapsed_ms
            failure = failures.get(piece.key)
            if failure is not None or piece.last:
                del self._works[piece.key]
                if not piece.last:
                    self._scheduler.drop(piece.key)
                finished.append((work, failure))
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._finish, finished, elapsed_ms)

    def _finish(
        self, finished: list[tuple[Work, RemoteProtocolError | None]], elapsed_ms: float
    ) -> None:
        self.step_ms.append(elapsed_ms)
        for work, failure in finished:
            future = self._futures.get(work.key)
            if future is None or future.done():
                continue
            if failure is None:
                future.set_result(work)
            else:
                future.set_exception(failure)


def _leaving() -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.DRAINING, "this server is leaving; try another")
