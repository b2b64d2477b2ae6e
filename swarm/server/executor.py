"""The one thread that owns the device: takes everything that is ready and runs it as one pass."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from statistics import median
from typing import Any, TypeVar

import torch

from swarm.errors import ErrorCode, OutOfPages, RemoteProtocolError
from swarm.server.backend import Backend, Work
from swarm.server.meters import Meters
from swarm.server.scheduler import Scheduler, Slice, Waiting
from swarm.server.training_turns import Job, Turns

logger = logging.getLogger(__name__)

T = TypeVar("T")
Width = Callable[[], int]
Chore = Callable[[], object]
Finished = tuple[Work, RemoteProtocolError | None]

_RETRY_SECONDS = 0.05  # between two looks for pages, if nobody says that some came free
_REFUSAL_SECONDS = 0.5  # between two refusals, for what the first one gives back
_TRAINING_PASSES = 4  # full passes that training may take at a time while nobody decodes
_RETRY_AFTER = 1.0  # seconds after which a client whose step found no page may come again


class Executor:
    """Start it inside the event loop, whose coroutines alone may use it.

    A step that finds no page is parked until others give pages back, `page_timeout` seconds long.
    """

    def __init__(
        self,
        backend: Backend,
        pass_tokens: int,
        page_timeout: float = 5.0,
        meters: Meters | None = None,
    ) -> None:
        self.backend = backend
        self.meters = meters or Meters()
        self._step_ms: deque[float] = deque(maxlen=32)
        self._median_step_ms: float | None = 0.0  # None: not known yet
        self._scheduler = Scheduler(pass_tokens)
        self._page_timeout = page_timeout
        self._inbox: queue.SimpleQueue[Chore | None] = queue.SimpleQueue()
        self._works: dict[int, Work] = {}
        self._parked: dict[int, int] = {}  # tokens done, of works that wait for pages
        self._without_pages: dict[int, float] = {}  # since when, also while they try again
        self._next_try = self._next_refusal = 0.0
        self._futures: dict[int, tuple[asyncio.Future[Work], float]] = {}  # and when it is late
        self._alarm: asyncio.TimerHandle | None = None  # for the first that may be
        self._turns = Turns()  # of training
        self._trainings: set[asyncio.Future[Any]] = set()
        self._training_tokens = _TRAINING_PASSES * pass_tokens
        self._arriving: list[Work] = []  # in this round of the loop
        self._next_key = 0
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="swarm-device", daemon=True)
        self._since = self._busy = 0.0  # seconds: start, and time spent in passes
        self._tokens = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = time.perf_counter()
        self._thread.start()

    async def stop(self) -> None:
        """Finishes the pass that runs; what still waits is refused."""
        self._stopping = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._alarm is not None:
            self._alarm.cancel()
        for future in (*(future for future, _ in self._futures.values()), *self._trainings):
            if not future.done():
                future.set_exception(_leaving())

    @property
    def queue_depth(self) -> int:
        return len(self._futures)

    @property
    def median_step_ms(self) -> float:
        """Of the last passes."""
        if self._median_step_ms is None:
            self._median_step_ms = median(self._step_ms)
        return self._median_step_ms

    @property
    def counters(self) -> dict[str, int]:
        """Since the start; `device_tokens` are rows x positions, times are in microseconds."""
        return {
            "passes": self.backend.passes,
            "shared_passes": self.backend.shared_passes,
            "device_steps": self.backend.steps,
            "device_tokens": self._tokens,
            "compute_us": int(self._busy * 1e6),
            "idle_us": int((time.perf_counter() - self._since - self._busy) * 1e6),
        }

    def next_key(self) -> int:
        self._next_key += 1
        return self._next_key

    def run_soon(self, job: Chore) -> None:
        """Have `job` run on the device thread between two passes: a cache can be given back there.

        Steps without pages are then tried again. On a server that is leaving it may never run.
        """
        self._inbox.put(lambda: self._between_passes(job))

    async def call(self, job: Callable[[], T]) -> T:
        """What `job` returns or raises, on the device thread between two passes.

        On a server that is leaving it may never run: whoever waits needs a deadline.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:  # noqa: BLE001  # the caller's, not the thread's
                    future.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    async def train(self, client: str, make: Callable[[Width], Generator[bool, None, T]]) -> T:
        """Wait for the end of a training job, whose units run when no session needs the device.

        It is told by `Width` how many tokens to compute at a time. Raises RemoteProtocolError.
        """
        if self._stopping:
            raise _leaving()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(end: object) -> None:
            if isinstance(end, RemoteProtocolError) and not future.done():
                future.set_exception(end)
            elif not future.done():
                future.set_result(end)

        def done(end: object) -> None:
            loop.call_soon_threadsafe(settle, end)

        job = Job(client, make(self._width), done)

        self._trainings.add(future)
        self._inbox.put(lambda: self._turns.add(job))
        try:
            return await future
        finally:
            self._trainings.discard(future)
            self._inbox.put(lambda: self._turns.drop(job))

    async def submit(self, work: Work) -> Work:
        """Wait for a step's result. Cancelling the wait drops the step if it has not begun.

        Raises RemoteProtocolError: CANNOT_REWIND, BUSY, INTERNAL, DRAINING, DEADLINE.
        """
        if self._stopping:
            raise _leaving()
        assert self._loop is not None
        future: asyncio.Future[Work] = self._loop.create_future()
        late = self._loop.time() + work.deadline
        self._futures[work.key] = future, late
        if self._alarm is None or late < self._alarm.when():
            self._set_alarm(late)
        if not self._arriving:
            self._loop.call_soon(self._hand_over)
        self._arriving.append(work)
        try:
            return await future
        except BaseException:
            self._inbox.put(lambda: self._drop(work.key))
            raise
        finally:
            del self._futures[work.key]

    def _hand_over(self) -> None:
        """All steps of one round of the loop at once: those that came in one message share a pass,
        and the device's thread does not begin while the loop still decodes the others."""
        works, self._arriving = self._arriving, []
        self._inbox.put(lambda: [self._add(work) for work in works])

    def _set_alarm(self, at: float) -> None:
        """One for all, which rings in vain as a rule: a timer for each step takes longer."""
        assert self._loop is not None
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(at, self._expire)

    def _expire(self) -> None:
        assert self._loop is not None
        self._alarm, now = None, self._loop.time()
        waiting = [(late, future) for future, late in self._futures.values() if not future.done()]
        for late, future in waiting:
            if late <= now:
                why = "the step was not ready within its deadline"
                future.set_exception(RemoteProtocolError(ErrorCode.DEADLINE, why))
        if left := [late for late, _ in waiting if late > now]:
            self._set_alarm(min(left))

    # From here on: the device thread --------------------------------------------------------

    def _add(self, work: Work, begin: int = 0) -> None:
        self._works[work.key] = work
        rows, tokens = work.hidden.shape[:2]
        self._scheduler.add(
            Waiting(
                work.key,
                work.client,
                rows,
                tokens,
                self.backend.span.takes_whole_steps,
                work.priority,
                session=id(work.cache),
                begin=begin,
            )
        )

    def _drop(self, key: int) -> None:
        self._scheduler.drop(key)
        self._works.pop(key, None)
        self._parked.pop(key, None)
        self._without_pages.pop(key, None)

    def _between_passes(self, job: Chore) -> None:
        try:
            job()
        except Exception:  # our defect: it must not end the thread that all share
            logger.exception("a job between passes failed")
        self._unpark()

    def _main(self) -> None:
        with torch.inference_mode():
            while self._receive():
                if self._parked and time.perf_counter() > self._next_try:
                    self._unpark()
                if not self._scheduler.hold(time.perf_counter()):
                    self._pass()
                if self._rest(time.perf_counter()) == 0:
                    self._train()

    def _receive(self) -> bool:
        """Takes all jobs there are, and waits for one if there is nothing to compute yet."""
        now = time.perf_counter()
        if len(self._scheduler):
            wait = self._scheduler.hold(now)
        else:
            wait = _RETRY_SECONDS if self._parked else None
        if (rest := self._rest(now)) is not None:
            wait = rest if wait is None else min(wait, rest)
        try:
            job = self._inbox.get(wait != 0, wait)
            while job is not None:
                job()
                if self._inbox.empty():
                    return True
                job = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _pass(self) -> None:
        begin = time.perf_counter()
        slices = self._scheduler.next_pass(begin)
        if not slices:
            return
        self._turns.passed_over()
        try:
            failures = self.backend.run(slices, self._works)
        except Exception as error:  # our defect: it must not end the thread that all share
            logger.exception("a pass of %d steps was lost", len(slices))
            refusal = RemoteProtocolError(ErrorCode.INTERNAL, f"{type(error).__name__} in pass")
            failures = {piece.key: refusal for piece in slices}
        end = time.perf_counter()
        self._busy += end - begin
        finished, before = list[Finished](), self._tokens
        for piece in slices:
            work, failure = self._works[piece.key], failures.get(piece.key)
            work.compute_ms += (end - begin) * 1e3
            if isinstance(failure, OutOfPages):
                failure = self._park(piece, end)
                if failure is None:
                    continue
            elif failure is None:
                self._tokens += work.hidden.shape[0] * (piece.end - piece.begin)
                self._without_pages.pop(piece.key, None)
            if failure is not None or piece.last:
                finished.append((work, failure))
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._finish, finished, (end - begin) * 1e3)
        # While the loop wakes up:
        for work, _ in finished:
            self._drop(work.key)
        self._scheduler.passed(begin, end)
        self.meters.passed(len(slices), self._tokens - before, end - begin)

    def _rest(self, now: float) -> float | None:
        """Seconds until a unit of training may run; None: there is none, or it has to wait."""
        if not len(self._turns):
            return None
        lull = self._scheduler.lull(now)
        return self._turns.wait(now, busy=len(self._scheduler) > 0, lull=lull)

    def _width(self) -> int:
        """Tokens that training should take at a time: few while somebody waits for the next one."""
        lull = self._scheduler.lull(time.perf_counter())
        return self._training_tokens if lull is None else 1

    def _train(self) -> None:
        job, begin = self._turns.next(), time.perf_counter()
        end: Any = None
        paused = False
        try:
            with torch.inference_mode(False):
                paused = next(job.units)
        except StopIteration as stop:
            end = stop.value
        except RemoteProtocolError as error:
            end = error
        except Exception as error:  # lack of memory, or our defect: it is this request's alone
            logger.exception("training failed")
            end = RemoteProtocolError(ErrorCode.INTERNAL, f"{type(error).__name__} in training")
        now = time.perf_counter()
        self._turns.advanced(job, begin, now, paused=paused)
        self._scheduler.disturbed()
        self._busy += now - begin
        if end is not None:
            self._turns.drop(job)
            job.done(end)

    def _park(self, piece: Slice, now: float) -> RemoteProtocolError | None:
        """None, or why not: nobody waits too long. What one gives up may be enough for the rest,
        so they are refused one after the other."""
        since = self._without_pages.setdefault(piece.key, now)
        if now - since > self._page_timeout and now > self._next_refusal:
            self._next_refusal = now + _REFUSAL_SECONDS
            return RemoteProtocolError(
                ErrorCode.BUSY,
                "the cache is full; try another server, or later",
                retry_after=_RETRY_AFTER,
            )
        self._scheduler.drop(piece.key)
        self._parked[piece.key] = piece.begin
        self._next_try = now + _RETRY_SECONDS
        return None

    def _unpark(self) -> None:
        parked, self._parked = self._parked, {}
        for key, begin in parked.items():
            self._add(self._works[key], begin)

    # On the event loop again -----------------------------------------------------------------

    def _finish(self, finished: list[Finished], elapsed_ms: float) -> None:
        self._step_ms.append(elapsed_ms)
        self._median_step_ms = None
        for work, failure in finished:
            future, _ = self._futures.get(work.key, (None, 0.0))
            if future is None or future.done():
                continue
            if failure is None:
                future.set_result(work)
            else:
                future.set_exception(failure)


def _leaving() -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.DRAINING, "this server is leaving; try another")
