"""Forwards of decode passes that were captured (CUDA graphs) or compiled, to be run again.

Whether one is used at all is decided by a trial on the machine where it runs
(server/compiling.py); whatever fails afterwards leaves the plain forward to do the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config

from swarm.models.fixed import FixedPass, Shape, numbers_of, shape_of
from swarm.models.pages import PAGE
from swarm.models.passes import Segment
from swarm.models.storage import KvStore

logger = logging.getLogger(__name__)

WIDTHS = (1, 2, 4, 8, 16, 32)  # rows of a pass, to which it is filled up
# So many slots are copied at most to lie side by side. Not measured: at 4 kB a slot and 1 TB/s
# their copies cost about 0.2 ms a block, which is what a block's launches cost without them.
_MOST_SLOTS = 1 << 14
_MOST_KEPT = 64  # shapes with a forward of their own

Forward = Callable[[Tensor, FixedPass], Tensor]
"""`[1, rows, H]` through blocks: what the model computes, in whatever way."""

Sub = Callable[[], Tensor]


class Way:
    """How to get a forward that is quicker than the plain one. `prepare` is called once for a
    forward, `record` once for a shape; what it returns computes the pass that its input holds."""

    name = "fixed"
    quick = True  # to prepare, even while sessions wait

    def prepare(self, forward: Forward) -> Forward:
        return forward

    def record(self, run: Sub) -> Sub:
        return run

    def running(self, *, live: bool) -> AbstractContextManager[Any]:
        """Inside, a pass is run. While it is `live`, sessions wait: nothing may take long."""
        return nullcontext()


class Captured(Way):
    """A CUDA graph, which launches all kernels of a pass at once. One pool serves all graphs: they
    run one after the other, and what they return is copied before the next."""

    name = "captured"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def record(self, run: Sub) -> Sub:
        if not self._graphs:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # libraries take their workspaces now
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = run()
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class Compiled(Way):
    """By torch.compile. It proves while tracing that nothing in the pass depends on numbers."""

    name = "compiled"
    quick = False

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend

    def prepare(self, forward: Forward) -> Forward:
        return torch.compile(forward, backend=self._backend, fullgraph=True, dynamic=True)

    def running(self, *, live: bool) -> AbstractContextManager[Any]:
        if live:
            return torch.compiler.set_stance("eager_on_recompile")
        # Two sizes that happen to be equal now need not be so next time.
        return cast(Any, fx_config).patch(use_duck_shape=False)


class CompiledAndCaptured(Captured, Compiled):
    name = "compiled and captured"
    quick = False

    def __init__(self, device: torch.device) -> None:
        Captured.__init__(self, device)
        Compiled.__init__(self)


class _Recording:
    """One shape's forward, and the tensors that it reads."""

    def __init__(self, shape: Shape, store: KvStore, way: Way, forward: Forward, size: int) -> None:
        device = store.device
        self._numbers = torch.zeros(sum(shape.sizes), dtype=torch.int64, device=device)
        self._hidden = torch.zeros(1, shape.rows, size, dtype=store.dtype, device=device)
        self._work = FixedPass(store, shape, self._numbers)
        self._way, self._forward = way, forward
        self._run: Sub | None = None

    def run(self, hidden: Tensor, numbers: Sequence[int]) -> Tensor:
        rows, fresh = hidden.shape[1], torch.tensor(numbers)
        if self._numbers.is_cuda:
            fresh = fresh.pin_memory()
        self._numbers.copy_(fresh, non_blocking=True)
        self._hidden[:, :rows].copy_(hidden)
        if self._run is None:
            self._run = self._way.record(self._once)
        return self._run()[:, :rows].clone()  # the next pass writes where this one did

    def _once(self) -> Tensor:
        with self._work:
            return self._forward(self._hidden, self._work)


class Replays:
    """Runs decode passes of one span by `ways`, by the rows that they are filled up to.

    It belongs to the thread that owns the device.
    """

    def __init__(self, store: KvStore, size: int) -> None:
        self._store, self._size = store, size
        self.ways: Mapping[int, Way] = {}
        self.live = True  # sessions wait
        self._forwards: dict[tuple[Way, Forward], Forward] = {}

    def run(self, segments: Sequence[Segment], hidden: Tensor, plain: Forward) -> Tensor | None:
        """`[1, rows, H]` of a pass whose plain forward would be `plain`; None: that has to do it.

        Whatever it wrote, the plain forward writes again.
        """
        shape = shape_of(self._store, segments, WIDTHS)
        way = None if shape is None else self.ways.get(shape.rows)
        if shape is None or way is None or not _pays(shape):
            return None
        if self.live and not way.quick and (way, plain) not in self._forwards:
            return None
        try:
            with way.running(live=self.live):
                found = self._find(shape, way, plain)
                return found.run(hidden, numbers_of(shape, segments))
        # What torch throws here, lack of memory included, must not cost anybody a pass.
        except Exception as error:
            if not self.live:
                raise
            why = f"{type(error).__name__}: {error}"[:300]
            logger.warning("passes are not %s any more: %s", way.name, why)
            self.forget()
            return None

    def settle_on(self, ways: Mapping[int, Way]) -> None:
        """From now on these serve sessions. What was prepared for them stays, as that may take
        long; what was recorded does not."""
        self.ways, self.live = ways, True
        kept = set(ways.values())
        self._forwards = {key: made for key, made in self._forwards.items() if key[0] in kept}
        self._store.recordings.clear()

    def forget(self) -> None:
        """Leave all passes to the plain forward."""
        self.settle_on({})

    def _find(self, shape: Shape, way: Way, plain: Forward) -> _Recording:
        kept = self._store.recordings
        if (shape, way) not in kept:
            if len(kept) >= _MOST_KEPT:
                kept.clear()
            if (way, plain) not in self._forwards:
                self._forwards[way, plain] = way.prepare(plain)
            forward = self._forwards[way, plain]
            kept[shape, way] = _Recording(shape, self._store, way, forward, self._size)
        return kept[shape, way]


def _pays(shape: Shape) -> bool:
    return shape.rows * max(shape.pages) * PAGE <= _MOST_SLOTS
