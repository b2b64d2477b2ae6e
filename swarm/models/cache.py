"""One session's keys, values and recurrent states for some blocks: grows in place, crops exactly.

Attention layers keep the whole text, sliding windows included (the mask enforces the window), so
that any crop is exact. There is one clock, `length`; no layer counts for itself, hence a pass that
failed half way leaves nothing behind but slots that the next pass overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.configuration_utils import PreTrainedConfig

from swarm.errors import CannotRewind, ErrorCode, RemoteProtocolError
from swarm.types import BlockRange

LayerPlan = list[tuple[type[Any], dict[str, Any]]]
FIRST_SLOTS = 64  # tokens for which room is made at first; doubled whenever it is used up


def plan_layers(config: PreTrainedConfig) -> LayerPlan:
    """What each layer of the whole model caches: transformers' class and its arguments."""
    kinds, arguments = get_layer_types_and_kwargs(config)
    return [
        (DYNAMIC_LAYER_TYPE_MAPPING[kind], kwargs)
        for kind, kwargs in zip(kinds, arguments, strict=True)
    ]


class KeyValueLayer(CacheLayerMixin):
    """One attention layer's keys and values, `[batch, heads, slots, head_dim]`, slots >= length."""

    is_croppable = True
    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, owner: SpanCache, is_sliding: bool) -> None:
        super().__init__()
        self.owner = owner
        self.is_sliding = is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `write` makes room."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put `[batch, heads, new, head_dim]` behind the session's length, growing when full."""
        start, end = self.owner.length, self.owner.length + keys.shape[2]
        if not self.is_initialized or end > self.keys.shape[2]:
            self._grow(keys, values, end)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values

    def _grow(self, keys: Tensor, values: Tensor, needed: int) -> None:
        kept = self.owner.length if self.is_initialized else 0
        slots = min(max(needed, 2 * kept, FIRST_SLOTS), max(self.owner.max_length, needed))
        for name, new in (("keys", keys), ("values", values)):
            room = new.new_empty(new.shape[0], new.shape[1], slots, new.shape[3])
            if kept:
                room[:, :, :kept] = getattr(self, name)[:, :, :kept]
            setattr(self, name, room)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.write(key_states, value_states)
        end = self.owner.length + key_states.shape[2]
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            for name in ("keys", "values"):
                held = getattr(self, name)[:, :, : self.owner.length]
                setattr(self, name, held.index_select(0, beam_idx))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return self.owner.max_length


class SpanCache(Cache):
    """What one session left in blocks `[start, end)`; addressed by the blocks' absolute numbers."""

    def __init__(
        self,
        plan: LayerPlan,
        blocks: BlockRange,
        *,
        batch_size: int,
        max_length: int,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.max_length = max_length
        self.length = 0  # tokens held, padding included
        self._rows = batch_size
        self._plan = plan
        self.device = device
        self._padding: Tensor | None = None  # bool [batch, length], False = padding; None = none
        super().__init__(layers=self._fresh_layers())

    def _fresh_layers(self) -> list[Any]:
        layers: list[Any] = [DummyLayer() for _ in self._plan]
        for index in range(self.blocks.start, self.blocks.end):
            cls, kwargs = self._plan[index]
            if cls is DynamicLayer or cls is DynamicSlidingWindowLayer:
                layers[index] = KeyValueLayer(self, cls is DynamicSlidingWindowLayer)
            else:
                layers[index] = cls(**kwargs)
        return layers

    @property
    def batch_size(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of this cache occupy, room to grow included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(vars(layer)))

    @property
    def can_rewind(self) -> bool:
        """Whether `crop` can go back to any earlier length, not only to zero."""
        return all(
            layer.is_croppable and not isinstance(layer, LinearAttentionCacheLayerMixin)
            for layer in self.layers
        )

    @torch.inference_mode()
    def crop(self, length: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Forget all tokens from `length` on.

        Raises CannotRewind where a recurrent state would have to be un-done (zero always works),
        and RemoteProtocolError (GAP) for a length that was never reached.
        """
        if not 0 <= length <= self.length:
            raise RemoteProtocolError(
                ErrorCode.GAP,
                f"cannot crop to {length}: the cache holds {self.length} tokens",
                position=self.length,
            )
        if length == self.length:
            return
        if length == 0:
            self.layers = self._fresh_layers()
            self._padding = None
        elif not self.can_rewind:
            raise CannotRewind(
                f"blocks {self.blocks} keep a recurrent state that cannot go back from "
                f"{self.length} to {length} tokens; open a new session and replay"
            )
        else:
            for layer in self.layers:
                if not isinstance(layer, KeyValueLayer):
                    layer.crop(length - self.length)
            if self._padding is not None:
                self._padding = self._padding[:, :length]
        self.length = length

    @torch.inference_mode()
    def reorder(self, rows: Sequence[int]) -> None:
        """Make old row `rows[i]` the new row `i`; the number of rows may change (beams).

        Raises RemoteProtocolError (BAD_FRAME) for rows that do not exist, or none at all.
        """
        if not rows or not all(0 <= row < self._rows for row in rows):
            raise RemoteProtocolError(
                ErrorCode.BAD_FRAME, f"reorder names rows outside 0..{self._rows - 1}"
            )
        if list(rows) == list(range(self._rows)):
            return
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            layer.reorder_cache(index)
        if self._padding is not None:
            self._padding = self._padding.index_select(0, index)
        self._rows = len(rows)

    def whole_mask(self, padding: Tensor | None, tokens: int) -> Tensor | None:
        """The mask of everything held plus `tokens` new ones: bool `[batch, length + tokens]`,
        True = real; None when there is no padding at all. `padding` covers the new ones only."""
        if padding is None or bool(padding.all()):
            if self._padding is None:
                return None
            new = self._padding.new_ones(self._rows, tokens)
        else:
            new = padding.to(device=self.device, dtype=torch.bool)
        held = self._padding
        if held is None:
            held = new.new_ones(self._rows, self.length)
        return torch.cat([held, new], dim=1)

    def commit(self, tokens: int, mask: Tensor | None) -> None:
        """A pass succeeded: its `tokens` count from now on, `mask` is what `whole_mask` said."""
        self.length += tokens
        self._padding = mask

    # What models ask of a cache: answered from the one clock, for whichever layer they ask about.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        if layer_idx is None and not any(self.is_linear):  # the model has some, this span has none
            return self.length > 0
        return super().has_previous_state(layer_idx, state_idx)


def _tensors(values: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += _tensors(value)
    return found
