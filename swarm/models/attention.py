"""Attention over a ragged batch: one forward carries new tokens of several sessions, unpadded.

The linear layers see all tokens at once as `[1, N, hidden]`; attention runs over the sessions'
pages. It is registered with transformers' attention interface, so models call it by themselves,
and what a mask is (causal, window) still comes from transformers.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function

from swarm.models.pages import PAGE
from swarm.models.passes import SHORT, Group, KindPass, Reading, Segment
from swarm.models.scoring import UNSEEN, Scoring, attend
from swarm.models.storage import Kind, KvStore

RAGGED = "swarm_ragged"  # the name under which transformers finds this attention
_LOG2_E = math.log2(math.e)


class SharedPass(Cache, ABC):
    """Stands for `past_key_values` in one forward; inside `with`, masks are its own."""

    layer = 0  # that runs
    _before: SharedPass | None = None  # in which this one runs

    @abstractmethod
    def mask(self, visible: Callable[..., Any], local_size: int | None) -> SharedMask:
        """For one kind of layer, at the beginning of the forward."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def __enter__(self) -> Self:
        self._before, _running.now = _running.now, self
        return self

    def __exit__(self, *_: object) -> None:
        _running.now = self._before


class SharedMask(ABC):
    """Travels through the model in place of a mask tensor."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """`[1, heads, N, dim]` queries of the pass: `[1, N, heads, value_dim]`."""


class _Running(threading.local):
    """The pass of this thread: transformers gives mask functions no other way to know it."""

    now: SharedPass | None = None


_running = _Running()


class RaggedPass(SharedPass):
    """Puts every session's tokens into its pages."""

    def __init__(self, store: KvStore, segments: Sequence[Segment], *, gathers: bool) -> None:
        """Segments of one sub-span follow each other.

        `gathers`: the model expands what it caches (latents), so that it must see all of it.
        """
        super().__init__(layers=[])
        self.gathers = gathers
        self.device = store.device
        by_kind: dict[Kind, list[Segment]] = {}
        for segment in segments:
            for kind in segment.tables:
                by_kind.setdefault(kind, []).append(segment)
        self._passes: dict[int, tuple[KindPass, ...]] = {}
        for kind, members in by_kind.items():
            one = KindPass(store, kind, members, alone=len(members) == len(segments))
            only = (one,)  # the same for all layers, which look up what they share by it
            for layer in store.layers_of(kind):
                before = self._passes.get(layer)
                self._passes[layer] = only if before is None else (*before, one)

    @property
    def now(self) -> tuple[KindPass, ...]:
        """The pass as the layer sees it that runs: a part for each sub-span."""
        return self._passes[self.layer]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[1, heads, N, head_dim]`. What is returned is only used by models that gather."""
        self.layer = layer_idx
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        for part in self.now:
            part.write(layer_idx, keys, values)
        if not self.gathers:
            return key_states, value_states
        held = [part.gather(layer_idx, segment) for part in self.now for segment in part.segments]
        keys, values = (
            torch.cat([row for part in parts for row in part], dim=1)
            for parts in zip(*held, strict=True)
        )
        return keys[None], values[None]

    def long(
        self, key: Tensor, value: Tensor
    ) -> Iterator[tuple[Segment, tuple[Tensor, Tensor], int]]:
        """Segments with many new tokens (if the model gathers, all), what they see, `[rows, heads,
        slots, dim]` keys and values, and the first slot of that."""
        start = 0
        fresh = key[0].transpose(0, 1), value[0].transpose(0, 1)
        for now in self.now:
            for segment in now.segments:
                first = now.first_slot(segment)
                if self.gathers:
                    shape = (start, segment.rows, segment.total - first)
                    start += segment.rows * (segment.total - first)
                elif segment.tokens <= SHORT:
                    continue
                elif segment.past:
                    yield segment, now.gather(self.layer, segment), first
                    continue
                else:
                    shape = (segment.start, segment.rows, segment.tokens)
                yield segment, (_unpack(fresh[0], *shape), _unpack(fresh[1], *shape)), first

    def mask(self, visible: Callable[..., Any], local_size: int | None) -> RaggedMask:
        return RaggedMask(self, visible, local_size)


class RaggedMask(SharedMask):
    """Works out what a kind of layer sees when the first layer of that kind asks."""

    def __init__(
        self, work: RaggedPass, visible: Callable[..., Any], local_size: int | None
    ) -> None:
        self.work = work
        self._visible = visible
        self._local_size = local_size
        self._groups: dict[tuple[KindPass, ...], list[tuple[Group, Tensor]]] = {}
        self._masks: dict[tuple[tuple[KindPass, ...], int], Tensor | None] = {}

    def groups(self) -> list[tuple[Group, Tensor]]:
        """Decode rows, each group with what to add to scores: `[items, 1, 1, tokens, PAGE]`."""
        now = self.work.now
        if now not in self._groups:
            groups = [group for part in now for group in part.groups()]
            self._groups[now] = [(group, self._added(group)) for group in groups]
        return self._groups[now]

    def _added(self, group: Group) -> Tensor:
        reading = group.reading
        places = group.places(self.work.device).index_select(0, reading.owner)[
            :, None, None, :, None
        ]
        slots = reading.slots[:, None, None, None]
        seen = slots <= places
        if self._visible is not causal_mask_function:
            seen = self._visible(0, 0, places, slots) & (slots <= places[..., -1:, :])
        if any(segment.mask is not None for segment in group.segments):
            seen = seen & _real(group, reading)[:, None, None, None]
        return torch.where(seen, 0.0, UNSEEN)

    def of(self, segment: Segment, first: int, dtype: torch.dtype) -> Tensor | None:
        """For a long step that sees slots from `first` on: added to scores, `[rows | 1, 1, tokens,
        slots]`; None = causal from the beginning."""
        past, tokens, mask = segment.past, segment.tokens, segment.mask
        fits = past == 0 and (self._local_size is None or tokens <= self._local_size)
        if mask is None and fits:
            return None
        key = (self.work.now, segment.start)
        if key not in self._masks:
            slots = torch.arange(segment.total, device=self.work.device)
            places = slots[None, None, past:, None]
            seen = self._visible(0, 0, places, slots[None, None, None, first:])
            if mask is not None:
                seen = seen & mask[:, None, None, first:]
            unseen = torch.finfo(dtype).min
            self._masks[key] = torch.zeros((), dtype=dtype, device=seen.device).masked_fill(
                ~seen, unseen
            )
        return self._masks[key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        queries = query[0].transpose(0, 1)
        work = self.work
        groups = [] if work.gathers else self.groups()
        if len(groups) == 1 and groups[0][0].take is None:
            return _decode(queries, work.layer, *groups[0], scoring)[None]
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        for group, added in groups:
            assert group.take is not None
            mine = queries.index_select(0, group.take)
            output.index_copy_(0, group.take, _decode(mine, work.layer, group, added, scoring))
        for segment, held, first in work.long(key, value):
            mask = self.of(segment, first, query.dtype)
            mine = _unpack(queries, segment.start, segment.rows, segment.tokens)
            output[segment.start : segment.end] = attend(mine, held, mask, scoring).flatten(0, 1)
        return output[None]


def _real(group: Group, reading: Reading) -> Tensor:
    """bool `[items, PAGE]`: what is not padding."""
    rows: list[Tensor] = []
    length = reading.reach
    for segment in group.segments:
        mask = segment.mask
        if mask is None:
            mask = torch.ones(segment.rows, 1, dtype=torch.bool, device=reading.slots.device)
            mask = mask.expand(-1, length)
        rows.append(nn.functional.pad(mask[:, :length], (0, length - mask[:, :length].shape[1])))
    return torch.cat(rows)[reading.owner[:, None], reading.slots]


def ragged_mask(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> SharedMask:
    """Called by transformers once per pass and kind of layer; `local_size` is a window's width."""
    work = _running.now
    if work is None or use_vmap:
        raise NotImplementedError("a mask that sessions cannot share a pass with")
    return work.mask(mask_function, local_size)


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
    if not isinstance(attention_mask, SharedMask) or options.get("position_bias") is not None:
        raise NotImplementedError("an attention that sessions cannot share a pass with")
    scaling: float | None = options.get("scaling")
    scoring = Scoring(
        query.shape[3] ** -0.5 if scaling is None else scaling,
        options.get("softcap"),
        options.get("s_aux"),
    )
    return attention_mask.attend(query, key, value, scoring), None


def _decode(q: Tensor, layer: int, group: Group, added: Tensor, scoring: Scoring) -> Tensor:
    """`[rows * tokens, heads, dim]` queries over pages where they lie; `[…, heads, value_dim]`.

    Every item is scored by itself, under its row's maximum, and rows add up their items (split-K,
    as in https://pytorch.org/blog/flash-decoding).
    """
    reading = group.reading
    rows, tokens, items, heads = reading.rows, reading.tokens, reading.items, q.shape[1]
    keys, values = reading.runs[0].slab.layers[layer]
    kv_heads = keys.shape[1]
    shared, value_dim = heads // kv_heads, values.shape[3]
    direct = q.dtype == torch.float32 and scoring.softcap is None and scoring.sinks is None
    if direct and tokens == 1 and (reading.in_order or rows == 1):
        return _decode_directly(q, layer, reading, added, scoring.scaling)
    # Query heads that share a key head, and their tokens, become the rows of one product.
    # Powers of two instead of e: exp is slow on a CPU where it underflows, exp2 is not.
    scale = scoring.scaling * _LOG2_E if scoring.softcap is None else scoring.scaling
    q = (q * scale).unflatten(0, (rows, tokens))
    if tokens > 1:
        q = q.unflatten(2, (kv_heads, shared)).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows, -1).index_select(0, reading.owner)
    q = q.view(items * kv_heads, shared * tokens, -1)
    scores = _products(q, reading, layer, 0).float().view(items, kv_heads, shared, tokens, PAGE)
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap * _LOG2_E)
    scores.add_(added)
    weights, total = _weigh(scores, reading, scoring.sinks)
    weights = weights.view(q.shape[0], q.shape[1], PAGE).to(q.dtype)
    output = reading.add_up(_products(weights, reading, layer, 1).view(items, -1).float())
    output = (output.view(rows, kv_heads, shared, tokens, value_dim) / total).to(q.dtype)
    if tokens > 1:
        output = output.permute(0, 3, 1, 2, 4)
    return output.reshape(rows * tokens, heads, value_dim)


def _decode_directly(
    q: Tensor, layer: int, reading: Reading, added: Tensor, scaling: float
) -> Tensor:
    """Rows of one page each, or a single row: fewer calls, which is what takes the time there."""
    items, kv_heads = reading.items, reading.runs[0].slab.layers[layer][0].shape[1]
    left = q.reshape(reading.rows, kv_heads, -1, q.shape[2])
    if items > reading.rows:
        left = left.expand(items, -1, -1, -1)
    left = left.flatten(0, 1)
    factors = reading.factors(layer, 0)
    if len(factors) == 1:
        bias = added.expand(-1, kv_heads, -1, -1, -1).reshape(-1, 1, PAGE)
        scores = torch.baddbmm(bias, left, factors[0][0], alpha=scaling)
    else:
        scores = _products(left * scaling, reading, layer, 0)
        scores.view(items, kv_heads, -1, PAGE).add_(added[:, 0])
    if items == reading.rows:
        weights = torch.softmax(scores, dim=-1)
    else:
        lined_up = scores.view(items, kv_heads, -1, PAGE).permute(1, 2, 0, 3).flatten(2)
        weights = torch.softmax(lined_up, dim=-1).unflatten(2, (items, PAGE)).permute(2, 0, 1, 3)
        weights = weights.reshape(items * kv_heads, -1, PAGE)
    output = _products(weights, reading, layer, 1)
    if items > reading.rows:
        output = output.view(items, -1).sum(0)
    return output.view(reading.rows, q.shape[1], -1)


def _products(left: Tensor, reading: Reading, layer: int, which: int) -> Tensor:
    """`[items * kv_heads, n, …]` queries by keys (0), or weights by values (1), run by run."""
    factors = reading.factors(layer, which)
    if len(factors) == 1:
        return torch.bmm(left, factors[0][0])
    heads = left.shape[0] // reading.items
    output = left.new_empty(left.shape[0], left.shape[1], factors[0][0].shape[2])
    for right, begin, end in factors:
        part = slice(begin * heads, end * heads)
        torch.bmm(left[part], right, out=output[part])
    return output


def _weigh(scores: Tensor, reading: Reading, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of `[items, kv_heads, shared, tokens, PAGE]` scores (logarithms to base 2), and what
    to divide by after adding up, `[rows, kv_heads, shared, tokens, 1]`."""
    most = scores.amax(-1)
    if not reading.in_order:
        most = most.index_select(0, reading.widest).view(reading.rows, -1, *most.shape[1:]).amax(1)
    sink = None if sinks is None else sinks.float().view(1, *most.shape[1:3], 1) * _LOG2_E
    if sink is not None:
        most = torch.maximum(most, sink)
    shared = most if reading.in_order else most.index_select(0, reading.owner)
    weights = scores.sub_(shared[..., None]).exp2_()
    total = reading.add_up(weights.sum(-1).view(reading.items, -1)).view_as(most)
    if sink is not None:
        total = total + torch.exp2(sink - most)
    return weights, total[..., None]


def _unpack(packed: Tensor, start: int, rows: int, tokens: int) -> Tensor:
    """A part of `[N, heads, dim]` as `[rows, heads, tokens, dim]`."""
    return packed[start : start + rows * tokens].unflatten(0, (rows, tokens)).transpose(1, 2)


AttentionInterface.register(RAGGED, ragged_attention)
AttentionMaskInterface.register(RAGGED, ragged_mask)
