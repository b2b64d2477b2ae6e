"""The next token of many texts at once: what `generate` does with logits, together where it can."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

_CPU = torch.device("cpu")
# Processors that look at each row of logits alone, and not at the text: rows may share a call.
_ROW_WISE = (
    logits_process.EpsilonLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)


@dataclass(frozen=True, slots=True)
class Token:
    """One new token of a text.

    If asked for, `logprob` is the natural logarithm of its probability as the head gave it, before
    temperature and the like, and `top` holds the likeliest tokens with theirs, best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Text:
    """One row of ids that grows, and how: `generate`'s arguments as transformers understands them.

    `prompt` is `ids`, as they are at first, without padding. `generator` None samples from torch's
    global one; `logprobs` is how many of the likeliest tokens are told with each token (None: not
    even its own logarithm). `device` is where the ids came from: tokens are chosen there.
    """

    ids: list[int]
    prompt: list[int]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    sample: bool
    generator: torch.Generator | None = None
    logprobs: int | None = None
    device: torch.device = _CPU
    max_length: int = field(init=False)
    _ends: frozenset[int] = field(init=False)
    _others: list[StoppingCriteria] = field(init=False)
    settings: Hashable = field(init=False)  # rows with the same share calls; None: with nobody

    def __post_init__(self) -> None:
        self.max_length = min(
            (c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)),
            default=1 << 20,
        )
        ends = [c for c in self.criteria if isinstance(c, EosTokenCriteria)]
        self._ends = frozenset(i for c in ends for i in c.eos_token_id.flatten().tolist())
        cheap = (MaxLengthCriteria, EosTokenCriteria)
        self._others = [c for c in self.criteria if not isinstance(c, cheap)]
        self.settings = _settings_of(self.processors)

    @property
    def row_wise(self) -> bool:
        """Its next token does not depend on anything but the logits."""
        return self.settings is not None and not self._others

    def row(self) -> Tensor:
        """[1, T]"""
        return torch.tensor([self.ids], device=self.device)

    def grow(self, token: int) -> bool:
        """Append a token; whether it is the last one."""
        self.ids.append(token)
        if len(self.ids) >= self.max_length or token in self._ends:
            return True
        others: Any = self._others
        return any(bool(criterion(self.row(), None).all()) for criterion in others)


def choose(texts: Sequence[Text], logits: Tensor) -> list[Token | Exception]:
    """The next token of each text, or why its processors have none; the texts are left alone.

    `logits` is [len(texts), V], float32.
    """
    tokens: list[int | Exception] = [-1] * len(texts)
    groups: dict[Hashable, list[int]] = {}
    for index, text in enumerate(texts):
        key = (index,) if text.settings is None else (text.settings, text.sample, text.device)
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        scores = logits if len(group) == len(texts) else logits[group]
        try:
            chosen = _choose_alike([texts[index] for index in group], scores)
        except Exception as error:  # noqa: BLE001  # one text's processor must not stop others
            chosen = [error] * len(group)
        for index, token in zip(group, chosen, strict=True):
            tokens[index] = token
    return [
        token if isinstance(token, Exception) else _with_logprobs(text, token, row)
        for text, token, row in zip(texts, tokens, logits, strict=True)
    ]


def _choose_alike(texts: Sequence[Text], scores: Tensor) -> list[int]:
    """For texts with the same settings, or for one."""
    first = texts[0]
    scores = scores.to(first.device)
    if first.processors:  # those that are shared do not look at the ids
        ids = first.row() if first.settings is None else torch.empty(len(texts), 0)
        scores = first.processors(ids, scores.clone())  # pyright: ignore
    if first.sample:
        return _draw(texts, scores)
    return scores.argmax(dim=-1).tolist()


def _draw(texts: Sequence[Text], scores: Tensor) -> list[int]:
    probabilities = torch.softmax(scores, dim=-1)
    rows = zip(texts, probabilities.split(1), strict=True)
    return [int(torch.multinomial(row, 1, generator=text.generator)) for text, row in rows]


def _with_logprobs(text: Text, token: int, logits: Tensor) -> Token:
    if text.logprobs is None:
        return Token(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    best = torch.topk(logprobs, min(text.logprobs, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), top)


def _settings_of(processors: Sequence[LogitsProcessor]) -> Hashable:
    """Equal for processors that do the same to a row; None if they look at more than the row."""
    settings: list[Hashable] = []
    for processor in processors:
        values = tuple(sorted(vars(processor).items()))
        if type(processor) not in _ROW_WISE or not all(
            isinstance(value, int | float | str) for _, value in values
        ):
            return None
        settings.append((type(processor), values))
    return tuple(settings)
