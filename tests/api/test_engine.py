"""Prompts become ids as transformers makes them, and parameters what `generate` understands."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch

from swarm.api.asked import ChatAsked, ChatMessage, CompletionAsked, read
from swarm.api.engine import Engine, Penalties, plain_chat
from swarm.web import HttpProblem
from tests.api.site import FakeModel, Script, tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('only the first may be system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


class Watched:
    """A tokenizer that notes how long the texts are that it is given."""

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template
        self.bos_token_id = 0
        self.read: list[int] = []

    def __call__(self, text: str, **options: Any) -> Any:
        self.read.append(len(text))
        return tokenizer()(text, **options)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        options["chat_template"] = self.chat_template
        return tokenizer().apply_chat_template(*arguments, **options)


def engine(watched: Watched, script: Script | None = None) -> Engine:
    return Engine("fake", FakeModel(script or Script()), watched, 1024)


def chat(*turns: tuple[str, str], **more: Any) -> ChatAsked:
    messages = [{"role": role, "content": content} for role, content in turns]
    return read(ChatAsked, json.dumps({"model": "fake", "messages": messages} | more).encode())


def ids_of(asked: ChatAsked, watched: Watched) -> list[int]:
    return asyncio.run(engine(watched).read_chat(asked.messages, asked)).ids


def test_a_template_is_used_if_there_is_one() -> None:
    asked = chat(("developer", "Be kind."), ("user", "Hello"))
    text = "<system>Be kind.<user>Hello<assistant>"
    assert tokenizer().decode(ids_of(asked, Watched(TEMPLATE))) == text


def test_what_a_template_refuses_is_said() -> None:
    asked = chat(("user", "Hello"), ("system", "Be kind."))
    with pytest.raises(HttpProblem, match="only the first may be system") as caught:
        ids_of(asked, Watched(TEMPLATE))
    assert (caught.value.status, caught.value.body["param"]) == (400, "messages")


def test_without_one_the_text_goes_on() -> None:
    turns = [("system", "A tale."), ("user", "Once"), ("assistant", " upon"), ("user", "Then")]
    messages = [ChatMessage.model_validate({"role": r, "content": c}) for r, c in turns]
    assert plain_chat(messages) == "A tale.\n\nOnce upon\n\nThen"
    assert ids_of(chat(*turns), Watched()) == tokenizer()("A tale.\n\nOnce upon\n\nThen").input_ids


def test_what_is_far_too_long_is_not_read_to_its_end() -> None:
    watched = Watched()
    with pytest.raises(HttpProblem, match="takes 2048 tokens"):
        ids_of(chat(("user", "x" * 1_000_000)), watched)
    assert sum(watched.read) < 10 * 2048
    long = "the people of the land " * 350  # in parts, and it fits
    assert len(ids_of(chat(("user", long)), watched)) < 2048


def test_what_fits_leaves_room_for_what_was_asked() -> None:
    watched = Watched()
    asked = read(CompletionAsked, b'{"model":"fake","prompt":"x","max_tokens":1024}')
    ids = list(range(1000))
    assert asyncio.run(engine(watched).read_text(ids, asked, "prompt")).most == 1024
    with pytest.raises(HttpProblem, match="these are 1025, and 1024 to come"):
        asyncio.run(engine(watched).read_text([5] * 1025, asked, "prompt"))


def test_what_is_not_asked_for_is_as_the_makers_recommend() -> None:
    script = Script()
    fake = engine(Watched(), script)
    fake._model.generation_config.update(temperature=0.6, top_k=20, top_p=0.95)

    async def begin(**more: Any) -> None:
        asked = chat(("user", "x"), **more)
        fake.begin(await fake.read_chat(asked.messages, asked), asked, 0)

    asyncio.run(begin())
    asyncio.run(begin(temperature=0.9, top_k=0))
    asyncio.run(begin(temperature=0))
    asyncio.run(begin(temperature=1e-40))  # logits divided by it are no numbers any more
    first, second, greedy, cold = script.asked
    assert first.items() >= {"temperature": 0.6, "top_k": 20, "top_p": 0.95}.items()
    assert second.items() >= {"temperature": 0.9, "top_k": 0, "top_p": 0.95}.items()
    assert greedy["do_sample"] is False
    assert "temperature" not in greedy
    assert cold["do_sample"] is False


def test_penalties_are_openai_s() -> None:
    """Per occurrence, and once; of what was written, not of the prompt."""
    penalties = Penalties(2, frequency=0.5, presence=1.0)
    scores = penalties(torch.tensor([[3, 3, 1, 1, 2]]), torch.zeros(1, 4))
    assert scores.tolist() == [[0.0, -2.0, -1.5, 0.0]]
