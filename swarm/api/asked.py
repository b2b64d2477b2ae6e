"""What a request may ask for: OpenAI's parameters, bounded, and a sentence for what is wrong."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from swarm.web import HttpProblem

R = TypeVar("R", bound="Asked")

MAX_CHOICES = 16
_MAX_STOPS = 16
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

Stop = Annotated[str, Field(min_length=1, max_length=500)]
Text = Annotated[str, Field(max_length=1 << 24)]  # the size of requests is limited, too
Ids = Annotated[list[int], Field(max_length=1 << 20)]

# What others offer and we do not, with the values that ask for nothing.
_NOT_HERE: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
# What makes no difference here: clients send it, and need not be told.
_NO_MATTER = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity"),
)


class StreamOptions(BaseModel):
    """`include_route` is ours: which servers the words pass through, and when one is lost."""

    model_config = _STRICT
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against listeners on the way; TLS is not ours
    include_route: bool = False


class Asked(BaseModel):
    """What completions and chats have in common. None: as the model's makers recommend."""

    model_config = _STRICT
    model: Annotated[str, Field(max_length=500)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None  # logits stay finite
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None
    ) = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def bias(self) -> Mapping[int, float]:
        """By token. Raises HttpProblem."""
        given = self.logit_bias or {}
        for key in given:
            if not key.isdecimal() or len(key) > 9:
                raise HttpProblem(400, f"'{key[:20]}' is no token id", param="logit_bias")
        return {int(key): value for key, value in given.items()}

    @property
    def limit(self) -> int | None:
        """How many tokens at most."""
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to tell with each; None: nothing about probabilities."""


class CompletionAsked(Asked):
    prompt: Text | Annotated[list[Text] | Ids | list[Ids], Field(min_length=1, max_length=1 << 20)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16  # as OpenAI has it

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """Clients send back what they were sent, with fields that say nothing: those are left out."""

    model_config = ConfigDict(strict=True, frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatAsked(Asked):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _asked_for(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs to be true")
        return value

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read(kind: type[R], body: bytes) -> R:
    """A request's JSON as what it asks for. Raises HttpProblem, which names the parameter."""
    try:
        given: Any = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HttpProblem(400, f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise HttpProblem(400, "the body must be a JSON object")
    for name, harmless in _NOT_HERE.items():
        if given.pop(name, None) not in (None, *harmless):
            raise HttpProblem(
                400, f"{name} is not supported here", param=name, code="unsupported_parameter"
            )
    for name in _NO_MATTER:
        given.pop(name, None)
    try:
        return kind.model_validate({key: given[key] for key in given if given[key] is not None})
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> HttpProblem:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = str(first["loc"][0])[:60]
    for part in first["loc"][1:]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in ("role", "content", "text", "type", "include_usage", "include_route"):
            param += f".{part}"
    if first["type"] == "extra_forbidden":
        return HttpProblem(400, f"{param} is no parameter", param=param, code="unknown_parameter")
    what = first["msg"].removeprefix("Value error, ")
    what = what[:1].lower() + what[1:]
    return HttpProblem(400, f"{param}: {what}", param=param, code="invalid_value")
