"""Packed weights and fused norms compute what the model's own do, or stay away."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from swarm.models.packing import FusedNorm, PackedLinear, quicken


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_weights_multiply_as_plain_ones(bias: bool, rows: int) -> None:
    large, small = nn.Linear(1024, 640, bias=bias), nn.Linear(640, 8)
    plain = nn.Sequential(large, small)
    x = torch.randn(2, rows, 1024)
    with torch.inference_mode():
        expected = large(x)
        weight = large.weight.clone()
        quicken(plain)
        packed = plain[0]
        assert isinstance(packed, PackedLinear)
        assert plain[1] is small  # too small to gain anything
        assert torch.allclose(packed(x), expected, atol=1e-5)
        assert torch.equal(packed.weight, weight)


def test_norms_are_replaced_only_by_their_like() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([LlamaRMSNorm(64, eps=1e-5), Gemma3RMSNorm(64), nn.LayerNorm(64)])
    with torch.inference_mode():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(64))
        x = torch.randn(3, 5, 64) * 7
        expected = plain[0](x)
        quicken(plain)
        assert [type(norm) is FusedNorm for norm in plain] == [True, False, False]
        assert torch.allclose(plain[0](x), expected, rtol=1e-6)


def test_models_do_not_notice() -> None:
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=512, intermediate_size=1376))
    x = torch.randn(1, 7, 512)
    with torch.inference_mode():
        expected = mlp(x)
        quicken(mlp)
        assert torch.allclose(mlp(x), expected, atol=1e-5)
