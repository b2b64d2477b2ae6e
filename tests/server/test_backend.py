"""A pass serves whom it can: who finds no page is told so, and is run again when there is one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.errors import ErrorCode, OutOfPages, RemoteProtocolError
from swarm.models.pages import PAGE
from swarm.models.spans import Span, SpanCache, SpanStep, SplitProof
from swarm.models.stripping import strip
from swarm.server.backend import Backend, Work
from swarm.server.scheduler import Slice
from swarm.types import BlockRange
from tests.inprocess import span_of
from tests.models.tiny import tiny_model

BLOCKS = BlockRange(0, 2)


@pytest.fixture
def span() -> Span:
    """With room for three pages."""
    span = span_of(tiny_model("llama"), 0, 2)
    span.store.budget = 3 * PAGE * span.store.token_bytes
    return span


def text_of(span: Span, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, span.hidden_size, generator=generator)


def run(backend: Backend, *works: Work) -> set[int]:
    """One pass; the keys of those that found no page."""
    slices = [Slice(work.key, 0, work.hidden.shape[1], last=True) for work in works]
    failures = backend.run(slices, {work.key: work for work in works})
    assert all(isinstance(failure, OutOfPages) for failure in failures.values())
    return set(failures)


def work(key: int, cache: SpanCache, hidden: torch.Tensor, crop_to: int | None = None) -> Work:
    return Work(key, "someone", cache, hidden, {}, crop_to)


@torch.inference_mode()
def test_who_finds_no_page_costs_nobody_else_anything(span: Span) -> None:
    backend = Backend(span)
    large, small, late = (span.open_cache(BLOCKS, 1, 1000) for _ in range(3))
    long, short = text_of(span, 2 * PAGE), text_of(span, 5)
    assert run(backend, work(1, large, long), work(2, small, short)) == set()
    assert run(backend, work(3, late, long), work(4, small, short)) == {3}
    assert (late.length, small.length) == (0, 10)
    large.release()
    again = work(5, late, long)
    assert run(backend, again) == set()
    fresh = span.open_cache(BLOCKS, 1, 1000)
    late.release()
    assert torch.allclose(again.result(), span.run([SpanStep(fresh, long)])[0], atol=1e-5)
    span.store.check_integrity()


@torch.inference_mode()
def test_a_step_that_is_run_again_is_rearranged_once(span: Span) -> None:
    backend = Backend(span)
    cache, other = span.open_cache(BLOCKS, 2, 1000), span.open_cache(BLOCKS, 1, 1000)
    text = text_of(span, 6).repeat(2, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None]
    assert run(backend, work(1, cache, text), work(2, other, text[:1])) == set()
    step = work(3, cache, text_of(span, PAGE).repeat(2, 1, 1), crop_to=4)
    step.reorder = [1, 0]
    assert run(backend, step) == {3}
    assert cache.length == 4
    other.release()
    span.store.budget += PAGE * span.store.token_bytes
    assert run(backend, step) == set()
    fresh = span.open_cache(BLOCKS, 2, 1000)
    cache.release()
    span.run([SpanStep(fresh, text[[1, 0], :4])])
    expected = span.run([SpanStep(fresh, step.hidden)])[0]
    assert torch.allclose(step.result(), expected, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("keep", [0, 1, 3, 5, 99])
def test_only_what_is_wanted_leaves_the_device(span: Span, keep: int) -> None:
    """However a step is cut into passes."""
    text = text_of(span, 7)
    expected = span.run([SpanStep(span.open_cache(BLOCKS, 1, 8), text)])[0]
    backend, step = Backend(span), work(1, span.open_cache(BLOCKS, 1, 8), text)
    step.keep = keep
    for begin, end in ((0, 3), (3, 5), (5, 7)):
        assert not backend.run([Slice(1, begin, end, last=end == 7)], {1: step})
    assert step.result().shape[1] == min(keep, 7)
    assert torch.allclose(step.result(), expected[:, max(0, 7 - keep) :], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("padded", [False, True])
def test_samples_of_one_prompt_are_computed_once_and_share_its_pages(
    span: Span, padded: bool
) -> None:
    """Until they go apart; then each has a page of its own for what is not full yet."""
    prompt, rows = text_of(span, PAGE + 5), 3
    span.store.budget = (2 + rows) * PAGE * span.store.token_bytes
    cache, backend, widths = span.open_cache(BLOCKS, rows, 1000), Backend(span), list[int]()
    span_run = span.run

    def run_watched(steps: list[SpanStep]) -> list[torch.Tensor]:
        widths.extend(step.hidden.shape[0] for step in steps)
        return span_run(steps)

    span.run = run_watched  # type: ignore[method-assign]
    step = work(1, cache, prompt.repeat(rows, 1, 1))
    if padded:
        step.inputs = {"padding": (torch.arange(PAGE + 5) > 2).repeat(rows, 1)}
    for begin, end in ((0, 40), (40, PAGE + 5)):
        assert not backend.run([Slice(1, begin, end, last=end > 40)], {1: step})
    assert span.store.used == 2 * PAGE * span.store.token_bytes
    apart = work(2, cache, text_of(span, 1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    assert run(backend, apart) == set()
    assert span.store.used == (1 + rows) * PAGE * span.store.token_bytes
    span.store.check_integrity()
    assert widths == [1, 1, rows]
    cache.release()
    fresh = span.open_cache(BLOCKS, rows, 1000)
    span.store.budget *= 2
    real = step.inputs.get("padding", torch.ones(rows, PAGE + 5)).bool()
    whole = span_run([SpanStep(fresh, step.hidden, padding=step.inputs.get("padding"))])[0]
    assert torch.allclose(step.result()[real], whole[real], atol=1e-5)
    expected = span_run([SpanStep(fresh, apart.hidden)])[0]
    assert torch.allclose(apart.result(), expected, atol=1e-5)


@torch.inference_mode()
def test_rows_that_differ_only_in_what_came_before_stay_apart(span: Span) -> None:
    cache, backend = span.open_cache(BLOCKS, 2, 1000), Backend(span)
    one = text_of(span, 4)
    assert run(backend, work(1, cache, torch.cat([one, one * 2]))) == set()
    same = work(2, cache, text_of(span, 3).repeat(2, 1, 1))
    assert run(backend, same) == set()
    assert not torch.allclose(same.result()[0], same.result()[1], atol=1e-3)


@torch.inference_mode()
def test_a_prompt_without_pages_keeps_its_rows(span: Span) -> None:
    backend, cache, other = Backend(span), *(span.open_cache(BLOCKS, n, 1000) for n in (2, 1))
    assert run(backend, work(1, other, text_of(span, 2 * PAGE))) == set()
    step = work(2, cache, text_of(span, 2 * PAGE).repeat(2, 1, 1))
    assert run(backend, step) == {2}
    assert (cache.batch_size, cache.length) == (2, 0)
    other.release()
    assert run(backend, step) == set()
    assert (cache.batch_size, cache.length, len(step.result())) == (2, 2 * PAGE, 2)


@torch.inference_mode()
@pytest.mark.parametrize("given", [True, False], ids=["as said", "by the length"])
def test_positions_beyond_a_model_s_table_do_not_reach_it(given: bool) -> None:
    """A GPU would compute nothing any more, for anybody."""
    sizes = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 16, "rotary_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", vocab_size=64, **sizes))
    span = span_of(model.eval(), 0, 2)
    backend, cache = Backend(span), span.open_cache(BLOCKS, 1, 64)
    assert run(backend, work(1, cache, text_of(span, 15))) == set()
    good, bad = (work(key, cache, text_of(span, 1)) for key in (2, 3))
    if given:
        good.inputs, bad.inputs = ({"position_ids": torch.tensor([[at]])} for at in (15, 16))
    assert run(backend, good) == set()
    failures = backend.run([Slice(3, 0, 1, last=True)], {3: bad})
    assert isinstance(failures[3], RemoteProtocolError)
    assert failures[3].code is ErrorCode.TOO_LONG
    assert cache.length == 16


@torch.inference_mode()
def test_padding_that_a_family_cannot_take_is_refused_in_a_sentence() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    strip(model, BLOCKS)
    span = Span(model, BLOCKS, SplitProof(can_batch=False, can_rewind=False, can_resume=False))
    backend, cache = Backend(span), span.open_cache(BLOCKS, 2, 64)
    step = work(1, cache, text_of(span, 8).repeat(2, 1, 1))
    step.inputs = {"padding": torch.arange(8).ge(torch.tensor([[0], [6]]))}
    assert not backend.run([Slice(1, 0, 5, last=False)], {1: step})
    failure = backend.run([Slice(1, 5, 8, last=True)], {1: step})[1]
    assert isinstance(failure, RemoteProtocolError)
    assert failure.code is ErrorCode.BAD_TENSOR
    assert "one by one" in str(failure)
