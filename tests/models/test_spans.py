"""Three spans behind a shell must give what the model gives in one piece, for every family."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.models.cache import SpanCache
from swarm.models.pages import PAGE
from swarm.models.selftest import ChainCache, prove_split
from swarm.models.spans import Span, SpanStep, SplitProof
from swarm.models.stripping import strip
from swarm.types import BlockRange
from tests.models.splits import close, logits, positions, shell, span, text, whole
from tests.models.tiny import FAMILIES, LAYERS, tiny_config

families = pytest.mark.parametrize("family", FAMILIES)


def cut_logits(family: str, ids: Tensor, cache: ChainCache, mask: Tensor | None = None) -> Tensor:
    start, end = cache.length, cache.length + ids.shape[1]
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if mask is not None:
        arguments |= {"attention_mask": mask[:, :end]}
        if family != "bloom":
            arguments |= {"position_ids": positions(mask)[:, start:end]}
    return logits(shell(family)[0], ids, **arguments)


def whole_logits(family: str, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    arguments: dict[str, Any] = {}
    if mask is not None:
        arguments = {"attention_mask": mask}
        if family != "bloom":
            arguments |= {"position_ids": positions(mask)}
    return logits(whole(family), ids, use_cache=False, **arguments)


@families
def test_prefill_in_any_pieces_equals_one_whole_forward(family: str) -> None:
    ids = text(2, 20)
    expected = whole_logits(family, ids)
    for pieces in ([20], [7, 9, 1, 3], [1] * 20):
        cache = shell(family)[1].open(2)
        got = [cut_logits(family, piece, cache) for piece in ids.split(pieces, dim=1)]
        assert close(torch.cat(got, dim=1), expected)


@families
def test_greedy_tokens_are_those_of_one_machine(family: str) -> None:
    ids, mask = text(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, :1] = 0
    model, chain = shell(family)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    expected = cast(Any, whole(family)).generate(ids, attention_mask=mask, **options)
    got = cast(Any, model).generate(
        ids, attention_mask=mask, past_key_values=chain.open(3), **options
    )
    assert torch.equal(got, expected)


@families
def test_rows_of_a_padded_batch_equal_each_text_alone(family: str) -> None:
    """Padded on the left at first, and again where the second turn begins.

    Where layers have a window, padding in the middle uses it up, in transformers as here: a window
    counts cache slots. There, the padded batch on one machine is the reference.
    """
    turns = [[text(1, 4, 1), text(1, 3, 2)], [text(1, 9, 3), text(1, 6, 4)]]
    padded, masks = [], []
    for turn in zip(*turns, strict=True):
        width = max(ids.shape[1] for ids in turn)
        for rows, kind in ((padded, "ids"), (masks, "mask")):
            rows.append(torch.cat([_left_pad(ids, width, kind) for ids in turn]))
    mask = torch.cat(masks, dim=1)
    cache = shell(family)[1].open(2)
    first = cut_logits(family, padded[0], cache, mask)
    second = [cut_logits(family, piece, cache, mask) for piece in padded[1].split((4, 2), dim=1)]
    got = torch.cat([first, *second], dim=1)
    if getattr(whole(family).config, "sliding_window", None):
        expected = whole_logits(family, torch.cat(padded, dim=1), mask)
        assert close(got[mask.bool()], expected[mask.bool()])
        first_turn = slice(0, padded[0].shape[1])
        turns, mask = [turn[:1] for turn in turns], mask[:, first_turn]
        got = got[:, first_turn]
    for row, turn in enumerate(turns):
        alone = whole_logits(family, torch.cat(turn, dim=1))[0]
        assert close(got[row][mask[row].bool()], alone)


def _left_pad(ids: Tensor, width: int, kind: str) -> Tensor:
    real = ids if kind == "ids" else torch.ones_like(ids)
    return torch.nn.functional.pad(real, (width - ids.shape[1], 0))


@families
def test_a_rewound_session_goes_on_as_if_nothing_had_happened(family: str) -> None:
    ids, other = text(1, 18), text(1, 18, seed=1)
    cache = shell(family)[1].open(1)
    cut_logits(family, ids, cache)
    cache.crop_to(5)
    got = cut_logits(family, other[:, 5:], cache)
    expected = whole_logits(family, torch.cat([ids[:, :5], other[:, 5:]], dim=1))
    assert close(got, expected[:, 5:])


@families
def test_beams_take_their_caches_along(family: str) -> None:
    ids, mask = text(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    cache = shell(family)[1].open(2)
    cut_logits(family, ids, cache, mask)
    rows = [1, 0, 1]
    for part in cache.caches:
        part.reorder(rows)
    more = text(3, 4, seed=1)
    longer = torch.cat([mask[rows], torch.ones_like(more)], dim=1)
    got = cut_logits(family, more, cache, longer)
    expected = whole_logits(family, torch.cat([ids[rows], more], dim=1), longer)
    assert close(got, expected[:, 10:])


@families
def test_sessions_that_share_passes_do_not_notice(family: str) -> None:
    """Prefill, decode, a padded batch and other sub-spans in the same passes of one span."""
    held = span(family)
    alone = span(family, can_batch=False)
    full, late, early = held.blocks, BlockRange(2, 5), BlockRange(1, 3)
    shapes = [(full, 1), (full, 2), (late, 1), (full, 1), (late, 3), (early, 1), (early, 2)]
    shared = [held.open_cache(blocks, rows, 64) for blocks, rows in shapes]
    single = [alone.open_cache(blocks, rows, 64) for blocks, rows in shapes]
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        steps: list[SpanStep] = []
        for index, cache in enumerate(shared):
            tokens = int(torch.randint(0, 8, (), generator=generator)) if index % 2 else 1
            hidden = torch.randn(cache.batch_size, tokens, held.hidden_size, generator=generator)
            padding = None
            if cache.batch_size > 1 and tokens > 2:
                padding = torch.ones(cache.batch_size, tokens, dtype=torch.uint8)
                padding[0, :2] = 0
            steps.append(SpanStep(cache, hidden, padding=padding))
        for got, step, cache in zip(held.run(steps), steps, single, strict=True):
            expected = alone.run([SpanStep(cache, step.hidden, padding=step.padding)])[0]
            real = torch.ones(got.shape[:2]) if step.padding is None else step.padding
            if got.numel():
                assert close(got[real.bool()], expected[real.bool()])


def test_sub_spans_share_the_blocks_that_they_have_in_common() -> None:
    held = span("llama")
    widths: list[list[int]] = [[] for _ in range(LAYERS)]
    for index, layer in enumerate(cast(Any, held)._stack.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs, index=index: widths[index].append(inputs[0].shape[1])
        )
    cuts = [(0, 3), (1, 2), (2, 5), (2, 5)]
    caches = [held.open_cache(BlockRange(*cut), 1, 16) for cut in cuts]
    held.run([SpanStep(cache, torch.randn(1, 1, held.hidden_size)) for cache in caches])
    assert widths == [[1], [2], [3], [2], [2], []]
    assert [cache.length for cache in caches] == [1, 1, 1, 1]


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "gemma2", "gpt_oss", "deepseek_v3"])
def test_long_and_short_texts_decode_together(family: str) -> None:
    """Over several pages, with beams that share some of them."""
    held, alone = span(family), span(family, can_batch=False, can_align=False)
    generator = torch.Generator().manual_seed(3)
    pairs: list[tuple[SpanCache, SpanCache]] = []
    for past, rows in [(3, 1), (PAGE + 6, 2), (2 * PAGE + 2, 1), (PAGE - 1, 3)]:
        pair = (held.open_cache(held.blocks, 1, 256), alone.open_cache(held.blocks, 1, 256))
        text = torch.randn(1, past, held.hidden_size, generator=generator)
        for one, cache in zip((held, alone), pair, strict=True):
            one.run([SpanStep(cache, text)])
            cache.reorder([0] * rows)
        pairs.append(pair)
    for turn in range(4):
        hidden = [
            torch.randn(cache.batch_size, 1, held.hidden_size, generator=generator)
            for cache, _ in pairs
        ]
        together = [SpanStep(one, new) for (one, _), new in zip(pairs, hidden, strict=True)]
        outputs = held.run(together)
        for (_, other), new, got in zip(pairs, hidden, outputs, strict=True):
            assert close(got, alone.run([SpanStep(other, new)])[0])
        if turn == 1:
            for cache in pairs[3]:
                cache.reorder([2, 0, 2])
    for cache, other in pairs:
        cache.release()
        other.release()
    held.store.check_integrity()
    assert held.store.used == 0


@families
def test_rows_of_nothing_but_padding_stay_finite(family: str) -> None:
    held = span(family)
    cache = held.open_cache(held.blocks, 2, 16)
    padding = torch.ones(2, 4, dtype=torch.bool)
    padding[0] = False
    outputs = held.run([SpanStep(cache, torch.randn(2, 4, held.hidden_size), padding=padding)])
    assert bool(outputs[0].isfinite().all())


def test_empty_steps_leave_no_trace() -> None:
    held = span("llama")
    cache = held.open_cache(held.blocks, 2, 16)
    output = held.run([SpanStep(cache, torch.empty(2, 0, held.hidden_size))])[0]
    assert output.shape == (2, 0, held.hidden_size)
    assert cache.length == 0


def test_blocks_that_are_not_held_are_refused() -> None:
    held = span("llama", 2, 4)
    with pytest.raises(RemoteProtocolError) as caught:
        held.open_cache(BlockRange(3, 5), 1, 16)
    assert caught.value.code is ErrorCode.BAD_SPAN


def test_a_failed_pass_moves_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    held = span("llama")
    caches = [held.open_cache(held.blocks, 1, 32) for _ in range(2)]
    hidden = torch.randn(1, 5, held.hidden_size)
    held.run([SpanStep(cache, hidden) for cache in caches])
    with pytest.raises(RuntimeError):
        held.run([SpanStep(caches[0], hidden), SpanStep(caches[1], hidden, torch.zeros(1, 3))])
    assert [cache.length for cache in caches] == [5, 5]
    again, fresh = caches[0], held.open_cache(held.blocks, 1, 32)
    held.run([SpanStep(fresh, hidden)])
    assert close(held.run([SpanStep(again, hidden)])[0], held.run([SpanStep(fresh, hidden)])[0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_text_stay_with_their_session(kind: str) -> None:
    """A neighbour's long text must not change the positions of a short one."""
    config = tiny_config("phi3" if kind == "longrope" else "llama")
    half = config.hidden_size // config.num_attention_heads // 2
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"long_factor": [3.0] * half, "short_factor": [1.0] * half}
        scaling |= {"original_max_position_embeddings": 8}
    config.rope_parameters = scaling
    config.max_position_embeddings = 8
    model = AutoModelForCausalLM.from_config(config).eval()
    assert prove_split(config) == SplitProof(can_batch=False, can_rewind=True)
    strip(model, BlockRange(0, LAYERS))
    held = Span(model, BlockRange(0, LAYERS), SplitProof(can_batch=False, can_rewind=True))
    short, fresh = torch.randn(1, 4, held.hidden_size), torch.randn(1, 1, held.hidden_size)

    def run(neighbour: int) -> Tensor:
        cache = held.open_cache(held.blocks, 1, 64)
        first = held.run([SpanStep(cache, short)])[0]
        other = held.open_cache(held.blocks, 1, 64)
        held.run([SpanStep(other, torch.randn(1, neighbour, held.hidden_size))])
        return torch.cat([first, held.run([SpanStep(cache, fresh)])[0]], dim=1)

    assert torch.equal(run(2), run(40))


def test_text_configs_inside_larger_ones_are_found() -> None:
    """`gemma3` is a vision-language model; its text decoder is what gets cut."""
    assert prove_split(AutoConfig.for_model("gemma3")).can_batch
