"""A figure for wrong tokens is worth nothing: the check must see them, and count ties."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.figures import NoFigure
from benchmarks.lab import Stopwatch, check_tokens

PROMPT = 2


class Fake:
    """After any text the best next token is the last one plus 1; `second` is `short` behind.

    In float32 its logits are off by up to `rounding`.
    """

    def __init__(
        self, second: int = 5, short: float = 1.0, end: int | None = None, rounding: float = 1e-6
    ) -> None:
        self.second, self.short, self.rounding = second, short, rounding
        self.generation_config = SimpleNamespace(eos_token_id=end)
        self.dtype = torch.float32

    def double(self) -> Fake:
        self.dtype = torch.float64
        return self

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*ids.shape, 10, dtype=self.dtype)
        logits.scatter_(-1, (ids[..., None] + 1) % 10, 2.0)
        logits[..., self.second] = 2.0 - self.short
        if self.dtype == torch.float32:
            logits[..., 0] += self.rounding
        return SimpleNamespace(logits=logits)


def test_right_tokens_pass_in_every_row() -> None:
    assert check_tokens(Fake(), torch.tensor([[7, 1, 2, 3, 4], [9, 5, 6, 7, 8]]), PROMPT) == 0


def test_one_wrong_token_is_named() -> None:
    with pytest.raises(NoFigure, match="token 1 of row 1 is 5, but one machine writes 7"):
        check_tokens(Fake(), torch.tensor([[7, 1, 2, 3, 4], [9, 5, 6, 5, 6]]), PROMPT)


def test_the_other_one_of_a_tie_counts() -> None:
    """It may be behind by what rounding does to the reference itself, and by nothing more."""
    tied = torch.tensor([[7, 1, 2, 5, 6]])  # 5 instead of 3
    assert check_tokens(Fake(short=1e-5, rounding=2e-5), tied, PROMPT) == 1
    with pytest.raises(NoFigure, match="1e-05 more, where float32 rounds by 5e-06"):
        check_tokens(Fake(short=1e-5, rounding=5e-6), tied, PROMPT)


def test_a_forbidden_end_is_no_best_token() -> None:
    """`min_new_tokens` makes generate take the second best there."""
    assert check_tokens(Fake(second=5, end=3), torch.tensor([[7, 1, 2, 5, 6]]), PROMPT) == 0


def test_a_stopwatch_leaves_the_prompt_out() -> None:
    rung: list[int] = []
    watch = Stopwatch(2, lambda: rung.append(len(watch.times)))
    for token in range(4):
        watch.put(token)
    assert rung == [2]
    assert len(watch.times) == 3
    assert len(watch.gaps) == 2
    assert 0 <= watch.first <= watch.times[-1] - watch.begin
