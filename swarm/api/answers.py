"""Answers in OpenAI's shapes: whole ones, and chunks of streams."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from swarm.api.asked import Asked, ChatAsked
from swarm.api.engine import Engine
from swarm.api.text import Told
from swarm.api.writing import Piece, Travel
from swarm.web import event

DONE = event("[DONE]")


@dataclass(slots=True)
class Usage:
    """Tokens of all prompts and of all choices."""

    prompt: int
    completion: int = 0

    def count(self, tokens: int) -> None:
        self.completion += tokens

    def body(self) -> Mapping[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Shape(ABC):
    """How completions and chats differ."""

    engine: Engine
    with_logprobs: bool
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    @abstractmethod
    def opening(self) -> Mapping[str, Any] | None:
        """What a choice's first chunk holds, before any text."""

    @abstractmethod
    def chunk(self, text: str, told: Sequence[Told]) -> Mapping[str, Any]: ...
    @abstractmethod
    def whole(self, text: str, told: Sequence[Told], prompt: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ChatShape(Shape):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self) -> Mapping[str, Any] | None:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def chunk(self, text: str, told: Sequence[Told]) -> Mapping[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(told)}

    def whole(self, text: str, told: Sequence[Told], prompt: str) -> Mapping[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(told)}

    def _logprobs(self, told: Sequence[Told]) -> Mapping[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*other) for other in token.top],
            }
            for token in told
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Mapping[str, Any]:
        text = self.engine.token_text(token)
        half = "\N{REPLACEMENT CHARACTER}" in text
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),  # JSON knows no infinity
            "bytes": None if half else list(text.encode()),
        }


@dataclass(frozen=True)
class CompletionShape(Shape):
    echo: bool
    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def opening(self) -> Mapping[str, Any] | None:
        return None

    def chunk(self, text: str, told: Sequence[Told]) -> Mapping[str, Any]:
        return {"text": text, "logprobs": self._logprobs(told, 0)}

    def whole(self, text: str, told: Sequence[Told], prompt: str) -> Mapping[str, Any]:
        before = prompt if self.echo else ""
        return {"text": before + text, "logprobs": self._logprobs(told, len(before))}

    def _logprobs(self, told: Sequence[Told], before: int) -> Mapping[str, Any] | None:
        if not self.with_logprobs:
            return None
        text = self.engine.token_text
        return {
            "tokens": [text(token.id) for token in told],
            "token_logprobs": [max(token.logprob, -9999.0) for token in told],
            "top_logprobs": [
                {text(other): max(logprob, -9999.0) for other, logprob in token.top}
                for token in told
            ],
            "text_offset": [token.offset + before for token in told],
        }


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list[str])
    told: list[Told] = field(default_factory=list[Told])
    finish: str | None = None


class Writer:
    """Puts the pieces of one answer into words."""

    def __init__(self, shape: Shape, asked: Asked, usage: Usage, prompts: Sequence[str]) -> None:
        self._shape = shape
        self._usage = usage
        self._prompts = prompts  # as texts, for who wants them back
        self._choices = [_Choice() for _ in range(len(prompts) * (asked.n or 1))]
        self._per_prompt = asked.n or 1
        options = asked.stream_options
        self._with_usage = options is not None and options.include_usage
        self._head = {
            "id": shape.id_prefix + secrets.token_hex(12),
            "object": shape.kind,
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": None,
        }
        self._chunk_head = {**self._head, "object": shape.chunk_kind}

    def take(self, piece: Piece) -> None:
        """For a whole answer."""
        choice = self._choices[piece.choice]
        choice.text.append(piece.text)
        choice.told += piece.told
        choice.finish = piece.finish

    def whole(self) -> Mapping[str, Any]:
        choices = [
            {
                "index": index,
                **self._shape.whole("".join(choice.text), choice.told, self._prompt(index)),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    def openings(self) -> bytes:
        """What comes before all text."""
        chunks: list[bytes] = []
        for index in range(len(self._choices)):
            if (first := self._shape.opening()) is not None:
                chunks.append(self._chunk(index, first))
            elif before := self._prompt(index):
                chunks.append(self._chunk(index, self._shape.chunk(before, ())))
        return b"".join(chunks)

    def chunk(self, piece: Piece) -> bytes:
        """Empty if there is nothing to tell."""
        if not (piece.text or piece.told or piece.finish):
            return b""
        return self._chunk(piece.choice, self._shape.chunk(piece.text, piece.told), piece.finish)

    def travel(self, travel: Travel) -> bytes:
        """Our own: a chunk without choices."""
        body = {
            "choice": travel.choice,
            "route": [asdict(leg) for leg in travel.legs],
            "recoveries": travel.recoveries,
        }
        return _event({**self._chunk_head, "choices": [], "swarm": body})

    def end(self) -> bytes:
        if not self._with_usage:
            return DONE
        usage = self._usage.body()
        return _event({**self._chunk_head, "choices": [], "usage": usage}) + DONE

    def _chunk(self, index: int, body: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, **body, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}
        return _event({**self._chunk_head, "choices": [choice], **usage})

    def _prompt(self, index: int) -> str:
        return self._prompts[index // self._per_prompt]


def shape_of(engine: Engine, asked: Asked) -> Shape:
    with_logprobs = asked.alternatives is not None
    if isinstance(asked, ChatAsked):
        return ChatShape(engine, with_logprobs)
    return CompletionShape(engine, with_logprobs, bool(getattr(asked, "echo", False)))


def _event(body: Mapping[str, Any]) -> bytes:
    return event(json.dumps(body, separators=(",", ":"), ensure_ascii=False))
