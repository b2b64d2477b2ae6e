"""Attention where everything lies side by side: one product per row, with whatever a family does to
its scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

UNSEEN = -1e30  # added to scores; finite, so that rows which see nothing stay finite as well


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights: transformers' own arguments."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None  # [heads]


def attend(
    queries: Tensor,
    held: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """`[rows, heads, tokens, dim]` queries, `[rows, kv_heads, slots, dim]` keys and values, and
    what is added to scores (None = causal): `[rows, tokens, heads, value_dim]`."""
    keys, values = held
    rows, heads, tokens, _ = queries.shape
    kv_heads = keys.shape[1]
    if mask is None and scoring.softcap is None and scoring.sinks is None:
        output = nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scoring.scaling, enable_gqa=True
        )
        return output.transpose(1, 2)
    if mask is None:
        mask = torch.full((tokens, tokens), UNSEEN, device=keys.device).triu(1).to(keys.dtype)
    # Query heads that share a key head become rows of one product: no copies of the keys.
    mask = mask.repeat(*[1] * (mask.ndim - 2), heads // kv_heads, 1)
    grouped = queries.reshape(rows, kv_heads, -1, queries.shape[3])
    if scoring.softcap is None and scoring.sinks is None:
        output = nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, scale=scoring.scaling
        )
    else:
        output = _scored(grouped, keys, values, mask, scoring)
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2)


def _scored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """With capped scores (Gemma 2) or a learned sink per head (GPT-OSS)."""
    scores = q @ k.transpose(2, 3) * scoring.scaling
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores = scores.float() + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().view(k.shape[1], -1, 1, 1)
        shared = scores.unflatten(2, (sinks.shape[1], -1))
        ends = sinks.expand(*shared.shape[:-1], 1)
        weights = torch.softmax(torch.cat([shared, ends], dim=-1), dim=-1)[..., :-1].flatten(2, 3)
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(q.dtype) @ v
