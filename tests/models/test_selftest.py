"""The self-test lets through what agrees, knows what a family can do, and refuses the rest."""

from __future__ import annotations

from contextlib import suppress
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from swarm.errors import UnsupportedModel
from swarm.models.selftest import prove_split
from swarm.models.spans import SplitProof
from tests.models.splits import proof
from tests.models.tiny import FAMILIES

ALONE = frozenset({"bloom", "falcon"})  # their attention does not go through the interface


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_must_be_exact_are_proven(family: str) -> None:
    alone = family in ALONE
    assert proof(family) == SplitProof(can_batch=not alone, can_rewind=True, can_align=alone)


@pytest.mark.parametrize(
    ("family", "able"),
    [
        ("qwen3_next", SplitProof(can_batch=False, can_rewind=False)),
        ("jamba", SplitProof(can_batch=False, can_rewind=False, can_resume=False)),
        ("mamba", SplitProof(can_batch=False, can_rewind=False, can_resume=False)),
        ("llama4_text", SplitProof(can_batch=False, can_rewind=True)),
        ("qwen3_5", SplitProof(can_batch=False, can_rewind=False)),
    ],
)
def test_real_sizes_shrink_and_peculiarities_stay(family: str, able: SplitProof) -> None:
    """Default configs are those of real checkpoints, with up to a trillion weights."""
    assert prove_split(AutoConfig.for_model(family)) == able


@pytest.mark.parametrize(
    "family", ["ctrl", "zaya", "inkling2_text", "bert", "gemma3n_text", "recurrent_gemma"]
)
def test_families_that_come_out_wrong_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=family):
        prove_split(AutoConfig.for_model(family))


@pytest.mark.parametrize("rope", ["yarn", "llama3", "linear"])
def test_stretched_positions_agree(rope: str) -> None:
    config = AutoConfig.for_model("llama")
    config.rope_parameters = {
        "rope_type": rope,
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    assert prove_split(config).can_batch


def test_something_carried_from_block_to_block_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Zaya and others do: a block leaves a note for the next one beside the hidden states."""
    notes: list[Tensor] = []
    run_block: Any = modeling_llama.LlamaDecoderLayer.forward
    run_stack: Any = modeling_llama.LlamaModel.forward

    @wraps(run_block)
    def block(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = notes[-1] if notes else torch.zeros(())
        notes.append(hidden_states.mean())
        return run_block(self, hidden_states, *args, **kwargs) + before

    @wraps(run_stack)
    def stack(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        notes.clear()  # another machine has no notes
        return run_stack(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", block)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", stack)
    with pytest.raises(UnsupportedModel, match="other numbers"):
        prove_split(AutoConfig.for_model("llama"))


@pytest.mark.parametrize("family", ["llama", "ctrl"])  # one that is proven, one that is refused
def test_proving_disturbs_nobodys_random_numbers_nor_threads(family: str) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    try:
        torch.set_num_threads(3)
        with suppress(UnsupportedModel):
            prove_split(AutoConfig.for_model(family))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.rand(2), expected)
