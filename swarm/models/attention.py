"""Attention over a ragged batch: one forward carries new tokens of several sessions, unpadded.

The linear layers see all tokens at once as `[1, N, hidden]`; attention runs per session, each over
its own cache and under its own mask. It is registered with transformers' attention interface, so
models call it by themselves, and what a mask is (causal, window) still comes from transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from swarm.models.cache import SpanCache

RAGGED = "swarm_ragged"  # the name under which transformers finds this attention


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's share of a pass: `rows * tokens` consecutive tokens from `start` on."""

    cache: SpanCache
    start: int
    rows: int
    tokens: int
    mask: Tensor | None  # bool [rows, length + tokens] of the whole text, None = no padding

    @property
    def end(self) -> int:
        return self.start + self.rows * self.tokens


@dataclass(slots=True)
class _Window:
    """What one segment may see in one kind of layer: slots from `first` on, under `mask`."""

    first: int
    mask: Tensor | None  # bool [rows, 1, tokens, slots], True = attend; None = causal


class RaggedPass(Cache):
    """Stands for `past_key_values` in one forward; hands each session's tokens to its own cache."""

    def __init__(self, segments: list[Segment], *, gathers: bool) -> None:
        """`gathers`: the model expands what it caches (latents), so it must see all of it."""
        super().__init__(layers=[])
        self.segments = segments
        self.gathers = gathers
        self.layer = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[1, heads, N, head_dim]`. What is returned is only used by models that gather."""
        self.layer = layer_idx
        held: list[tuple[Tensor, Tensor]] = []
        for segment in self.segments:
            new = [
                _unpack(states, segment.start, segment.rows, segment.tokens)
                for states in (key_states, value_states)
            ]
            held.append(segment.cache.layers[layer_idx].update(*new))
        if not self.gathers:
            return key_states, value_states
        keys, values = (
            torch.cat([row for part in parts for row in part], dim=1)
            for parts in zip(*held, strict=True)
        )
        return keys[None], values[None]

    def seen(self, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per segment, `[rows, heads, length + tokens, head_dim]` keys and values."""
        found: list[tuple[Tensor, Tensor]] = []
        start = 0
        for segment in self.segments:
            total = segment.cache.length + segment.tokens
            if self.gathers:
                found.append(
                    (
                        _unpack(key, start, segment.rows, total),
                        _unpack(value, start, segment.rows, total),
                    )
                )
                start += segment.rows * total
            else:
                layer = segment.cache.layers[self.layer]
                found.append((layer.keys[:, :, :total], layer.values[:, :, :total]))
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def __enter__(self) -> RaggedPass:
        _running.now = self
        return self

    def __exit__(self, *_: object) -> None:
        _running.now = None


class _Running(threading.local):
    """The pass of this thread: transformers gives mask functions no other way to know it."""

    now: RaggedPass | None = None


_running = _Running()


@dataclass(slots=True)
class RaggedMask:
    """Travels through the model in place of a mask tensor."""

    work: RaggedPass
    windows: list[_Window]


def ragged_mask(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> RaggedMask:
    """Called by transformers once per pass and kind of layer; `local_size` is a window's width."""
    work = _running.now
    if work is None or use_vmap:
        raise NotImplementedError("a mask that sessions cannot share a pass with")
    return RaggedMask(work, [_window(s, mask_function, local_size) for s in work.segments])


def _window(segment: Segment, visible: Callable[..., Any], local_size: int | None) -> _Window:
    past, tokens, mask = segment.cache.length, segment.tokens, segment.mask
    first = 0 if local_size is None else max(0, past + 1 - local_size)
    fits = past == 0 and (local_size is None or tokens <= local_size)
    if mask is None and (tokens == 1 or fits):
        return _Window(first, None)
    slots = torch.arange(past + tokens, device=segment.cache.device)
    rows = torch.arange(segment.rows, device=slots.device)[:, None, None, None]
    seen = visible(rows, 0, slots[None, None, past:, None], slots[None, None, None, first:])
    if mask is not None:
        seen = seen & mask[:, None, None, first:]
    return _Window(first, seen.expand(segment.rows, 1, tokens, -1))


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """`query` is `[1, heads, N, head_dim]`; returns `[1, N, heads, value_dim]`.

    The options are transformers': `scaling`, `softcap` and the sinks `s_aux`.
    """
    scaling: float | None = options.get("scaling")
    softcap: float | None = options.get("softcap")
    s_aux: Tensor | None = options.get("s_aux")
    if not isinstance(attention_mask, RaggedMask) or options.get("position_bias") is not None:
        raise NotImplementedError("an attention that sessions cannot share a pass with")
    work = attention_mask.work
    outputs: list[Tensor] = []
    held = work.seen(key, value)
    for segment, window, (keys, values) in zip(
        work.segments, attention_mask.windows, held, strict=True
    ):
        if window.first:
            keys, values = keys[:, :, window.first :], values[:, :, window.first :]
        queries = _unpack(query, segment.start, segment.rows, segment.tokens)
        if softcap is None and s_aux is None:
            out = _fast(queries, keys, values, window.mask, scaling)
        else:
            out = _scored(queries, keys, values, window.mask, scaling, softcap, s_aux)
        outputs.append(out.transpose(1, 2).reshape(1, -1, query.shape[1], values.shape[-1]))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None


def _unpack(packed: Tensor, start: int, rows: int, tokens: int) -> Tensor:
    """A part of `[1, heads, N, dim]` as `[rows, heads, tokens, dim]`."""
    part = packed[:, :, start : start + rows * tokens]
    return part if rows == 1 else part[0].unflatten(1, (rows, tokens)).transpose(0, 1)


def _group(queries: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """Put query heads that share a key head in one row of queries: no copies of the keys."""
    rows, all_heads, tokens, dim = queries.shape
    shared = all_heads // heads
    if mask is not None and tokens > 1:
        mask = mask.repeat(1, 1, shared, 1)
    return queries.reshape(rows, heads, shared * tokens, dim), mask


def _fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    rows, heads, tokens, _ = q.shape
    if mask is None and tokens > 1:  # the beginning of a text: the kernel's own causal mask
        return nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=heads != k.shape[1]
        )
    grouped, mask = _group(q, mask, k.shape[1])
    out = nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, tokens, -1)


def _scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with capped scores (Gemma 2) or a learned sink per head (GPT-OSS)."""
    rows, heads, tokens, dim = q.shape
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[None, None]
    grouped, mask = _group(q, mask, k.shape[1])
    scores = grouped @ k.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.view(1, k.shape[1], -1, 1, 1).expand(rows, -1, -1, tokens, 1)
        scores = torch.cat([scores, sink.reshape(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights[..., : k.shape[2]] @ v).reshape(rows, heads, tokens, -1)


AttentionInterface.register(RAGGED, ragged_attention)
AttentionMaskInterface.register(RAGGED, ragged_mask)
