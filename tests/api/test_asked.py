"""Requests are understood or refused in a sentence that names what is wrong."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.api.asked import Asked, ChatAsked, CompletionAsked, read
from swarm.web import HttpProblem

HELLO = [{"role": "user", "content": "hello"}]


def chat(**more: Any) -> ChatAsked:
    return read(ChatAsked, json.dumps({"model": "m", "messages": HELLO} | more).encode())


def refusal(kind: type[Asked], body: bytes) -> dict[str, Any]:
    with pytest.raises(HttpProblem) as caught:
        read(kind, body)
    assert caught.value.status == 400
    return caught.value.body


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": [*HELLO, {"role": "wizard", "content": ""}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(more: dict[str, Any], param: str) -> None:
    body = refusal(ChatAsked, json.dumps({"model": "m", "messages": HELLO} | more).encode())
    assert body["param"] == param
    assert param.split("[")[0].split(".")[0] in body["message"]
    assert body["type"] == "invalid_request_error"


def test_a_picture_is_refused_where_only_text_is_read() -> None:
    content = [{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]})
    assert refusal(ChatAsked, body.encode())["param"].startswith("messages[0].content")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'"\\ud800"'],
    ids=repr,
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert "body" in refusal(ChatAsked, body)["message"]


@given(st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(sorted(ChatAsked.model_fields)) | st.text(max_size=5), inner),
))  # fmt: skip
def test_nothing_else_ever_comes_out(value: Any) -> None:
    for kind in (ChatAsked, CompletionAsked):
        with suppress(HttpProblem):
            read(kind, json.dumps(value).encode("utf-8", "surrogatepass"))


def test_what_clients_send_beside_it_does_not_matter() -> None:
    asked = chat(user="me", store=False, tools=[], tool_choice="auto", temperature=None, n=None)
    assert asked.temperature is None
    assert chat(messages=[{"role": "assistant", "content": "x", "refusal": None, "audio": None}])


def test_parts_of_a_message_are_put_together() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


def test_limits_have_two_names_and_completions_a_default() -> None:
    assert chat(max_tokens=5).limit == 5
    assert chat(max_tokens=5, max_completion_tokens=7).limit == 7
    assert chat().limit is None
    assert read(CompletionAsked, b'{"model":"m","prompt":"x"}').limit == 16


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [1, 2], [[1], [2, 3]]], ids=str)
def test_all_four_kinds_of_prompts(prompt: Any) -> None:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert read(CompletionAsked, body).prompt == prompt


def test_bias_is_by_token() -> None:
    assert chat(logit_bias={"5": -100}).bias == {5: -100.0}
    for key in ("x", "-1", "9" * 20, "٣٣٣٣٣٣٣٣٣٣"):
        with pytest.raises(HttpProblem, match="no token id"):
            assert chat(logit_bias={key: 1}).bias
