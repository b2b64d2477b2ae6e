"""Whether decode passes are captured or compiled here, and all of them recorded: tried at start,
kept only where it is exact and pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from swarm.errors import OutOfPages
from swarm.models.pages import PAGE
from swarm.models.replay import WIDTHS, Captured, Compiled, CompiledAndCaptured, Way
from swarm.models.spans import Span, SpanStep

logger = logging.getLogger(__name__)

CompileMode = Literal["auto", "on", "off"]

_RECORDED = 5  # tokens of the prompt in the trial of a recording
_PAST = PAGE + 3  # tokens before the one of the trial: more than a page
_ROUNDS = 5  # in turns; others on this machine can only take time away, so the best one counts
_MARGIN = 0.9  # of the plain forward's time, at most: what is as quick is not worth its memory
# How far outputs may differ, of the largest number: sums are made in another order, and each block
# rounds to the dtype. In float32 it is what all that we compute must keep to.
_ALIKE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Trial:
    """One way's passes of so many rows, against the plain forward's."""

    name: str
    rows: int
    plain_ms: float
    ms: float
    difference: float  # of the largest number
    allowed: float

    @property
    def exact(self) -> bool:
        return self.difference <= self.allowed  # NaN is not

    @property
    def pays(self) -> bool:
        return self.exact and self.ms <= _MARGIN * self.plain_ms

    def __str__(self) -> str:
        times = f"{self.rows} rows {self.name} {self.ms:.2f} ms, plain {self.plain_ms:.2f}"
        return times if self.exact else f"{times}, and WRONG by {self.difference:.1e}"


def ways_of(mode: CompileMode, device: torch.device) -> list[Way]:
    """To be tried. `auto` tries what takes seconds: CUDA graphs; `on` torch.compile, too."""
    if mode == "off":
        return []
    if device.type == "cuda":
        captured = Captured(device)
        return [captured, CompiledAndCaptured(device)] if mode == "on" else [captured]
    return [Compiled()] if mode == "on" else []


@torch.inference_mode()
def try_recording(span: Span) -> bool:
    """Have the span run passes as recorded, on a CPU, if that gives the plain forward's numbers.

    Nobody else may use the span meanwhile. It takes as long as four passes, and some 10 ms for each
    block. It is not timed: what runs is the same calls with less between them.
    """
    if span.device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(_RECORDED)
    text = torch.randn(1, _RECORDED + 1, span.hidden_size, generator=generator).to(span.dtype)
    cache = span.open_cache(span.blocks, 1, _RECORDED + 1)
    outputs: dict[bool, torch.Tensor] = {}
    try:
        for recorded in (False, True):
            if recorded:
                span.record()
            parts: list[torch.Tensor] = []
            for part in (text[:, :_RECORDED], text[:, _RECORDED:]):
                cache.make_room(part.shape[1])
                parts += span.run([SpanStep(cache, part)])
            outputs[recorded] = torch.cat(parts, dim=1)
            cache.crop(0)
    except OutOfPages:
        span.traces.forget()
        return False
    # As for the other ways: whatever cannot be recorded serves well without.
    except Exception as error:  # noqa: BLE001
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        logger.info("passes cannot be recorded here: %s", why)
        span.traces.forget()
        return False
    finally:
        cache.release()
    difference = _difference(outputs[False], outputs[True])
    kept = span.traces.on and difference <= _ALIKE[span.dtype]
    if not kept:
        span.traces.forget()
    told = "run as recorded" if kept else "not recorded"
    logger.info("passes are %s: off by %.1e of the largest number", told, difference)
    return kept


def _difference(plain: torch.Tensor, found: torch.Tensor) -> float:
    """The largest one, of the largest number."""
    plain, found = plain.double(), found.double()
    return float((found - plain).abs().max() / plain.abs().max())


def try_out(
    span: Span,
    ways: Sequence[Way],
    widths: Sequence[int] = WIDTHS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Trial]:
    """Have the span use, for each width, the quickest of those ways that is exact and pays.

    Nobody else may use the span meanwhile. It takes seconds, and minutes where something has to be
    compiled that torch does not find in its cache. Whatever goes wrong, the plain forward stays.
    """
    if not ways or not span.proof.can_batch:
        return []
    replays, left, trials = span.replays, list(ways), list[Trial]()
    kept: dict[int, Way] = {}
    replays.live = False
    begin = clock()
    for rows in widths:
        best = 1.0
        for way in list(left):
            logger.info("trying passes of %d rows, %s", rows, way.name)
            try:
                trial = _try(span, way, rows, clock)
            except OutOfPages:
                left.clear()
                break
            # Drivers, compilers and compilers' compilers fail in ways of their own, on machines
            # that we have never seen, and serve well without.
            except Exception as error:  # noqa: BLE001
                why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                logger.warning("passes cannot be %s here: %s", way.name, why)
                left.remove(way)
                continue
            trials.append(trial)
            if trial.pays and trial.ms / trial.plain_ms < best:
                best, kept[rows] = trial.ms / trial.plain_ms, way
    replays.settle_on(kept)
    chosen = ", ".join(f"{rows} {way.name}" for rows, way in kept.items()) or "none"
    tried = "; ".join(map(str, trials)) or "nothing could be tried"
    logger.info("passes by rows: %s (%s; in %.0f s)", chosen, tried, clock() - begin)
    return trials


def _try(span: Span, way: Way, rows: int, clock: Callable[[], float]) -> Trial:
    """Raises OutOfPages, and whatever the way does."""
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, _PAST + 1, span.hidden_size)
    text = torch.randn(shape, generator=generator).to(span.device, span.dtype)
    cache = span.open_cache(span.blocks, rows, _PAST + 1)
    best = [float("inf"), float("inf")]
    outputs = [text, text]
    try:
        span.replays.ways = {}
        cache.make_room(_PAST)
        span.run([SpanStep(cache, text[:, :_PAST])])
        for turn in range(_ROUNDS + 1):
            for which, ways in enumerate(({}, {rows: way})):
                span.replays.ways = ways
                cache.make_room(1)
                since = clock()
                outputs[which] = span.run([SpanStep(cache, text[:, _PAST:])])[0].to("cpu")
                if turn:  # the first one compiles, or warms up
                    best[which] = min(best[which], clock() - since)
                cache.crop(_PAST)
    finally:
        cache.release()
    difference = _difference(*outputs)
    return Trial(way.name, rows, best[0] * 1e3, best[1] * 1e3, difference, _ALIKE[span.dtype])
