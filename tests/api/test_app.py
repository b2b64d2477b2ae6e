"""What OpenAI's own client gets from us, unmodified, and what strangers get."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from swarm.api import app
from swarm.api.engine import Engine
from swarm.api.keys import Grant
from swarm.errors import NoRoute, PeerUnavailable
from tests.api.site import KEY, Script, client, fake_api, serving, tokenizer
from tests.waits import wait_until

HELLO: list[Any] = [{"role": "user", "content": "In the beginning"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serving(lambda: fake_api(script, body_bytes=1 << 20)) as url:
        yield script, url


@pytest.fixture
def site(shared: tuple[Script, str]) -> tuple[Script, openai.OpenAI]:
    script, url = shared
    script.__init__()
    return script, client(url)


def post(url: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | headers
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=30)


Site = tuple[Script, openai.OpenAI]


def test_models(site: Site) -> None:
    _, ask = site
    [model] = ask.models.list().data
    assert (model.id, model.owned_by) == ("fake", "swarm")
    assert ask.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-7' here, but: fake"):
        ask.models.retrieve("gpt-7")


def test_a_chat_at_once(site: Site) -> None:
    script, ask = site
    script.ends = True
    answer = ask.chat.completions.create(model="fake", messages=HELLO)
    [choice] = answer.choices
    assert choice.message.content == " of the world"
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == (
        "assistant",
        "stop",
        None,
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    assert answer.usage.total_tokens == 7
    [asked] = script.asked
    assert (asked["do_sample"], asked["temperature"], asked["top_k"]) == (True, 1.0, 0)
    assert asked["max_new_tokens"] == 1024


def test_a_chat_as_a_stream(site: Site) -> None:
    script, ask = site
    chunks = list(
        ask.chat.completions.create(
            model="fake",
            messages=HELLO,
            stream=True,
            max_tokens=3,
            stream_options={"include_usage": True},
        )
    )
    *words, last = chunks
    assert words[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in words]
    assert "".join(texts) == " of the world"
    assert sum(map(bool, texts)) == 3
    assert [chunk.choices[0].finish_reason for chunk in words][-2:] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3
    assert script.streams[0].cancelled.is_set()


def test_words_come_one_by_one(site: Site) -> None:
    script, ask = site
    script.allowed = 1
    stream = ask.chat.completions.create(model="fake", messages=HELLO, stream=True)
    texts = (chunk.choices[0].delta.content for chunk in stream)
    assert next(texts) == ""
    for count, word in enumerate([" of", " the", " world"], 1):
        assert next(texts) == word
        script.allow(count + 1)


def test_several_choices_have_seeds_of_their_own(site: Site) -> None:
    script, ask = site
    answer = ask.chat.completions.create(model="fake", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(asked["seed"] for asked in script.asked) == [7, 8, 9]
    chunks = ask.chat.completions.create(model="fake", messages=HELLO, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: " of the world", 1: " of the world"}
    assert script.asked[3]["seed"] != script.asked[4]["seed"]


def test_a_stop_string_frees_the_servers(site: Site) -> None:
    script, ask = site
    script.text = " of the world without end"
    script.allowed = 4  # what comes after the stop string is never waited for
    answer = ask.chat.completions.create(model="fake", messages=HELLO, stop=["orld w", "zzz"])
    assert answer.choices[0].message.content == " of the w"
    assert answer.choices[0].finish_reason == "stop"
    assert script.streams[0].cancelled.is_set()


def test_logprobs_of_a_chat(site: Site) -> None:
    script, ask = site
    answer = ask.chat.completions.create(
        model="fake", messages=HELLO, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [token.token for token in content] == [" of", " the", " world"]
    assert content[0].bytes == list(b" of")
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert script.asked[0]["logprobs"] == 2


def test_completions(site: Site) -> None:
    script, ask = site
    answer = ask.completions.create(
        model="fake", prompt=["In the", "It was"], n=2, echo=True, temperature=0
    )
    assert [choice.text for choice in answer.choices] == [
        "In the of the world",
        "In the of the world",
        "It was of the world",
        "It was of the world",
    ]
    assert script.asked[0]["do_sample"] is False
    ids = tokenizer()("In the").input_ids
    tokens = ask.completions.create(model="fake", prompt=ids, logprobs=1, max_tokens=2)
    assert tokens.choices[0].logprobs is not None
    assert tokens.choices[0].logprobs.tokens == [" of", " the"]
    assert tokens.choices[0].logprobs.text_offset == [0, 3]
    assert script.asked[-1]["ids"] == ids
    chunks = ask.completions.create(model="fake", prompt="In the", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " of the world"


def test_a_text_goes_on_with_a_blank_where_decoding_leaves_the_first_one_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SentencePiece's tokenizers do: Llama 2's, Mistral's, Gemma's."""
    _, ask = site
    whole = Engine.decode
    monkeypatch.setattr(Engine, "decode", lambda *given: whole(*given).removeprefix(" "))
    answer = ask.completions.create(model="fake", prompt="In the beginning")
    assert answer.choices[0].text == " of the world"


def test_every_parameter_arrives(site: Site) -> None:
    script, ask = site
    ask.chat.completions.create(
        model="fake",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=1,
        logit_bias={"5": -100},
        max_completion_tokens=9,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2},
    )
    [asked] = script.asked
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "max_new_tokens": 9}
    assert asked.items() >= expected.items()
    assert asked["repetition_penalty"] == 1.2
    assert asked["sequence_bias"] == [[[5], -100.0]]
    assert len(asked["logits_processor"]) == 1


# Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_whoever_leaves_frees_the_servers_at_once(shared: Any, site: Site, streaming: bool) -> None:
    script, _ = site
    script.allowed = 2
    body = {"model": "fake", "messages": HELLO, "stream": streaming}
    with httpx.Client(base_url=shared[1]) as leaving:
        thread = None
        if streaming:
            with leaving.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:

            def ask() -> None:
                with pytest.raises(httpx.HTTPError):
                    leaving.post("/v1/chat/completions", json=body, timeout=0.3)

            thread = threading.Thread(target=ask)
            thread.start()
            thread.join(20)
        wait_until(lambda: len(script.streams) == 1)
        assert script.streams[0].cancelled.wait(60)
    metrics = httpx.get(f"{shared[1]}/metrics").text
    assert "swarm_api_streams 0.0" in metrics


@pytest.mark.parametrize("streaming", [True, False])
def test_a_swarm_that_cannot_answer_is_said_with_a_status(site: Site, streaming: bool) -> None:
    script, ask = site
    script.text, script.failure = "", NoRoute("lost 8:16 at 192.0.2.7:40123")
    script.missing = ["8:16"]
    with pytest.raises(openai.InternalServerError, match="nobody serves blocks 8:16") as caught:
        ask.chat.completions.create(model="fake", messages=HELLO, stream=streaming)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "10"
    assert "192.0.2.7" not in caught.value.response.text


def test_a_stream_that_breaks_says_so(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    script, ask = site
    script.failure = PeerUnavailable("192.0.2.7:40123 is silent")
    stream = ask.chat.completions.create(model="fake", messages=HELLO, stream=True)
    words: list[str] = []
    with pytest.raises(openai.APIError, match="its servers do not answer"):
        words += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "is silent" in caplog.text


def test_a_defect_is_logged_and_not_told(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    script, ask = site
    script.text, script.failure = "", RuntimeError("secret")
    with pytest.raises(openai.InternalServerError, match="something broke here") as caught:
        ask.chat.completions.create(model="fake", messages=HELLO)
    assert "secret" not in caught.value.response.text
    assert "secret" in caplog.text


def test_the_servers_behind_the_words_are_told_to_who_asks(site: Site) -> None:
    script, ask = site
    script.hops = [
        SimpleNamespace(blocks="0:24", peer_id="Qm1", name="<b>Ada</b>\u202e", failure=None)
    ]
    script.allowed = 1
    stream = ask.chat.completions.create(
        model="fake",
        messages=HELLO,
        stream=True,
        stream_options={"include_route": True},  # type: ignore[typeddict-unknown-key]
    )
    travels: list[Any] = []
    for chunk in stream:
        if ours := (chunk.model_extra or {}).get("swarm"):
            assert chunk.choices == []
            travels.append(ours)
            if len(travels) == 1:
                script.hops[0].failure = PeerUnavailable("gone")
            else:
                script.allow(9)
    first, lost = (travel["route"][0] for travel in travels[:2])
    assert first == {"blocks": "0:24", "peer": "Qm1", "name": "<b>Ada</b>\u202e", "lost": False}
    assert lost["lost"] is True


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"model": ', 400, "no JSON"),
        ({"model": "gpt-7", "messages": HELLO}, 404, "there is no model"),
        ({"model": "fake", "messages": HELLO, "temperature": -1}, 400, "temperature"),
        ({"model": "fake", "messages": HELLO, "max_tokens": 5000}, 400, "at most 1024 tokens"),
        ({"model": "fake", "messages": [{"role": "user", "content": "x " * 3000}]}, 400, "2048"),
        ({"model": "fake", "messages": [{"role": "user", "content": "x" * 900_000}]}, 400, "2048"),
        (b" " * 10_000_000, 413, "1,048,576 bytes"),
    ],
    ids=["json", "model", "parameter", "too much", "too long", "one word", "10 MB"],
)
def test_what_cannot_be_is_refused(shared: Any, body: Any, status: int, words: str) -> None:
    answer = post(shared[1], body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_ten_megabytes_from_openai_s_client(site: Site) -> None:
    _, ask = site
    with pytest.raises(openai.APIStatusError) as caught:
        ask.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "x" * 10_000_000}]
        )
    assert caught.value.status_code == 413


def test_only_json_is_read_so_that_no_web_page_can_ask_in_our_name(shared: Any) -> None:
    body = {"model": "fake", "messages": HELLO}
    assert post(shared[1], body, **{"content-type": "text/plain"}).status_code == 415
    assert post(shared[1], body, **{"content-type": "application/json; x=y"}).status_code == 200


def test_ids_that_the_model_does_not_have(site: Site) -> None:
    script, ask = site
    for ids in ([-1], [10**9]):
        with pytest.raises(openai.BadRequestError, match="token ids of this model"):
            ask.completions.create(model="fake", prompt=ids)
    with pytest.raises(openai.BadRequestError, match="token ids"):
        ask.completions.create(model="fake", prompt="x", logit_bias={"100000": 1})
    assert script.asked == []


def test_an_empty_prompt_begins_a_text(site: Site) -> None:
    script, ask = site
    ask.completions.create(model="fake", prompt="")
    assert script.asked[0]["ids"] == [tokenizer().bos_token_id]


# Keys --------------------------------------------------------------------------------------------


def test_keys_open_and_are_never_written_down(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lambda: fake_api(Script(), Grant(key=KEY))) as url:
        assert client(url).models.list().data
        wrong = "sk-wrong-0123456789"
        with pytest.raises(openai.AuthenticationError, match="not known here"):
            client(url, wrong).models.list()
        with pytest.raises(openai.AuthenticationError):
            client(url, wrong).chat.completions.create(model="fake", messages=HELLO)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/healthz").json()["status"] == "ok"
        assert httpx.get(f"{url}/").status_code == 200
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("swarm")]
    assert not any(KEY in line or wrong in line for line in ours)


def test_a_key_s_limits_are_told_with_when_to_come_back() -> None:
    script = Script(allowed=0)
    grant = Grant(key=KEY, streams=1, tokens_per_minute=5)
    with serving(lambda: fake_api(script, grant)) as url:
        ask = client(url)
        first = threading.Thread(
            target=lambda: ask.chat.completions.create(model="fake", messages=HELLO)
        )
        first.start()
        wait_until(lambda: len(script.streams) == 1)
        with pytest.raises(openai.RateLimitError, match="1 streams at a time") as caught:
            ask.chat.completions.create(model="fake", messages=HELLO)
        assert caught.value.response.headers["retry-after"] == "1"
        script.allow(9)
        first.join(20)
        with pytest.raises(openai.RateLimitError, match="tokens of this key") as caught:
            ask.chat.completions.create(model="fake", messages=HELLO)
        assert int(caught.value.response.headers["retry-after"]) >= 2


def test_who_waits_too_long_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_FIRST_SECONDS", 0.0)  # a turn is waited for longer than that
    script = Script(allowed=0)
    with serving(lambda: fake_api(script, streams=1, patience=0.05)) as url:
        ask = client(url)
        first = threading.Thread(
            target=lambda: ask.chat.completions.create(model="fake", messages=HELLO)
        )
        first.start()
        wait_until(lambda: len(script.streams) == 1)
        with pytest.raises(openai.RateLimitError, match="no place was free") as caught:
            ask.chat.completions.create(model="fake", messages=HELLO, stream=True)
        assert caught.value.response.headers["retry-after"] == "5"
        script.allow(9)
        first.join(20)
        assert ask.chat.completions.create(model="fake", messages=HELLO).choices
        assert 'swarm_api_refusals_total{status="429"} 1.0' in httpx.get(f"{url}/metrics").text
