"""One session's place in a span's cache: page tables, recurrent states, padding and one clock.

Keys and values lie in the span's pages; layers of other kinds keep what transformers gives them.
There is one clock, `length`; no layer counts for itself, hence a pass that failed half way leaves
nothing behind but slots that the next pass overwrites.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
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

from swarm.errors import (
    CannotRewind,
    ErrorCode,
    LocalProtocolError,
    OutOfPages,
    RemoteProtocolError,
)
from swarm.models.pages import PAGE, PageTable
from swarm.models.passes import KindPass, Segment
from swarm.models.storage import Kind, KvStore, LayerShape, StateShape
from swarm.types import BlockRange

LayerPlan = list[tuple[type[Any], dict[str, Any]]]


def plan_layers(config: PreTrainedConfig) -> LayerPlan:
    """What each layer of the whole model caches: transformers' class and its arguments."""
    kinds, arguments = get_layer_types_and_kwargs(config)
    return [
        (DYNAMIC_LAYER_TYPE_MAPPING[kind], kwargs)
        for kind, kwargs in zip(kinds, arguments, strict=True)
    ]


class PagedLayer(CacheLayerMixin):
    """One attention layer, as transformers' masks ask about it; the cache itself answers."""

    is_croppable = True

    def __init__(self, owner: SpanCache, layer: int, kind: Kind) -> None:
        super().__init__()
        self._owner, self._layer = owner, layer
        self.kind = kind
        self.is_sliding = kind.window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pages are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._owner.put(self._layer, self.kind, key_states, value_states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to do: tables are reordered, not tensors."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._owner.first_slot(self.kind)
        return self._owner.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self._owner.length

    def get_max_length(self) -> int:
        return self._owner.max_length


class _Clocked(Cache):
    """Answers what models ask of a cache from one clock, for whichever layer they ask about."""

    length = 0  # tokens held, padding included
    max_length = -1
    adapter: Any = None  # of the session (models/adapters.py)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self.layers[layer_idx]
        if isinstance(layer, PagedLayer):
            return layer.get_mask_sizes(query_length)
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        if layer_idx is None and not any(self.is_linear):  # the model has some, this span has none
            return self.length > 0
        return super().has_previous_state(layer_idx, state_idx)


class ProbeCache(_Clocked):
    """For one pass of one token of one row: what layers keep of it becomes known."""

    def __init__(self, plan: LayerPlan, blocks: BlockRange) -> None:
        self._blocks = blocks
        super().__init__(
            layers=[
                cls(**kwargs) if blocks.start <= index < blocks.end else DummyLayer()
                for index, (cls, kwargs) in enumerate(plan)
            ]
        )

    def shapes(self) -> tuple[dict[int, LayerShape], dict[int, StateShape]]:
        """Of layers that are kept in pages, and of those that are not."""
        paged: dict[int, LayerShape] = {}
        others: dict[int, StateShape] = {}
        for index in range(self._blocks.start, self._blocks.end):
            layer: Any = self.layers[index]
            held = vars(layer)
            if type(layer) is DynamicLayer or type(layer) is DynamicSlidingWindowLayer:
                if held["is_initialized"]:
                    keys, values = held["keys"].shape, held["values"].shape
                    window = held.get("sliding_window")
                    paged[index] = LayerShape(keys[1], keys[3], values[1], values[3], window)
            else:
                growing = _bytes({name: held.get(name) for name in _GROWING})
                others[index] = StateShape(_bytes(held) - growing, growing)
        return paged, others


class RectanglePass(_Clocked):
    """Stands for the cache in a forward of one token per row, of several sessions: for models with
    an attention of their own, which want all rows as one batch.

    Rows are as wide as the longest, and filled from the left. `mask` says what they hold.
    """

    def __init__(self, store: KvStore, blocks: BlockRange, segments: Sequence[Segment]) -> None:
        super().__init__(layers=[])
        (kind,) = store.kinds(blocks)
        self._pass = KindPass(store, kind, segments)
        width = -(-max(segment.total for segment in segments) // PAGE) * PAGE
        self.length = width - 1  # the new token comes last, as models see it
        slots = torch.arange(width, device=store.device)
        rows: list[Tensor] = []
        for segment in segments:
            if segment.mask is None:
                rows.append((slots < segment.total).expand(segment.rows, -1))
            else:
                rows.append(nn.functional.pad(segment.mask, (0, width - segment.total)))
        self.mask = torch.cat(rows)  # bool [rows, width]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[rows, heads, 1, head_dim]`; returns all that the rows hold."""
        self._pass.write(layer_idx, key_states[:, :, 0], value_states[:, :, 0])
        return self._pass.rectangle(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0


class SpanCache(_Clocked):
    """What one session left in blocks `[start, end)`; addressed by the blocks' absolute numbers.

    It belongs to the thread that owns the device. `release` gives its pages back.
    """

    def __init__(
        self,
        plan: LayerPlan,
        blocks: BlockRange,
        *,
        batch_size: int,
        max_length: int,
        store: KvStore,
    ) -> None:
        self.blocks = blocks
        self.max_length = max_length
        self._rows = batch_size
        self._plan = plan
        self._store = store
        self._padding: Tensor | None = None  # bool [batch, length], False = padding; None = none
        self.tables: dict[Kind, PageTable] = {}  # since the first pass
        self._room = 0  # there are pages for so many tokens, and they are this session's alone
        self._charged = 0  # bytes outside pages
        self._released = False
        self._passes: dict[Kind, KindPass] = {}  # of the pass that runs, if it is this one's alone
        super().__init__(layers=self._fresh_layers())

    def _fresh_layers(self) -> list[Any]:
        layers: list[Any] = [DummyLayer() for _ in self._plan]
        kinds = {
            layer: kind
            for kind in self._store.kinds(self.blocks)
            for layer in self._store.layers_of(kind)
        }
        for index in range(self.blocks.start, self.blocks.end):
            cls, kwargs = self._plan[index]
            kind = kinds.get(index)
            if kind is None:
                layers[index] = cls(**kwargs)
            else:
                layers[index] = PagedLayer(weakref.proxy(self), index, kind)
        return layers

    @property
    def batch_size(self) -> int:
        return self._rows

    @property
    def padding(self) -> Tensor | None:
        """Bool `[batch, length]`, False where there is padding; None: nowhere."""
        return self._padding

    @property
    def can_rewind(self) -> bool:
        """Whether `crop` can go back to any earlier length that windows still cover, not only to
        zero."""
        return all(
            layer.is_croppable and not isinstance(layer, LinearAttentionCacheLayerMixin)
            for layer in self.layers
        )

    @property
    def rows_are_one(self) -> bool:
        """Whether all rows have the same past, in the same pages; or none, yet."""
        if self._store.state_bytes(self.blocks, 1, 1):
            return False
        padding = self._padding
        if padding is not None and not bool((padding == padding[:1]).all()):
            return False
        return all(row == table.rows[0] for table in self.tables.values() for row in table.rows)

    # Pages -----------------------------------------------------------------------------------

    def make_room(self, tokens: int) -> None:
        """Take the pages that a pass of so many tokens per row fills. Raises OutOfPages, having
        taken none."""
        if self.length + tokens <= self._room:
            return
        if not self.tables:
            self._move_in()
        try:
            for kind, table in self.tables.items():
                self._store.grow(kind, table, self.length, self.length + tokens)
        except OutOfPages:
            self.settle()
            raise
        self._room = -(-(self.length + tokens) // PAGE) * PAGE

    def receive(self, length: int, kind: Kind, first: int) -> None:
        """Make room for `length` tokens in one kind of layer, which arrive from elsewhere without
        their first `first` pages. Raises OutOfPages."""
        if not self.tables:
            self._move_in()
        self.tables[kind].first = first
        self._store.grow(kind, self.tables[kind], first * PAGE, length)

    def _move_in(self) -> None:
        if self._released:
            raise LocalProtocolError("a cache that was given back is in use")
        if not self._charged:
            needed = self._store.state_bytes(self.blocks, self._rows, self.max_length)
            self._store.charge(needed)
            self._charged = needed
        kinds = self._store.kinds(self.blocks)
        self.tables = {kind: self._store.open(kind, self._rows, self.max_length) for kind in kinds}

    def settle(self) -> None:
        """Forget a pass that was not to be: its pages go back."""
        for table in self.tables.values():
            table.crop(self.length)
        self._room = 0
        self._passes.clear()

    def release(self) -> None:
        """Give everything back. The cache must not be used any more."""
        for kind, table in self.tables.items():
            self._store.close(kind, table)
        self._store.refund(self._charged)
        self.tables, self.layers, self._charged, self._released = {}, [], 0, True

    def put(self, layer: int, kind: Kind, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[batch, heads, new, head_dim]` behind what is held; returns copies of all of it
        (from `first_slot` on)."""
        tokens = keys.shape[2]
        if kind not in self._passes:
            self.make_room(tokens)
            segment = Segment(self.tables, self.length, 0, self._rows, tokens)
            self._passes[kind] = KindPass(self._store, kind, [segment])
        now = self._passes[kind]
        now.write(layer, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1))
        return now.gather(layer, now.segments[0])

    def first_slot(self, kind: Kind) -> int:
        """The first position that layers of this kind still hold."""
        return self.tables[kind].first * PAGE

    # Changes -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def crop(self, length: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Forget all tokens from `length` on.

        Raises CannotRewind where a recurrent state would have to be un-done, or a window left
        nothing so far back (zero always works), and RemoteProtocolError (GAP) for a length that
        was never reached.
        """
        if not 0 <= length <= self.length:
            raise RemoteProtocolError(
                ErrorCode.GAP,
                f"cannot crop to {length}: the cache holds {self.length} tokens",
                position=self.length,
            )
        if length == self.length:
            return
        if length and not self.can_rewind:
            raise CannotRewind(
                f"blocks {self.blocks} keep a recurrent state that cannot go back from "
                f"{self.length} to {length} tokens; open a new session and replay"
            )
        for table in self.tables.values():
            table.check_crop(length)
        self.length = length
        self.settle()
        if length == 0:
            self.layers = self._fresh_layers()
            self._padding = None
        elif self._padding is not None:
            self._padding = self._padding[:, :length]

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
        self.settle()
        for table in self.tables.values():
            table.reorder(rows)
        index = torch.tensor(rows, device=self._store.device)
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
            new = padding.to(device=self._store.device, dtype=torch.bool)
        held = self._padding
        if held is None:
            held = new.new_ones(self._rows, self.length)
        return torch.cat([held, new], dim=1)

    def commit(self, tokens: int, mask: Tensor | None) -> None:
        """A pass succeeded: its `tokens` count from now on, `mask` is what `whole_mask` said."""
        self.length += tokens
        self._padding = mask
        self._passes.clear()
        for table in self.tables.values():
            table.slide(self.length)


_GROWING = ("keys", "values", "indexer_keys", "indexer_position_ids")  # with every token


def _bytes(values: dict[str, Any]) -> int:
    total = 0
    for value in values.values():
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, dict):
            total += _bytes(value)
    return total
