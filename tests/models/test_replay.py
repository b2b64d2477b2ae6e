"""Decode passes that are captured or compiled give what the plain forward gives, or way to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm.models import passes
from swarm.models.adapters import BlockAdapter
from swarm.models.pages import PAGE
from swarm.models.replay import WIDTHS, Compiled, Forward, Sub, Way
from swarm.models.spans import Span, SpanCache, SpanStep
from swarm.types import BlockRange
from tests.models import test_attention
from tests.models.splits import close, span


class Watched(Way):
    """The fixed forward by itself, which tells what it ran."""

    name = "watched"

    def __init__(self) -> None:
        self.recorded = self.runs = 0

    def record(self, run: Sub) -> Sub:
        self.recorded += 1

        def again() -> Tensor:
            self.runs += 1
            return run()

        return again


class Failing(Watched):
    """As a driver does, some time after the start."""

    def record(self, run: Sub) -> Sub:
        super().record(run)
        raise RuntimeError("an illegal memory access was encountered")


def use(held: Span, way: Way, *, live: bool = True) -> None:
    held.replays.ways = dict.fromkeys(WIDTHS, way)
    held.replays.live = live


def chat(held: Span, plain: Span, rounds: int, seed: int = 0) -> None:
    """Sessions of one and two rows decode together; they join, leave, rewind, and run beside
    others' prompts. Every output is compared."""
    draw = torch.Generator().manual_seed(seed)

    def opened(rows: int, tokens: int) -> tuple[SpanCache, SpanCache]:
        both = tuple(s.open_cache(s.blocks, rows, 4 * PAGE) for s in (held, plain))
        step((both, tokens))
        return both[0], both[1]

    def step(*texts: tuple[Any, int]) -> None:
        inputs = [
            torch.randn(both[0].batch_size, tokens, held.hidden_size, generator=draw)
            for both, tokens in texts
        ]
        got, expected = (
            s.run([SpanStep(both[side], x) for (both, _), x in zip(texts, inputs, strict=True)])
            for side, s in enumerate((held, plain))
        )
        assert all(close(a, b) for a, b in zip(got, expected, strict=True))

    sessions = [opened(1, 3), opened(2, PAGE - 2), opened(1, 9)]
    for turn in range(rounds):
        step(*[(both, 1) for both in sessions])
        if turn == 1:  # its place is another's soon
            for cache in sessions.pop(0):
                cache.release()
        if turn == 2:
            sessions.append(opened(1, 2 * PAGE + 5))
            for cache in sessions[0]:
                cache.crop(PAGE - 3)
        if turn == 3:
            step((sessions[0], 1), (sessions[1], 12))
    for both in sessions:
        for cache in both:
            cache.release()
    assert held.store.used == 0
    held.store.check_integrity()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_fixed_passes_are_exact(family: str) -> None:
    held, way = span(family, 0, 3), Watched()
    use(held, way)
    chat(held, span(family, 0, 3), 5)
    assert way.runs == 5
    assert way.recorded < 5  # a shape's forward is there for others, too


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What was compiled for one test counts towards torch's limits in another."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_passes_are_exact(family: str) -> None:
    """Traced as a whole, which also proves that nothing in them waits for numbers of the device."""
    cut = (4, 6) if family == "gemma3_text" else (0, 1)  # a block with a window, and one without
    held, traced = span(family, *cut), list[Forward]()

    class Noted(Compiled):
        def prepare(self, forward: Forward) -> Forward:
            traced.append(forward)
            return super().prepare(forward)

    use(held, Noted("eager"), live=False)
    chat(held, span(family, *cut), 4)
    assert len(traced) == 1


def test_what_is_not_plain_decoding_is_left_to_the_plain_forward() -> None:
    held, plain, way = span("llama"), span("llama"), Watched()
    use(held, way)
    torch.manual_seed(0)
    factors = torch.randn(2, held.hidden_size), torch.randn(48, 2)
    adapter = {1: BlockAdapter({"self_attn.q_proj": factors})}
    cases: dict[str, Any] = {
        "adapter": {},
        "positions": {"position_ids": torch.tensor([[7]])},
        "padding": {"padding": torch.tensor([[1], [0]])},
        "tokens": {},
    }
    for name, arguments in cases.items():
        hidden = torch.randn(1 + (name == "padding"), 1 + (name == "tokens"), held.hidden_size)
        outputs: list[Tensor] = []
        for side in (held, plain):
            cache = side.open_cache(side.blocks, hidden.shape[0], PAGE)
            cache.adapter = adapter if name == "adapter" else None
            outputs += side.run([SpanStep(cache, hidden, **arguments)])
            cache.release()
        assert torch.equal(*outputs), name
    caches = [held.open_cache(BlockRange(*cut), 1, PAGE) for cut in ((0, 3), (1, 2))]
    held.run([SpanStep(cache, torch.randn(1, 1, held.hidden_size)) for cache in caches])
    assert way.runs == 0
    held.run([SpanStep(caches[1], torch.randn(1, 1, held.hidden_size))])
    assert way.runs == 1


def test_a_way_that_fails_later_costs_nobody_a_token(caplog: pytest.LogCaptureFixture) -> None:
    held, way = span("llama", 0, 2), Failing()
    use(held, way)
    chat(held, span("llama", 0, 2), 4)
    assert way.recorded == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "illegal memory access" in caplog.text


def test_nothing_is_compiled_while_sessions_wait() -> None:
    held = span("llama", 0, 2)
    use(held, Compiled("no such backend"))
    chat(held, span("llama", 0, 2), 3)
    assert held.replays.ways


def test_recordings_let_go_of_slabs_that_are_given_up() -> None:
    held, way = span("llama", 0, 2), Watched()
    use(held, way)
    held.store.budget = 4 * PAGE * held.store.token_bytes
    cache = held.open_cache(held.blocks, 1, PAGE)
    held.run([SpanStep(cache, torch.randn(1, 1, held.hidden_size))])
    assert held.store.recordings
    cache.release()
    other = held.open_cache(BlockRange(0, 1), 1, 8 * PAGE)
    held.run([SpanStep(other, torch.randn(1, 7 * PAGE, held.hidden_size))])  # needs all there is
    assert not held.store.recordings


def test_long_texts_are_not_copied_side_by_side() -> None:
    held, way = span("llama", 0, 1), Watched()
    use(held, way)
    cache = held.open_cache(held.blocks, 1, 1 << 15)
    held.run([SpanStep(cache, torch.zeros(1, 1, held.hidden_size))])
    assert way.runs == 1
    cache.make_room(20_000)
    cache.commit(19_999, None)
    held.run([SpanStep(cache, torch.zeros(1, 1, held.hidden_size))])
    assert way.runs == 1


@pytest.mark.parametrize("shapes", test_attention.SHAPES.values(), ids=test_attention.SHAPES)
@pytest.mark.parametrize("window", [None, 4])
def test_few_calls_are_as_exact_as_few_copies(
    shapes: list[tuple[int, int, int]], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs do with scattered pages, here."""
    monkeypatch.setattr(passes, "LAUNCHES", {"cpu"})
    monkeypatch.setattr(passes, "_MANY", 1)
    test_attention.test_every_session_sees_its_own_text(window, 2, None, False, shapes, 1 << 24)
