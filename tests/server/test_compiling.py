"""At start a server tries what is quicker, and keeps it only if it is exact and pays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from swarm.models.fixed import FixedPass
from swarm.models.pages import PAGE
from swarm.models.replay import Compiled, Forward, Sub, Way
from swarm.models.spans import Span, SpanStep
from swarm.models.traced import Trace
from swarm.server.backend import moved
from swarm.server.compiling import Trial, try_out, try_recording, ways_of
from tests.inprocess import span_of
from tests.models.tiny import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def span() -> Span:
    return span_of(tiny_model("llama"), 0, 2)


class Wrong(Way):
    """As quick as one likes, and a hundredth off."""

    name = "wrong"

    def prepare(self, forward: Forward) -> Forward:
        def wrong(hidden: Tensor, work: FixedPass) -> Tensor:
            return forward(hidden, work) * 1.01

        return wrong


class Slow(Way):
    """Takes minutes to prepare, hence only once."""

    name = "slow"
    quick = False

    def __init__(self) -> None:
        self.prepared = self.runs = 0

    def prepare(self, forward: Forward) -> Forward:
        self.prepared += 1

        def run(hidden: Tensor, work: FixedPass) -> Tensor:
            self.runs += 1
            return forward(hidden, work)

        return run


class Raising(Way):
    """Where there is no C++ compiler, say."""

    name = "raising"
    tries = 0

    def record(self, run: Sub) -> Sub:
        self.tries += 1
        raise RuntimeError("no compiler found\nand many lines about that")


def ticking(plain: float, other: float) -> Callable[[], float]:
    """A clock for a trial whose passes take so long in turns: it is asked before and after each,
    but for the first of a kind, which is only begun; and once at either end."""

    def times() -> Iterator[float]:
        now = 0.0
        yield now
        while True:
            for first in (True, False, False, False, False, False):
                for seconds in (plain, other):
                    yield now
                    if not first:
                        now += seconds
                        yield now

    clock = times()
    return lambda: next(clock)


@torch.inference_mode()
def answer(span: Span) -> Tensor:
    cache = span.open_cache(span.blocks, 1, PAGE)
    try:
        return span.run([SpanStep(cache, torch.ones(1, 1, span.hidden_size))])[0]
    finally:
        cache.release()


def test_what_is_exact_and_quicker_is_kept(span: Span) -> None:
    before = answer(span)
    (trial,) = try_out(span, [way := Way()], (1,), ticking(2.0, 1.0))
    assert trial.exact
    assert (trial.plain_ms, trial.ms) == (2000.0, 1000.0)
    assert span.replays.ways == {1: way}
    assert span.replays.live
    assert torch.allclose(answer(span), before, atol=1e-5)
    assert span.store.used == 0


def test_what_took_long_to_prepare_serves_sessions_afterwards(span: Span) -> None:
    before = answer(span)
    try_out(span, [slow := Slow(), unused := Slow()], (1,), ticking(2.0, 1.0))
    assert span.replays.ways == {1: slow}
    runs = slow.runs
    assert torch.allclose(answer(span), before, atol=1e-5)
    assert (slow.prepared, slow.runs) == (1, runs + 1)
    assert unused not in {way for way, _ in span.replays._forwards}


def test_what_is_as_quick_is_not_kept(span: Span) -> None:
    (trial,) = try_out(span, [Way()], (1,), ticking(1.0, 0.95))
    assert trial.exact
    assert span.replays.ways == {}


def test_what_is_wrong_is_not_kept_however_quick(
    span: Span, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="swarm")
    before = answer(span)
    (trial,) = try_out(span, [Wrong()], (1,), ticking(2.0, 0.1))
    assert not trial.pays
    assert span.replays.ways == {}
    assert "WRONG by 1.0e-02" in caplog.text
    assert torch.equal(answer(span), before)
    assert not Trial("nothing", 1, 2.0, 1.0, float("nan"), 1.0).exact


def test_what_raises_is_tried_once_and_costs_one_warning(
    span: Span, caplog: pytest.LogCaptureFixture
) -> None:
    raising, sound = Raising(), Way()
    trials = try_out(span, [raising, sound], (1, 2))
    assert raising.tries == 1
    assert [(trial.name, trial.rows) for trial in trials] == [("fixed", 1), ("fixed", 2)]
    (record,) = caplog.records
    assert record.getMessage() == ("passes cannot be raising here: RuntimeError: no compiler found")
    assert raising not in span.replays.ways.values()
    assert answer(span).isfinite().all()


def test_what_torch_cannot_compile_is_survived(
    span: Span, caplog: pytest.LogCaptureFixture
) -> None:
    before = answer(span)
    assert try_out(span, [Compiled("no such backend")], (1,)) == []
    assert "passes cannot be compiled here" in caplog.text
    assert torch.equal(answer(span), before)


def test_what_finds_no_memory_is_not_tried(span: Span) -> None:
    span.store.budget = 2 * 2 * PAGE * span.store.token_bytes
    assert [trial.rows for trial in try_out(span, [Way()], (1, 2, 4))] == [1, 2]
    assert span.store.used == 0


def test_a_recording_is_kept_if_it_gives_the_same(
    span: Span, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="swarm")
    before = answer(span)
    assert try_recording(span)
    assert span.traces.on
    assert "passes are run as recorded: off by 0.0e+00" in caplog.text
    assert torch.equal(answer(span), before)
    assert span.store.used == 0


def test_a_recording_that_gives_something_else_is_not_kept(
    span: Span, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="swarm")
    before, run = answer(span), Trace.run
    for factor in (1.01, float("nan")):
        with monkeypatch.context() as patched:
            patched.setattr(Trace, "run", lambda *given, by=factor: run(*given) * by)
            assert not try_recording(span)
        assert not span.traces.on
        assert torch.equal(answer(span), before)
    assert "not recorded: off by 1.0e-02" in caplog.text
    assert "not recorded: off by nan" in caplog.text
    assert span.store.used == 0


def test_without_memory_for_a_page_nothing_is_recorded(span: Span) -> None:
    span.store.budget = 1
    assert not try_recording(span)
    assert not span.traces.on


def test_by_itself_a_server_compiles_nothing_on_a_cpu_nor_what_takes_minutes() -> None:
    assert ways_of("auto", CPU) == []
    assert ways_of("off", GPU) == ways_of("off", CPU) == []
    assert [way.name for way in ways_of("on", CPU)] == ["compiled"]
    assert [way.name for way in ways_of("auto", GPU)] == ["captured"]


def test_steps_travel_to_another_device_together() -> None:
    steps = [torch.zeros(2, 1, 8), torch.zeros(1, 3, 8), torch.zeros(1, 0, 8)]
    there = moved(steps, torch.device("meta"))
    assert [tensor.shape for tensor in there] == [tensor.shape for tensor in steps]
    assert all(tensor.is_meta for tensor in there)
    assert len({tensor.untyped_storage()._cdata for tensor in there}) == 1
    assert moved(steps, CPU) is steps
