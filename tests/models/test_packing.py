"""Packed weights and fused norms compute what the model's own do, or stay away."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from swarm.models import packing
from swarm.models.packing import FusedNorm, JoinedLinear, PackedLinear, quicken


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
        for one in (x[:1, :1], x[0, 0]):  # a single row goes another way
            assert torch.allclose(
                packed(one), expected[0, 0].expand(*one.shape[:-1], 640), atol=1e-5
            )
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


class _Attending(nn.Module):
    """Two products of one tensor, a third of another, and one that is called twice."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 24, bias=bias), nn.Linear(32, 40, bias=bias)
        self.o, self.twice = nn.Linear(64, 32, bias=bias), nn.Linear(32, 32, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.twice(self.twice(x))
        return self.o(torch.cat([self.q(x), self.k(x)], dim=-1))


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_one_tensor_become_one(bias: bool) -> None:
    torch.manual_seed(0)
    plain = _Attending(bias=bias)
    x, other = torch.randn(2, 5, 32), torch.randn(3, 1, 32)
    with torch.inference_mode():
        expected, weight = [plain(x), plain(other)], plain.k.weight.clone()
        quicken(plain, lambda: plain(x))
        kinds = [type(module) for module in (plain.q, plain.k, plain.o, plain.twice)]
        assert kinds == [JoinedLinear, JoinedLinear, nn.Linear, nn.Linear]
        assert torch.allclose(plain(x), expected[0], atol=1e-6)
        assert torch.allclose(plain(other), expected[1], atol=1e-6)
        assert torch.equal(plain.k.weight, weight)
        assert (plain.k.bias is not None) == bias


class _Changing(_Attending):
    """Changes the tensor between the two products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        q = self.q(x)
        x.mul_(2)
        return self.o(torch.cat([q, self.k(x)], dim=-1))


class _Flattening(_Attending):
    """Wants its products in one piece."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.q(x).view(-1, 24), self.k(x).view(-1).view(-1, 40)]
        return self.o(torch.cat(parts, dim=-1))


@pytest.mark.parametrize("kind", [_Changing, _Flattening])
def test_products_that_must_stay_apart_do(kind: type[_Attending]) -> None:
    plain = kind(bias=True)
    x = torch.randn(1, 3, 32)
    with torch.inference_mode():
        expected = plain(x)
        quicken(plain, lambda: plain(x))
        assert type(plain.q) is type(plain.k) is nn.Linear
        assert torch.equal(plain(x), expected)


def test_weights_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one layer's weights twice: a server's memory is full of them."""
    plain = nn.Sequential(*[_Attending(bias=False) for _ in range(4)])
    alive = [weakref.ref(part) for layer in plain for part in (layer.q, layer.k)]
    counts: list[int] = []
    make = packing._linear

    def counted(*parts: Any) -> nn.Linear:
        counts.append(sum(part() is not None for part in alive))
        return make(*parts)

    monkeypatch.setattr(packing, "_linear", counted)
    x = torch.randn(1, 3, 32)
    with torch.inference_mode():
        quicken(plain, lambda: plain(x))
    assert counts == [8, 6, 4, 2]
    assert sum(part() is not None for part in alive) == 0
