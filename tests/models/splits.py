"""Tiny models cut in three behind a shell, for the tests of this folder."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swarm.models.selftest import ChainedSpans, prove_split
from swarm.models.shell import make_shell
from swarm.models.spans import Span, SplitProof
from swarm.models.stripping import strip
from swarm.types import BlockRange
from tests.models.tiny import LAYERS, VOCAB, tiny_model

MAX_LENGTH = 64
TOLERANCE = 1e-4


@cache
def whole(family: str) -> PreTrainedModel:
    """What transformers has on one machine. Nobody changes it."""
    return tiny_model(family)


@cache
def proof(family: str) -> SplitProof:
    return prove_split(whole(family).config)


def span(family: str, start: int = 0, end: int = LAYERS, **abilities: bool) -> Span:
    """Blocks `[start, end)`; `abilities` override what the self-test found."""
    model = copy.deepcopy(whole(family))
    strip(model, BlockRange(start, end))
    known = proof(family)
    found = {
        "can_batch": known.can_batch,
        "can_rewind": known.can_rewind,
        "can_align": known.can_align,
    }
    return Span(model, BlockRange(start, end), SplitProof(**(found | abilities)))


@cache
def shell(family: str) -> tuple[PreTrainedModel, ChainedSpans]:
    """The client's half and, behind it, three spans; the family's name seeds the cut points."""
    first, second = sorted(random.Random(family).sample(range(1, LAYERS), 2))
    spans = [span(family, *cut) for cut in ((0, first), (first, second), (second, LAYERS))]
    chain = ChainedSpans([(s, s.blocks) for s in spans], MAX_LENGTH)
    model = copy.deepcopy(whole(family))
    make_shell(model, chain)
    return model, chain


def text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def positions(mask: Tensor) -> Tensor:
    """As `generate` computes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, **arguments).logits


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE)
