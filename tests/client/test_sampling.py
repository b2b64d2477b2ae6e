"""Tokens are chosen where the ids came from, as `generate` does it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from swarm.client.sampling import Text, choose


def test_processors_are_given_ids_and_logits_on_one_device() -> None:
    """The ids may have come from a GPU, and the head may be on one."""
    seen: list[str] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend([ids.device.type, scores.device.type])
        raise ValueError("that is enough")

    processors: Any = LogitsProcessorList([note])
    elsewhere = torch.device("meta")
    text = Text([1], [1], processors, StoppingCriteriaList(), sample=False, device=elsewhere)
    [failed] = choose([text], torch.zeros(1, 5))
    assert isinstance(failed, ValueError)
    assert seen == ["meta", "meta"]
