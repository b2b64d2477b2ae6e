"""Streams for asyncio say what `generate` says, share the head, and end when they should."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.errors import NoRoute, SessionClosed, UsageError
from swarm.messages import Step
from tests.client.pairs import GREEDY, Pair, prompt
from tests.inprocess import STEADY

TOKENS = 12


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    pair = Pair("llama", seed=1)
    with pair.swarm:
        yield pair
        pair.swarm.assert_quiet()


def new_ids(pair: Pair, ids: torch.Tensor, seed: int = 0, **options: Any) -> list[int]:
    """What transformers makes of the same on one machine."""
    torch.manual_seed(seed)
    whole = pair.local.generate(ids, **GREEDY | options)
    return whole[0, ids.shape[1] :].tolist()


async def collect(pair: Pair, ids: torch.Tensor | None, **options: Any) -> list[int]:
    return [token.id async for token in pair.model.stream(ids, **GREEDY | options)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"eos_token_id": [28, 54], "min_new_tokens": 4},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 15},
        {"bad_words_ids": [[28]], "suppress_tokens": [54]},
    ],
    ids=str,
)
def test_a_stream_means_what_generate_means(llama: Pair, options: dict[str, Any]) -> None:
    got = asyncio.run(collect(llama, prompt(), seed=7, **options))
    assert got == new_ids(llama, prompt(), seed=7, **options)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "granite"])
def test_families_whose_ends_are_more_than_three_modules(family: str) -> None:
    """Learnt positions, soft caps and multipliers, which only the family's own forward knows."""
    pair = Pair(family, seed=2)
    with pair.swarm:

        async def together() -> list[list[int]]:
            texts = [prompt(tokens=3 + index, seed=index) for index in range(4)]
            return await asyncio.gather(*(collect(pair, ids) for ids in texts))

        for index, got in enumerate(asyncio.run(together())):
            assert got == new_ids(pair, prompt(tokens=3 + index, seed=index))


def test_many_streams_share_calls_of_the_head_and_never_mix(llama: Pair) -> None:
    decoder = llama.model._decoder()
    rows: list[int] = []
    logits = decoder.ends.logits
    decoder.ends.logits = lambda hidden: rows.append(hidden.shape[0]) or logits(hidden)
    settings: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "temperature": 1.5},
        {"repetition_penalty": 1.5},
    ]

    async def together() -> list[list[int]]:
        return await asyncio.gather(
            *(
                collect(llama, prompt(seed=index), seed=index, **settings[index % 4])
                for index in range(40)
            )
        )

    try:
        for index, got in enumerate(asyncio.run(together())):
            expected = new_ids(llama, prompt(seed=index), seed=index, **settings[index % 4])
            assert got == expected
    finally:
        decoder.ends.logits = logits
    assert sum(rows) == 40 * TOKENS
    assert max(rows) > 1


def test_logprobs_are_of_what_the_head_said(llama: Pair) -> None:
    async def run() -> Any:
        stream = llama.model.stream(
            prompt(), do_sample=True, temperature=3.0, seed=1, max_new_tokens=2, logprobs=3
        )
        return [token async for token in stream]

    first, second = asyncio.run(run())
    ids = torch.cat([prompt(), torch.tensor([[first.id]])], dim=1)
    with torch.no_grad():
        expected = torch.log_softmax(llama.local(ids).logits[0, -2:], dim=-1)
    for token, row in zip((first, second), expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [each for each, _ in token.top] == row.topk(3).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("padded", [0, 3])
def test_generate_async_returns_what_generate_returns(llama: Pair, padded: int) -> None:
    ids, mask = prompt(rows=3), torch.ones(3, 9, dtype=torch.long)
    ids[1, :padded], mask[1, :padded] = 0, 0
    options = GREEDY | {"eos_token_id": [int(new_ids(llama, prompt(rows=3)[:1])[4])]}
    expected = llama.local.generate(ids, attention_mask=mask, num_return_sequences=1, **options)
    got = asyncio.run(llama.model.generate_async(ids, attention_mask=mask, **options))
    assert got.tolist() == expected.tolist()


def test_ids_may_be_named(llama: Pair) -> None:
    """`**tokenizer(text)` brings them so."""
    named = {"input_ids": prompt(rows=2), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    expected = llama.local.generate(**named, **GREEDY).tolist()
    assert asyncio.run(llama.model.generate_async(**named, **GREEDY)).tolist() == expected
    with llama.model.inference_session(max_length=64):
        got = asyncio.run(collect(llama, None, input_ids=named["input_ids"][:1]))
    assert got == expected[0][9:]


def test_several_samples_of_one_prompt_are_reproducible(llama: Pair) -> None:
    def sample() -> list[list[int]]:
        options = GREEDY | {"do_sample": True, "num_return_sequences": 3}
        return asyncio.run(llama.model.generate_async(prompt(), seed=4, **options)).tolist()

    rows = sample()
    assert rows == sample()
    assert len({tuple(row) for row in rows}) == 3
    assert rows[1][9:] == new_ids(llama, prompt(), seed=5, do_sample=True)


def test_a_stream_goes_on_in_a_session(llama: Pair) -> None:
    whole = new_ids(llama, prompt(), max_new_tokens=20)
    with llama.model.inference_session(max_length=64) as session:
        assert asyncio.run(collect(llama, prompt(), max_new_tokens=8)) == whole[:8]
        assert session.position == 9 + 8 - 1
        more = llama.model.generate(None, session=session, **GREEDY | {"max_new_tokens": 4})
        assert more[0].tolist() == whole[8:12]
        last = llama.model.generate_async(None, session=session, **GREEDY | {"max_new_tokens": 8})
        assert asyncio.run(last)[0].tolist() == whole[12:]


# Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["break", "cancel the task", "cancel the stream"])
def test_whoever_leaves_early_frees_the_servers(llama: Pair, how: str) -> None:
    async def leave() -> None:
        stream = llama.model.stream(prompt(), do_sample=False, max_new_tokens=10_000)

        async def consume(stream: Any) -> None:
            async for _ in stream:
                if how == "break":
                    return

        if how == "break":
            await consume(stream)
            del stream
        elif how == "cancel the task":
            task = asyncio.create_task(consume(stream))
            await anext(aiter(llama.model.stream(prompt(), do_sample=False, max_new_tokens=5)))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await anext(stream)
            stream.cancel()
            with pytest.raises(SessionClosed):
                await consume(stream)
            with pytest.raises(SessionClosed):
                await anext(stream)
        gc.collect()
        await asyncio.to_thread(llama.swarm.assert_quiet)

    asyncio.run(leave())


def test_cancelling_generate_async_frees_the_servers_of_all_rows(llama: Pair) -> None:
    async def cancel() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def act() -> None:
            loop.call_soon_threadsafe(begun.set)

        llama.swarm.trap(lambda *frame: isinstance(frame[3], Step), act)
        work = llama.model.generate_async(prompt(rows=3), do_sample=False, max_new_tokens=10_000)
        task = asyncio.create_task(work)
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        llama.swarm.no_trap()
        await asyncio.to_thread(llama.swarm.assert_quiet)

    asyncio.run(cancel())


def test_a_session_survives_a_stream_that_was_left(llama: Pair) -> None:
    whole = new_ids(llama, prompt())
    with llama.model.inference_session(max_length=64) as session:

        async def leave() -> None:
            stream = llama.model.stream(prompt(), session=session, **GREEDY)
            for _ in range(3):
                await anext(stream)
            stream.cancel()
            with pytest.raises(SessionClosed):
                [token async for token in stream]

        asyncio.run(leave())
        assert asyncio.run(collect(llama, prompt(), session=session)) == whole


def test_one_text_s_error_is_its_own(llama: Pair) -> None:
    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 12:
            raise ValueError("no such token")
        return scores

    async def both() -> tuple[Any, Any]:
        return await asyncio.gather(
            collect(llama, prompt(), logits_processor=[fails]),
            collect(llama, prompt(seed=1)),
            return_exceptions=True,
        )

    failed, fine = asyncio.run(both())
    assert isinstance(failed, ValueError)
    assert fine == new_ids(llama, prompt(seed=1))


def test_ids_that_the_model_does_not_have_are_one_text_s_trouble(llama: Pair) -> None:
    async def both() -> tuple[Any, Any]:
        strange = collect(llama, torch.tensor([[10**6]]))
        return await asyncio.gather(strange, collect(llama, prompt()), return_exceptions=True)

    failed, fine = asyncio.run(both())
    assert isinstance(failed, IndexError)
    assert fine == new_ids(llama, prompt())


def test_errors_are_those_of_generate() -> None:
    pair = Pair("llama", seed=3)
    connection = pair.blocks.connection
    hasty = replace(connection.config, timeouts=replace(STEADY, recovery=0.3))
    pair.blocks.connection = replace(connection, config=hasty)
    with pair.swarm:
        for server in pair.swarm.servers:
            pair.swarm.cut(server)
        with pytest.raises(NoRoute):
            asyncio.run(collect(pair, prompt()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "greedily or by sampling"),
        ({"prompt_lookup_num_tokens": 2}, "greedily or by sampling"),
        ({"return_dict_in_generate": True}, "logprobs"),
        ({"num_return_sequences": 2, "do_sample": True}, "one row"),
        ({"streamer": object()}, "streamer"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "ids"),
    ],
    ids=["beams", "drafts", "more than tokens", "several rows", "a streamer", "embeddings"],
)
def test_what_a_stream_cannot_do_is_said(llama: Pair, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asyncio.run(collect(llama, prompt(), **options))


def test_consumers_in_several_event_loops(llama: Pair) -> None:
    async def elsewhere(index: int) -> list[int]:
        return await asyncio.to_thread(asyncio.run, collect(llama, prompt(seed=index)))

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(
            *(elsewhere(index) for index in range(4)),
            *(collect(llama, prompt(seed=index)) for index in range(4, 8)),
        )

    for index, got in enumerate(asyncio.run(all_of_them())):
        assert got == new_ids(llama, prompt(seed=index))


def test_a_stream_tells_which_servers_it_passes_and_which_is_lost() -> None:
    pair = Pair("llama", seed=1, replicas=2)

    async def follow() -> None:
        stream = pair.model.stream(prompt(), **GREEDY)
        assert stream.hops == []
        await anext(stream)
        first = [hop.peer_id for hop in stream.hops]
        assert [str(hop.blocks) for hop in stream.hops] == [f"{a}:{b}" for a, b in pair.cuts]
        lost = stream.hops[1]
        pair.swarm.cut(next(s for s in pair.swarm.servers if s.peer_id == lost.peer_id))
        assert lost.failure is not None
        for _ in range(TOKENS - 2):
            await anext(stream)
        now = [hop.peer_id for hop in stream.hops]
        assert (now[0], now[2]) == (first[0], first[2])
        assert now[1] != first[1]
        assert (stream.recoveries, stream.moves) == (1, 0)

    with pair.swarm:
        asyncio.run(follow())


# generate ----------------------------------------------------------------------------------------


def test_a_hook_on_the_model_is_called_for_every_token(llama: Pair) -> None:
    """Our own loop does not call the model's forward; whoever hooks into it gets transformers'."""
    llama.model.generate(prompt(), **GREEDY)
    calls: list[int] = []
    hook = llama.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        got = llama.model.generate(prompt(), **GREEDY)
    finally:
        hook.remove()
    assert len(calls) == TOKENS
    assert got[0, 9:].tolist() == new_ids(llama, prompt())


def test_a_changed_head_is_used_at_once(llama: Pair) -> None:
    llama.model.generate(prompt(), **GREEDY)
    head = llama.model.lm_head
    flipped = torch.nn.Linear(head.in_features, head.out_features, bias=False)
    flipped.weight = torch.nn.Parameter(-head.weight)
    llama.model.lm_head = flipped
    try:
        got = llama.model.generate(prompt(), **GREEDY | {"max_new_tokens": 1})
    finally:
        llama.model.lm_head = head
    with torch.no_grad():
        assert int(got[0, -1]) == int(llama.local(prompt()).logits[0, -1].argmin())
