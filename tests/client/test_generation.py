"""Generation over a swarm gives what transformers gives on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from swarm.errors import UsageError
from tests.client.pairs import GREEDY, Pair, prompt
from tests.inprocess import span_of
from tests.models.tiny import LAYERS, tiny_model


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    pair = Pair("llama", seed=1)
    with pair.swarm:
        yield pair


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.9, "top_k": 20},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"use_cache": False, "max_new_tokens": 4},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_every_way_to_decode(llama: Pair, options: dict[str, Any]) -> None:
    llama.same(prompt(seed=1), **options)  # with seed 0, beams never change places


def test_frequencies_that_follow_the_length_survive_a_replay() -> None:
    """Dynamic NTK: numbers depend on how a text was cut, so a replay must cut it as before."""
    pair = Pair("llama", seed=2, rope_type="dynamic", factor=4.0)
    with pair.swarm:
        ids = prompt(tokens=20)
        spare = span_of(pair.local, 0, LAYERS)
        expected = pair.local.generate(ids, **GREEDY | {"max_new_tokens": 30})
        with pair.model.inference_session(max_length=64) as session:
            first = pair.model.generate(ids, **GREEDY | {"max_new_tokens": 15})
            pair.swarm.add(spare)
            pair.swarm.cut(pair.swarm.serving(session, 2))
            rest = pair.model.generate(None, **GREEDY | {"max_new_tokens": 15})
            assert session.recoveries == 1
    assert torch.cat([first, rest], dim=1).tolist() == expected.tolist()


def test_assistant_model(llama: Pair) -> None:
    assistant = tiny_model("llama", seed=1)  # agrees often: rollbacks of every length
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.05)
    with llama.model.inference_session(max_length=64) as session:
        llama.same(prompt(), assistant_model=assistant, max_new_tokens=20)
        assert session.recoveries == 0, "a rollback costs a replay"


def test_left_padded_batch_equals_each_prompt_alone(llama: Pair) -> None:
    ids, mask = prompt(rows=3), torch.ones(3, 9, dtype=torch.long)
    for row, padded in enumerate([0, 3, 6]):
        ids[row, :padded], mask[row, :padded] = 0, 0
    together = llama.same(ids, attention_mask=mask)
    for row, padded in enumerate([0, 3, 6]):
        alone = llama.model.generate(ids[row : row + 1, padded:], **GREEDY)
        assert alone[0, 9 - padded :].tolist() == together[row, 9:].tolist()


def test_a_session_goes_on(llama: Pair) -> None:
    whole = llama.local.generate(prompt(), **GREEDY | {"max_new_tokens": 24})
    with llama.model.inference_session(max_length=64) as session:
        first = llama.model.generate(prompt(), **GREEDY | {"max_new_tokens": 8})
        assert session.position == first.shape[1] - 1
        second = llama.model.generate(None, session=session, **GREEDY | {"max_new_tokens": 8})
        third = llama.model.generate(
            whole[:, : first.shape[1] + 8], session=session, **GREEDY | {"max_new_tokens": 8}
        )
    assert torch.cat([first, second], dim=1).tolist() == whole[:, : first.shape[1] + 8].tolist()
    assert third.tolist() == whole.tolist()


def test_a_session_rolls_back_and_takes_another_turn(llama: Pair) -> None:
    with llama.model.inference_session(max_length=64) as session:
        llama.model.generate(prompt(), **GREEDY)
        session.position = 5
        turn = prompt(tokens=4, seed=7)
        got = llama.model.generate(turn, **GREEDY)
        assert session.recoveries == 0, "a rollback costs a replay"
    expected = llama.local.generate(torch.cat([prompt()[:, :5], turn], dim=1), **GREEDY)
    assert got.tolist() == expected[:, 5:].tolist()


def test_a_second_turn_with_padding_in_the_middle(llama: Pair) -> None:
    first = prompt(rows=2)
    turn, mask = prompt(rows=2, tokens=6, seed=5), torch.ones(2, 6, dtype=torch.long)
    turn[1, :4], mask[1, :4] = 0, 0
    with llama.model.inference_session(max_length=64) as session:
        text = llama.model.generate(first, **GREEDY)
        both = llama.model.generate(turn, attention_mask=mask, session=session, **GREEDY)
    for row, padded in enumerate([0, 4]):
        ids = torch.cat([text[row : row + 1], turn[row : row + 1, padded:]], dim=1)
        alone = llama.local.generate(ids, **GREEDY)
        assert both[row, 6:].tolist() == alone[0, ids.shape[1] :].tolist()


def test_a_session_may_outgrow_what_was_reserved(llama: Pair) -> None:
    with llama.model.inference_session(max_length=12):
        got = llama.model.generate(prompt(), **GREEDY | {"max_new_tokens": 24})
    expected = llama.local.generate(prompt(), **GREEDY | {"max_new_tokens": 24})
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}], ids=str
)
def test_beams_go_on_from_the_text_that_was_chosen(llama: Pair, options: dict[str, Any]) -> None:
    """The servers hold those beams that were the last."""
    with llama.model.inference_session(max_length=64):
        first = llama.model.generate(prompt(seed=1), **GREEDY, **options)
        # As many rows as the servers have.
        then = GREEDY | {"num_beams": options["num_beams"] - len(first) + 1}
        rest = llama.model.generate(None, **then)
    whole = llama.local.generate(first, **then)
    assert torch.cat([first, rest], dim=1).tolist() == whole.tolist()


def test_drafts_in_a_second_turn(llama: Pair) -> None:
    drafts = {"prompt_lookup_num_tokens": 3}
    whole = llama.local.generate(prompt(), **GREEDY | {"max_new_tokens": 24})
    with llama.model.inference_session(max_length=64):
        first = llama.model.generate(prompt(), **GREEDY, **drafts)
        rest = llama.model.generate(None, **GREEDY, **drafts)
    assert torch.cat([first, rest], dim=1).tolist() == whole.tolist()


def test_several_samples_of_padded_rows_go_on(llama: Pair) -> None:
    ids, mask = prompt(rows=2), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    with llama.model.inference_session(max_length=64):
        sampling = {"do_sample": True, "num_return_sequences": 2}
        first = llama.model.generate(ids, attention_mask=mask, **GREEDY | sampling)
        rest = llama.model.generate(None, **GREEDY)
    for row, padded in enumerate([0, 0, 4, 4]):
        text = first[row : row + 1, padded:]
        alone = llama.local.generate(text, attention_mask=torch.ones_like(text), **GREEDY)
        assert rest[row].tolist() == alone[0, 21 - padded :].tolist()


def test_a_session_is_of_one_model(llama: Pair) -> None:
    other = Pair("llama", seed=2)
    with other.swarm, llama.model.inference_session(max_length=64) as session:
        first = llama.model.generate(prompt(), **GREEDY)
        other.same(prompt())  # not over the session whose block this is
        with llama.blocks[1:4].inference_session(max_length=8):
            rest = llama.model.generate(None, **GREEDY)
        session.position = 0
        llama.same(prompt(), assistant_model=other.model)
        with pytest.raises(UsageError, match="another model's"):
            other.model.generate(prompt(), session=session)
    whole = llama.local.generate(prompt(), **GREEDY | {"max_new_tokens": 24})
    assert torch.cat([first, rest], dim=1).tolist() == whole.tolist()


def test_a_cache_that_was_switched_off_changes_no_token(llama: Pair) -> None:
    off = GenerationConfig(**GREEDY, use_cache=False)
    expected = llama.local.generate(prompt(), **GREEDY)
    assert llama.model.generate(prompt(), generation_config=off).tolist() == expected.tolist()
    with llama.model.inference_session(max_length=64):
        got = llama.model.generate(prompt(), use_cache=False, **GREEDY)
    assert got.tolist() == expected.tolist()


def test_a_cache_that_holds_nothing_is_refused(llama: Pair) -> None:
    with torch.no_grad():
        begun = llama.model(prompt())  # whose cache transformers made
    for cache in (begun.past_key_values, DynamicCache()):
        with pytest.raises(UsageError, match="use_cache=True"):
            llama.model(prompt()[:, :1], past_key_values=cache)
        with pytest.raises(UsageError, match="use_cache=True"):
            llama.model.generate(prompt(), past_key_values=cache, **GREEDY)


def test_logits_and_a_loop_by_hand(llama: Pair) -> None:
    ids = prompt(rows=2)
    with torch.no_grad():
        expected = llama.local(ids).logits
        assert torch.allclose(llama.model(ids).logits, expected, atol=1e-4)
        begun = llama.model(ids[:, :4], use_cache=True)
        rest = llama.model(ids[:, 4:], past_key_values=begun.past_key_values, use_cache=True)
    assert torch.allclose(rest.logits, expected[:, 4:], atol=1e-4)


def test_slices_of_the_blocks_show_hidden_states(llama: Pair) -> None:
    hidden = torch.randn(2, 5, llama.blocks.connection.terms.hidden_size)
    whole = llama.blocks(hidden)
    halves = llama.blocks[2:](llama.blocks[:2](hidden))
    assert torch.allclose(whole, halves, atol=1e-4)
    assert len(llama.blocks[1:4]) == 3
    with llama.blocks[1:4].inference_session(max_length=8) as session:
        pieces = [
            session.step(hidden[:, :0]),
            session.step(hidden[:, :3]),
            session.step(hidden[:, 3:]),
        ]
    assert torch.allclose(torch.cat(pieces, dim=1), llama.blocks[1:4](hidden), atol=1e-4)


def test_hidden_states_of_every_block(llama: Pair) -> None:
    with torch.no_grad():
        expected = llama.local(prompt(), output_hidden_states=True).hidden_states
        got = llama.model(prompt(), output_hidden_states=True).hidden_states
        assert len(got) == len(expected) == LAYERS + 1
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4)
        llama.model.config.output_hidden_states = True
        assert len(llama.model(prompt()).hidden_states) == LAYERS + 1
        llama.model.config.output_hidden_states = False
        with pytest.raises(UsageError, match="remote_blocks"):
            llama.model.generate(
                prompt(), output_hidden_states=True, return_dict_in_generate=True, **GREEDY
            )


def test_streamers_see_every_token(llama: Pair) -> None:
    class Collector:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Collector()
    got = llama.model.generate(prompt(), streamer=streamer, **GREEDY)
    assert streamer.tokens == [*got[0].tolist(), -1]


def test_what_cannot_be_is_said(llama: Pair) -> None:
    session = llama.model.inference_session(max_length=8)
    with pytest.raises(UsageError, match="empty"):
        llama.model.generate(None, session=session)
    with pytest.raises(UsageError, match="position 3"):
        session.position = 3
    with pytest.raises(IndexError):
        llama.blocks[4:4]
    with pytest.raises(UsageError, match="1025 rows; a session may have 1024"):
        llama.model.generate(prompt(rows=1025), **GREEDY)
    with llama.model.inference_session(max_length=1 << 40):  # nobody reserves that much
        llama.model.generate(prompt(), **GREEDY)
        with pytest.raises(UsageError, match="has 1 rows, and these are 3"):
            llama.model.generate(None, num_beams=3, **GREEDY)


def test_everything_is_given_back(llama: Pair) -> None:
    for server in llama.swarm.servers:
        assert llama.swarm.on_loop(lambda s=server: s.handler.sessions) == 0
