"""A view's forward without Python between its calls: recorded once by torch's tracer, and run by
its interpreter (TorchScript), which computes the very same.

Attention is one opaque operator of the recording. When it is run, it finds the pass that is under
way: so one recording serves passes of every shape, and all that makes them differ stays in
models/attention.py.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from swarm.errors import UnsupportedModel
from swarm.models.attention import RaggedMask, RaggedPass, SharedMask, SharedPass
from swarm.models.packing import jit, packed_weights
from swarm.models.pages import PAGE
from swarm.models.passes import Group
from swarm.models.scoring import Scoring
from swarm.models.views import View

logger = logging.getLogger(__name__)

_TOKENS = 3  # of the pass that is recorded; tensors of one are stretched where others are not
_WORTH = 64  # passes of a view after which it is recorded: that takes some 10 ms a block

_Visible = Callable[..., Any]


class _Live(threading.local):
    """What attention in this thread's recording works with; none while it is being recorded."""

    work: RaggedPass | None = None
    masks: Sequence[SharedMask] = ()
    scorings: Mapping[int, Scoring]


_live = _Live()

torch.library.define(
    "swarm::attend", "(Tensor query, Tensor key, Tensor value, int layer, int mask) -> Tensor"
)


@torch.library.impl("swarm::attend", "cpu")
def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, mask: int) -> Tensor:
    """Keeps `[1, heads, N, dim]` keys and values, and returns `[1, N, heads, value_dim]`."""
    if _live.work is None:
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    _live.work.update(key, value, layer)
    return _live.masks[mask].attend(query, key, value, _live.scorings[layer])


class _Recorder(SharedPass):
    """Has each layer's attention recorded as that operator, and notes what it needs."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.masks: list[tuple[_Visible, int | None]] = []
        self.scorings: dict[int, Scoring] = {}
        self.mask_of: dict[int, int] = {}  # by layer
        self._given: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.layer, self._given = layer_idx, (key_states, value_states)
        return self._given

    def mask(self, visible: _Visible, local_size: int | None) -> SharedMask:
        self.masks.append((visible, local_size))
        return _RecordedMask(self, len(self.masks) - 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: int) -> Tensor:
        return torch.ops.swarm.attend(query, key, value, self.layer, mask)

    def note(self, key: Tensor, value: Tensor, scoring: Scoring, mask: int) -> None:
        given, self._given = self._given, None
        if given is None or given[0] is not key or given[1] is not value:
            raise NotImplementedError("attention over something else than what was kept")
        self.scorings[self.layer] = scoring
        self.mask_of[self.layer] = mask


class _RecordedMask(SharedMask):
    def __init__(self, recorder: _Recorder, index: int) -> None:
        self._recorder, self._index = recorder, index

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self._recorder.note(key, value, scoring, self._index)
        return self._recorder.attend(query, key, value, self._index)


class _RowRecorder(_Recorder):
    """Of passes of one row with one new token, whose pages follow each other: its attention is a
    few calls on views of them, which are recorded as well."""

    def __init__(self, views: Mapping[int, _Row], added: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._views, self._added = views, added

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: int) -> Tensor:
        """As `attention._decode_directly`, in numbers that follow from the views' shapes."""
        row = self._views[self.layer]
        row.key_place.copy_(key[0, :, 0])
        row.value_place.copy_(value[0, :, 0])
        heads = row.key_place.shape[0]
        items = row.keys.shape[0] // heads
        left = query.reshape(1, heads, -1, query.shape[3]).expand(items, -1, -1, -1).flatten(0, 1)
        bias = self._added[mask].expand(-1, heads, -1, -1, -1).reshape(-1, 1, PAGE)
        scores = torch.baddbmm(bias, left, row.keys, alpha=self.scorings[self.layer].scaling)
        lined_up = scores.view(items, heads, -1, PAGE).permute(1, 2, 0, 3).flatten(2)
        weights = torch.softmax(lined_up, dim=-1).unflatten(2, (-1, PAGE)).permute(2, 0, 1, 3)
        output = torch.bmm(weights.reshape(items * heads, -1, PAGE), row.values)
        return output.view(items, query.shape[1], -1).sum(0)[None, None]


class _Row(NamedTuple):
    """One layer's views: where to put `[heads, dim]` of the new token, and what it sees."""

    key_place: Tensor
    value_place: Tensor
    keys: Tensor  # [items * heads, dim, PAGE]
    values: Tensor  # [items * heads, PAGE, dim]


class _Forward(nn.Module):
    """What is recorded: `[1, N, H]` and positions `[1, N]` to `[1, N, H]`."""

    def __init__(self, view: View, mask_of: Mapping[int, int] | None = None) -> None:
        """`mask_of`: by layer, where a single row is to be recorded."""
        super().__init__()
        # Not as children, whose weights may be shared, or of a layout that is no parameter's.
        vars(self).update(view=view, mask_of=mask_of or {}, recorder=None)
        weights = {id(weight): weight for weight in _weights(view)}
        for index, weight in enumerate(weights.values()):
            self.register_buffer(f"weight{index}", weight)

    def forward(self, hidden: Tensor, positions: Tensor, *views: Tensor) -> Tensor:
        """`views`: those of each layer, and what is added to each mask's scores."""
        given = vars(self)
        mask_of: Mapping[int, int] = given["mask_of"]
        rows = {layer: _Row(*views[4 * at : 4 * at + 4]) for at, layer in enumerate(mask_of)}
        added = dict(zip(dict.fromkeys(mask_of.values()), views[4 * len(rows) :], strict=True))
        work = given["recorder"] = _RowRecorder(rows, added) if rows else _Recorder()
        with work:
            return given["view"].run(hidden, position_ids=positions, past_key_values=work)


def _weights(view: View) -> Iterator[Tensor]:
    for root in (view.stack, *view.layers):
        yield from root.parameters()
        yield from root.buffers()
    yield from packed_weights(view.layers)


class _Recording:
    """A function for torch's interpreter."""

    @torch.inference_mode()
    def __init__(self, module: _Forward, example: tuple[Tensor, ...]) -> None:
        """Raises UnsupportedModel, and whatever torch and the model do."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            # Not `jit.trace`, which keeps what it made until the process ends: 1 MiB a block. Here
            # weights are arguments, behind the module's own.
            graph, _ = jit._get_trace_graph(module, example)
            self._run = cast(Any, torch)._C._create_function_from_graph("forward", graph)
        # It also recommends torch.compile, which takes minutes and makes little quicker here that
        # this does not (docs/benchmarks.md).
        for warning in told:
            if issubclass(warning.category, jit.TracerWarning):
                where = f"{Path(warning.filename).name}, line {warning.lineno}"
                raise UnsupportedModel(f"its forward asks a tensor something ({where})")
        self._weights = list(module.buffers())

    def __call__(self, *given: Tensor) -> Tensor:
        # What it optimizes for is the shapes of the passes before.
        with jit.optimized_execution(False):
            return self._run(*given, *self._weights)


class Trace:
    """One view's recordings. Raises whatever torch and the model do where they cannot be made, and
    UnsupportedModel where they would hold for some passes only: where Python asks a tensor
    something."""

    def __init__(self, view: View, size: int, dtype: torch.dtype) -> None:
        example = torch.zeros(1, _TOKENS, size, dtype=dtype), torch.arange(_TOKENS)[None]
        forward = _Forward(view)
        self._any = _Recording(forward, example)
        found: _Recorder = vars(forward)["recorder"]
        self._masks, self._scorings, self._mask_of = found.masks, found.scorings, found.mask_of
        plain = all(
            scoring.softcap is None and scoring.sinks is None for scoring in self._scorings.values()
        )
        self._makes_row = plain and dtype == torch.float32
        self._row: _Recording | None = None
        self._view = view

    def run(self, hidden: Tensor, positions: Tensor, work: RaggedPass) -> Tensor:
        """`[1, N, H]`; inside `with work`."""
        masks = [work.mask(visible, local_size) for visible, local_size in self._masks]
        if self._makes_row and hidden.shape[1] == 1:
            views = self._views(work, masks)
            if views is not None:
                if self._row is None:
                    self._row = _Recording(
                        _Forward(self._view, self._mask_of), (hidden, positions, *views)
                    )
                return self._row(hidden, positions, *views)
        _live.work, _live.masks, _live.scorings = work, masks, self._scorings
        try:
            return self._any(hidden, positions)
        finally:
            _live.work, _live.masks = None, ()

    def _views(self, work: RaggedPass, masks: Sequence[RaggedMask]) -> list[Tensor] | None:
        """Of a single row whose pages follow each other in one slab; None: it is not."""
        views, seen = list[Tensor](), dict[int, tuple[Group, Tensor]]()
        for layer, mask in self._mask_of.items():
            work.layer = layer
            if mask not in seen:
                (seen[mask],) = masks[mask].groups()
            reading = seen[mask][0].reading
            ((slab, _, (page, _, offset)),) = work.now[0].writes
            keys, values = (reading.factors(layer, which) for which in (0, 1))
            if len(keys) > 1:
                return None
            held = slab.layers[layer]
            views += [held[0][page, :, offset], held[1][page, :, offset], keys[0][0], values[0][0]]
        return [*views, *(added for _, added in seen.values())]


class Traces:
    """A span's recordings, by view. It belongs to the thread that owns the device."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size, self._dtype = size, dtype
        self._made: dict[View, Trace | None] = {}
        self._passes = Counter[View]()
        self.on = False  # somebody has tried it and compared

    def record(self, view: View) -> None:
        """Raises as `Trace` does."""
        self._made[view] = Trace(view, self._size, self._dtype)

    def run(self, view: View, hidden: Tensor, positions: Tensor, work: RaggedPass) -> Tensor | None:
        """None: the plain forward has to do it, and writes again whatever this one wrote."""
        trace = self._find(view) if self.on and positions.ndim == 2 else None
        if trace is None:
            return None
        try:
            return trace.run(hidden, positions, work)
        # As for `Replays`: what torch throws here must not cost anybody a pass.
        except Exception as error:  # noqa: BLE001
            why = f"{type(error).__name__}: {error}".strip()[-300:]
            logger.warning("passes are not run as recorded any more: %s", why)
            self.forget()
            return None

    def forget(self) -> None:
        """Leave all passes to the plain forward."""
        self.on = False
        self._made.clear()

    def _find(self, view: View) -> Trace | None:
        if view not in self._made:
            self._passes[view] += 1
            if self._passes[view] < _WORTH:
                return None
            try:
                self.record(view)
            # Another view was recorded, so that this is odd, and no reason to stop serving.
            except Exception as error:  # noqa: BLE001
                logger.warning("a part of this span cannot be recorded: %s", error)
                self._made[view] = None
        return self._made[view]
