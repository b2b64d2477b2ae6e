"""The API over a swarm: the words are those of one machine, whatever happens to servers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai

from tests.api.site import KEY, DemoSwarm, client

TEXT = "And it came to pass in those days, that"


def chat(text: str = TEXT, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "swarm-demo", "messages": messages, "temperature": 0, "max_tokens": 12} | more


def test_the_words_are_those_of_one_machine(whole: DemoSwarm, address: str) -> None:
    ask = client(address).chat.completions
    expected = whole.reference(TEXT, max_new_tokens=12)
    assert ask.create(**chat()).choices[0].message.content == expected
    chunks = ask.create(**chat(stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    sampled = whole.reference(TEXT, seed=5, temperature=0.9, top_p=0.8, max_new_tokens=12)
    answer = ask.create(**chat(temperature=0.9, top_p=0.8, seed=5))
    assert answer.choices[0].message.content == sampled


def test_a_chat_without_a_template_goes_on_with_the_text(whole: DemoSwarm, address: str) -> None:
    expected = whole.reference("In the beginning God", max_new_tokens=5)
    answer = client(address).chat.completions.create(
        model="swarm-demo",
        messages=[
            {"role": "user", "content": "In the beginning"},
            {"role": "assistant", "content": " God"},
        ],
        temperature=0,
        max_tokens=5,
    )
    assert answer.choices[0].message.content == expected


def test_a_killed_server_in_mid_sentence_changes_no_word(whole: DemoSwarm, address: str) -> None:
    expected = whole.reference(TEXT, max_new_tokens=20)
    chunks = client(address).chat.completions.create(
        **chat(max_tokens=20, stream=True, stream_options={"include_route": True})
    )
    text, killed, routes = "", None, list[Any]()
    for chunk in chunks:
        if ours := (chunk.model_extra or {}).get("swarm"):
            routes.append(ours)
        elif chunk.choices:
            text += chunk.choices[0].delta.content or ""
            if killed is None and len(text) > 10:
                killed = whole.busy_middle()
                whole.swarm.cut(killed)
    assert text == expected
    assert killed is not None
    assert killed.peer_id in {leg["peer"] for leg in routes[0]["route"]}
    assert killed.peer_id not in {leg["peer"] for leg in routes[-1]["route"]}
    assert (routes[0]["recoveries"], routes[-1]["recoveries"]) == (0, 1)


def test_a_reader_who_leaves_frees_the_servers(whole: DemoSwarm, address: str) -> None:
    stream = client(address).chat.completions.create(**chat(max_tokens=1000, stream=True))
    next(iter(stream))
    next(iter(stream))
    stream.close()
    whole.swarm.wait_until(lambda: not any(s.handler.sessions for s in whole.swarm.servers))


def test_sixteen_streams_at_a_time_get_fair_shares(whole: DemoSwarm, address: str) -> None:
    """`python -m benchmarks api` measures sixty-four."""

    async def one(ask: openai.AsyncOpenAI) -> tuple[str, float]:
        begun, text = time.monotonic(), ""
        stream = await ask.chat.completions.create(**chat(stream=True))
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text, time.monotonic() - begun

    async def everyone() -> list[tuple[str, float]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY) as ask:
            return await asyncio.gather(*(one(ask) for _ in range(16)))

    answers = asyncio.run(everyone())
    assert {text for text, _ in answers} == {whole.reference(TEXT, max_new_tokens=12)}
    seconds = sorted(taken for _, taken in answers)
    assert seconds[-1] < 2 * seconds[len(seconds) // 2], seconds
