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
from typing import Any, cast

import torch
from torch import Tensor, nn

from swarm.errors import UnsupportedModel
from swarm.models.attention import RaggedPass, SharedMask, SharedPass
from swarm.models.packing import jit, packed_weights
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
        self._given: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.layer, self._given = layer_idx, (key_states, value_states)
        return self._given

    def mask(self, visible: _Visible, local_size: int | None) -> SharedMask:
        self.masks.append((visible, local_size))
        return _RecordedMask(self, len(self.masks) - 1)

    def note(self, key: Tensor, value: Tensor, scoring: Scoring) -> None:
        given, self._given = self._given, None
        if given is None or given[0] is not key or given[1] is not value:
            raise NotImplementedError("attention over something else than what was kept")
        self.scorings[self.layer] = scoring


class _RecordedMask(SharedMask):
    def __init__(self, recorder: _Recorder, index: int) -> None:
        self._recorder, self._index = recorder, index

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self._recorder.note(key, value, scoring)
        return torch.ops.swarm.attend(query, key, value, self._recorder.layer, self._index)


class _Forward(nn.Module):
    """What is recorded: `[1, N, H]` and positions `[1, N]` to `[1, N, H]`."""

    def __init__(self, view: View, work: _Recorder) -> None:
        super().__init__()
        # Not as children, whose weights may be shared, or of a layout that is no parameter's.
        vars(self).update(view=view, work=work)
        weights = {id(weight): weight for weight in _weights(view)}
        for index, weight in enumerate(weights.values()):
            self.register_buffer(f"weight{index}", weight)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        found = vars(self)
        with found["work"]:
            return found["view"].run(hidden, position_ids=positions, past_key_values=found["work"])


def _weights(view: View) -> Iterator[Tensor]:
    for root in (view.stack, *view.layers):
        yield from root.parameters()
        yield from root.buffers()
    yield from packed_weights(view.layers)


class Trace:
    """One view's recording. Raises whatever torch and the model do where it cannot be made, and
    UnsupportedModel where it would hold for some passes only: where Python asks a tensor something.
    """

    @torch.inference_mode()
    def __init__(self, view: View, size: int, dtype: torch.dtype) -> None:
        recorder = _Recorder()
        example = torch.zeros(1, _TOKENS, size, dtype=dtype), torch.arange(_TOKENS)[None]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            module = _Forward(view, recorder)
            # Not `jit.trace`, which keeps what it made until the process ends: 1 MiB a block. Here
            # weights are arguments, behind the module's own.
            graph, _ = jit._get_trace_graph(module, example)
            run = cast(Any, torch)._C._create_function_from_graph("forward", graph)
        # It also recommends torch.compile, which takes minutes and makes little quicker here that
        # this does not (docs/benchmarks.md).
        for warning in told:
            if issubclass(warning.category, jit.TracerWarning):
                where = f"{Path(warning.filename).name}, line {warning.lineno}"
                raise UnsupportedModel(f"its forward asks a tensor something ({where})")
        self._run = run
        self._weights = list(module.buffers())
        self._masks, self._scorings = recorder.masks, recorder.scorings

    def run(self, hidden: Tensor, positions: Tensor, work: RaggedPass) -> Tensor:
        """`[1, N, H]`; inside `with work`."""
        _live.work, _live.scorings = work, self._scorings
        _live.masks = [work.mask(visible, local_size) for visible, local_size in self._masks]
        try:
            # What it optimizes for is the shapes of the passes before.
            with jit.optimized_execution(False):
                return self._run(hidden, positions, *self._weights)
        finally:
            _live.work, _live.masks = None, ()


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
