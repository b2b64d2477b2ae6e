"""The device thread: what is ready shares a pass, and what fails costs nobody else anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch

from swarm.errors import CannotRewind, ErrorCode, OutOfPages, RemoteProtocolError
from swarm.models.spans import Span, SpanCache, SpanStep
from swarm.server.backend import Backend, Work
from swarm.server.executor import Executor
from swarm.types import BlockRange
from tests.inprocess import span_of
from tests.models.tiny import tiny_model

BLOCKS = BlockRange(0, 2)
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def span() -> Span:
    return span_of(tiny_model("llama"), 0, 2)


class Gate(threading.Event):
    """Passes wait until it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()


@pytest.fixture
def held(span: Span, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, run = Gate(), span.run

    def wait_and_run(steps: Any) -> Any:
        gate.reached.set()
        assert gate.wait(TIMEOUT)
        return run(steps)

    monkeypatch.setattr(span, "run", wait_and_run)
    yield gate
    gate.set()


def hidden_of(span: Span, tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, span.hidden_size, generator=generator)


def cache_of(span: Span, rows: int = 1) -> SpanCache:
    return span.open_cache(BLOCKS, rows, 256)


def alone(span: Span, hidden: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return span.run([SpanStep(cache_of(span, hidden.shape[0]), hidden, **inputs)])[0]


def work(executor: Executor, hidden: torch.Tensor, cache: SpanCache, **fields: Any) -> Work:
    inputs = fields.pop("inputs", {})
    return Work(executor.next_key(), "someone", cache, hidden, inputs, **fields)


def run(
    span: Span,
    body: Callable[[Executor], Coroutine[Any, Any, None]],
    budget: int = 64,
    page_timeout: float = TIMEOUT,
) -> None:
    async def go() -> None:
        executor = Executor(Backend(span), budget, page_timeout)
        executor.start()
        try:
            async with asyncio.timeout(TIMEOUT):
                await body(executor)
        finally:
            await executor.stop()
            assert executor.queue_depth == 0

    asyncio.run(go())


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_what_is_ready_together_is_run_together(span: Span, held: Gate) -> None:
    async def body(executor: Executor) -> None:
        texts = [hidden_of(span, tokens, seed=tokens) for tokens in (3, 1, 5, 4)]
        tasks = [
            asyncio.create_task(executor.submit(work(executor, text, cache_of(span))))
            for text in texts
        ]
        await asyncio.sleep(0)
        assert executor.queue_depth == 4
        held.set()
        results = [(await task).result() for task in tasks]
        for text, result in zip(texts, results, strict=True):
            close(result, alone(span, text))
        assert executor.backend.shared_passes >= 1

    run(span, body)


def test_a_long_prefill_is_sliced_and_put_together(span: Span) -> None:
    async def body(executor: Executor) -> None:
        text, padding = hidden_of(span, 50, rows=2), torch.ones(2, 50, dtype=torch.bool)
        padding[0, :7] = False
        done = await executor.submit(
            work(executor, text, cache_of(span, 2), inputs={"padding": padding})
        )
        assert executor.backend.passes >= 6
        expected = alone(span, text, padding=padding)
        close(done.result()[padding], expected[padding])

    run(span, body, budget=16)


def test_positions_with_planes_reach_the_model_as_it_wants_them(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor | None] = []
    monkeypatch.setattr(
        span, "run", lambda steps: [seen.append(s.position_ids) or s.hidden for s in steps]
    )
    positions = torch.arange(2 * 5 * 3).view(2, 5, 3)

    async def body(executor: Executor) -> None:
        await executor.submit(
            work(
                executor,
                hidden_of(span, 5, 2),
                cache_of(span, 2),
                inputs={"position_ids": positions},
            )
        )

    run(span, body, budget=6)
    assert torch.equal(torch.cat(seen, dim=2), positions.permute(2, 0, 1))  # type: ignore[arg-type]


def test_one_bad_step_costs_only_itself(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, real = cache_of(span), span.run

    def poisoned(steps: Any) -> Any:
        if any(step.cache is bad for step in steps):
            raise RuntimeError("out of memory, say")
        return real(steps)

    async def body(executor: Executor) -> None:
        texts = [hidden_of(span, 3, seed=seed) for seed in range(3)]
        caches = [cache_of(span), bad, cache_of(span)]
        results = await asyncio.gather(
            *(
                executor.submit(work(executor, text, cache))
                for text, cache in zip(texts, caches, strict=True)
            ),
            return_exceptions=True,
        )
        assert isinstance(results[1], RemoteProtocolError)
        assert results[1].code is ErrorCode.INTERNAL
        monkeypatch.setattr(span, "run", real)
        for text, cache, result in zip(texts[::2], caches[::2], results[::2], strict=True):
            assert isinstance(result, Work)
            close(result.result(), alone(span, text))
            assert cache.length == 3

    monkeypatch.setattr(span, "run", poisoned)
    run(span, body)


def test_what_cannot_be_rewound_is_said_so(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(executor: Executor) -> None:
        cache = cache_of(span)
        await executor.submit(work(executor, hidden_of(span, 5), cache))

        def refuse(length: int) -> None:
            raise CannotRewind("a recurrent state")

        monkeypatch.setattr(cache, "crop", refuse)
        with pytest.raises(RemoteProtocolError) as caught:
            await executor.submit(work(executor, hidden_of(span, 1), cache, crop_to=2))
        assert caught.value.code is ErrorCode.CANNOT_REWIND
        assert caught.value.position == 5

    run(span, body)


def test_a_defect_in_the_backend_does_not_end_the_thread(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(executor: Executor) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(executor.backend, "run", lambda *_: 1 / 0)
            with pytest.raises(RemoteProtocolError, match="ZeroDivisionError") as caught:
                await executor.submit(work(executor, hidden_of(span, 40), cache_of(span)))
            assert caught.value.code is ErrorCode.INTERNAL
        done = await executor.submit(work(executor, hidden_of(span, 3), cache_of(span)))
        close(done.result(), alone(span, hidden_of(span, 3)))

    run(span, body, budget=16)


def test_who_stops_waiting_is_forgotten(span: Span, held: Gate) -> None:
    async def body(executor: Executor) -> None:
        first = asyncio.create_task(
            executor.submit(work(executor, hidden_of(span, 1), cache_of(span)))
        )
        assert await asyncio.to_thread(held.reached.wait, TIMEOUT)
        cache = cache_of(span)
        second = asyncio.create_task(executor.submit(work(executor, hidden_of(span, 9), cache)))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        held.set()
        await first
        await executor.submit(work(executor, hidden_of(span, 1), cache_of(span)))
        assert cache.length == 0
        assert executor.queue_depth == 0

    run(span, body)


def test_stopping_refuses_what_still_waits_and_what_comes_later(span: Span, held: Gate) -> None:
    async def go() -> None:
        executor = Executor(Backend(span), 16)
        executor.start()
        waiting = [
            asyncio.create_task(
                executor.submit(work(executor, hidden_of(span, 99), cache_of(span)))
            )
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(executor.stop())
        await asyncio.sleep(0)
        held.set()
        await stopping
        for task in [
            *waiting,
            asyncio.create_task(
                executor.submit(work(executor, hidden_of(span, 1), cache_of(span)))
            ),
        ]:
            with pytest.raises(RemoteProtocolError) as caught:
                await task
            assert caught.value.code is ErrorCode.DRAINING

    asyncio.run(asyncio.wait_for(go(), TIMEOUT))


# Memory ------------------------------------------------------------------------------------------


class Full(set[SpanCache]):
    """Caches that find no page from their tenth token on."""

    def __init__(self, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.asked = threading.Event()
        run = executor.backend.run

        def run_or_refuse(slices: Any, works: Any) -> Any:
            failed = [p for p in slices if works[p.key].cache in self and p.end >= 10]
            if failed:
                self.asked.set()
            failures = run([piece for piece in slices if piece not in failed], works)
            return failures | {piece.key: OutOfPages("full") for piece in failed}

        monkeypatch.setattr(executor.backend, "run", run_or_refuse)


def test_a_step_without_a_page_waits_until_others_leave(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(executor: Executor) -> None:
        full, cache, text = Full(executor, monkeypatch), cache_of(span), hidden_of(span, 40)
        full.add(cache)
        waiting = asyncio.create_task(executor.submit(work(executor, text, cache)))
        assert await asyncio.to_thread(full.asked.wait, TIMEOUT)
        other = await executor.submit(work(executor, hidden_of(span, 20), cache_of(span)))
        close(other.result(), alone(span, hidden_of(span, 20)))  # others go on meanwhile
        assert not waiting.done()
        executor.run_soon(full.clear)
        close((await waiting).result(), alone(span, text))

    run(span, body, budget=8)


def test_who_finds_no_page_for_too_long_is_told_and_the_rest_goes_on(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(executor: Executor) -> None:
        full, caches = Full(executor, monkeypatch), [cache_of(span) for _ in range(3)]
        full.update(caches)
        text = hidden_of(span, 12)
        tasks = {
            asyncio.create_task(executor.submit(work(executor, text, cache))) for cache in caches
        }
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        executor.run_soon(full.clear)  # the one that gave up has left
        error = done.pop().exception()
        assert isinstance(error, RemoteProtocolError)
        assert error.code is ErrorCode.BUSY
        assert error.retry_after
        assert len(rest) == 2
        for task in rest:
            close((await task).result(), alone(span, text))

    run(span, body, budget=8, page_timeout=0.1)


def test_who_leaves_while_waiting_for_pages_is_forgotten(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(executor: Executor) -> None:
        full, cache = Full(executor, monkeypatch), cache_of(span)
        full.add(cache)
        waiting = asyncio.create_task(executor.submit(work(executor, hidden_of(span, 40), cache)))
        assert await asyncio.to_thread(full.asked.wait, TIMEOUT)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        executor.run_soon(full.clear)
        await executor.submit(work(executor, hidden_of(span, 1), cache_of(span)))
        assert cache.length < 10

    run(span, body, budget=8)


def test_one_alarm_serves_all_deadlines(span: Span, held: Gate) -> None:
    async def body(executor: Executor) -> None:
        async def late(deadline: float) -> None:
            with pytest.raises(RemoteProtocolError) as refusal:
                await executor.submit(
                    work(executor, hidden_of(span, 1), cache_of(span), deadline=deadline)
                )
            assert refusal.value.code is ErrorCode.DEADLINE

        patient = work(executor, hidden_of(span, 1), cache_of(span))
        waiting = asyncio.create_task(executor.submit(patient))
        assert await asyncio.to_thread(held.reached.wait, TIMEOUT)
        await asyncio.gather(late(0.02), late(0.01))  # it was set for a minute
        await late(0.01)
        assert not waiting.done()
        held.set()
        assert await waiting is patient

    run(span, body)


def test_what_is_run_soon_is_run_between_passes_on_the_device_thread(
    span: Span, held: Gate
) -> None:
    async def body(executor: Executor) -> None:
        names: list[str] = []
        first = asyncio.create_task(
            executor.submit(work(executor, hidden_of(span, 1), cache_of(span)))
        )
        assert await asyncio.to_thread(held.reached.wait, TIMEOUT)
        executor.run_soon(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        executor.run_soon(lambda: names.append(threading.current_thread().name))
        assert not names
        held.set()
        await first
        await executor.submit(work(executor, hidden_of(span, 1), cache_of(span)))
        assert names == ["swarm-device"]
        counters = executor.counters
        assert counters["device_tokens"] == counters["passes"] == 2
        assert counters["compute_us"] > 0

    run(span, body)
