"""One span while it is served: loaded, measured, in front of the door, and given up again."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from swarm.config import ServerLimits
from swarm.errors import OutOfPages, SwarmError, UsageError
from swarm.loop import in_thread
from swarm.models.bundles import Resident
from swarm.models.checkpoint import Checkpoint
from swarm.models.loading import load_span
from swarm.models.spans import Span, SplitProof
from swarm.server import throughput
from swarm.server.backend import Backend
from swarm.server.compiling import CompileMode, try_out, try_recording, ways_of
from swarm.server.door import Door
from swarm.server.executor import Executor
from swarm.server.handler import Handler
from swarm.server.meters import Meters
from swarm.server.residents import Shelf
from swarm.server.throughput import SHAPES, Speeds
from swarm.tensors import TORCH_DTYPES
from swarm.types import BlockRange, DType

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
_ROOM = 2  # times the weights: caches and other programs want some, too


@dataclass(frozen=True, slots=True)
class Source:
    """Where spans come from, and how they are computed here."""

    checkpoint: Checkpoint
    proof: SplitProof
    dtype: DType
    device: torch.device
    block_bytes: int
    limits: ServerLimits
    shelf: Shelf
    given: float | None = None  # block-tokens per second: nothing is measured then
    anew: bool = False  # measure although it is known
    compile: CompileMode = "off"

    def load(self, blocks: BlockRange) -> Span:
        """Takes long. Raises UsageError."""
        logger.info("loading blocks %s of %s as %s", blocks, self.checkpoint.name, self.dtype)
        dtype = TORCH_DTYPES[self.dtype]
        try:
            span = load_span(
                self.checkpoint, blocks, dtype=dtype, device=self.device, proof=self.proof
            )
            span.residents = self.shelf.load(self.checkpoint.config, span)
            return span
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"blocks {blocks} do not fit into {self.device}: serve fewer with --num-blocks"
            ) from error

    def expected(self, blocks: BlockRange) -> Speeds:
        """What is known of a span of that length before it is loaded."""
        if self.given is not None:
            speed = self.given / len(blocks)
            return Speeds(alone=speed, of_16=speed)
        return Speeds() if self.anew else throughput.remembered(self._key(blocks))

    def prepare(self, span: Span) -> Speeds:
        """Give it memory for keys and values, and see how quick it is for one session, by whatever
        way of computing is the quickest."""
        store = span.store
        store.budget = self.limits.kv_bytes or throughput.cache_budget(self.device)
        tokens = store.budget // store.token_bytes
        logger.info("%.2f GiB for keys and values: %d tokens", store.budget / 2**30, tokens)
        if self.compile != "off":
            try_recording(span)
        try_out(span, ways_of(self.compile, self.device))
        try:
            alone = throughput.measure(span, *SHAPES["alone"])
        except OutOfPages as error:
            raise UsageError(
                f"{store.budget} bytes for keys and values hold not one short text, as each token "
                f"takes {store.token_bytes}: give more --kv-memory, or serve fewer --blocks"
            ) from error
        known = self.expected(span.blocks)
        if self.given is None and known.alone < alone:  # it was busy when that was measured
            known = replace(known, alone=alone)
        return known

    def remember(self, blocks: BlockRange, speeds: Speeds) -> None:
        throughput.remember(self._key(blocks), speeds)

    def _key(self, blocks: BlockRange) -> str:
        name = self.checkpoint.fingerprint
        key = throughput.speeds_key(name, len(blocks), self.dtype, self.device)
        usual = self.compile == "auto" and not ways_of(self.compile, self.device)
        return key if usual else f"{key}\n{self.compile}"


@dataclass(slots=True)
class _Held:
    """A span that is being served, and all that goes with it."""

    span: Span
    speeds: Speeds
    executor: Executor
    handler: Handler


class Serving:
    """Serves one span after the other, behind the same door; `handle` makes a handler for one."""

    def __init__(
        self, source: Source, door: Door, handle: Callable[[Span, Executor], Handler]
    ) -> None:
        self._source, self._door, self._handle = source, door, handle
        self.meters = Meters()
        self._held: _Held | None = None
        self._load_seconds = 0.0  # of the last span

    @property
    def sessions(self) -> int:
        return self._held.handler.sessions if self._held else 0

    @property
    def blocks(self) -> BlockRange | None:
        """That are served now; None before and in between."""
        return self._held.span.blocks if self._held else None

    @property
    def residents(self) -> Sequence[Resident]:
        """Adapters that are here for everybody."""
        return self._held.span.residents if self._held else ()

    def speeds(self, blocks: BlockRange) -> Speeds:
        """Of such a span: as measured here, or else as remembered."""
        if self._held and len(self._held.span.blocks) == len(blocks):
            return self._held.speeds
        return self._source.expected(blocks)

    @property
    def move_seconds(self) -> float:
        """Sessions leave, weights are loaded, and what sessions held is computed elsewhere."""
        held = self._held
        if held is None or not held.handler.sessions:
            return self._load_seconds
        tokens = held.span.store.used / held.span.store.token_bytes
        replay = tokens / (held.speeds.prompt or held.speeds.alone)
        return self._source.limits.stop_timeout + self._load_seconds + replay

    async def open(self, blocks: BlockRange) -> None:
        """Raises UsageError."""
        await self._serve(await self._load(blocks))

    async def replace(self, blocks: BlockRange) -> None:
        """Serve these instead. Raises UsageError; then the former ones are served again, or else
        SwarmError.

        Where there is room for both, the new span is loaded before the old one is given up.
        """
        assert self._held is not None
        before = self._held.span.blocks
        needed = len(blocks) * self._source.block_bytes
        roomy = throughput.free_bytes(self._source.device) > _ROOM * needed
        span = await self._load(blocks) if roomy else None
        await self.drain()
        await self.close()
        _free_memory(self._source.device)
        try:
            await self._serve(span or await self._load(blocks))
        except UsageError:
            try:
                await self.open(before)
            except UsageError as error:
                raise SwarmError(f"blocks {before} cannot be loaded again: {error}") from error
            raise

    async def drain(self) -> None:
        """Admit nobody any more; sessions have `stop_timeout` seconds to end or move."""
        if self._held is None:
            return
        handler = self._held.handler
        deadline = time.monotonic() + self._source.limits.stop_timeout
        await handler.leave()
        # Looking is enough: this happens seldom, for seconds, and the handler need not know of it.
        while handler.sessions and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)

    async def close(self) -> None:
        held, self._held = self._held, None
        await self._door.close()
        if held is not None:
            await held.executor.stop()
            self.meters.past.update(held.handler.counts())

    async def measure(self) -> None:
        """What is not known yet, between passes for sessions; nothing if somebody has said it."""
        held = self._held
        assert held is not None
        if self._source.given is not None:
            return
        for name, shape in SHAPES.items():
            if getattr(held.speeds, name) == 0:
                found = await _measure(held, *shape)
                held.speeds = replace(held.speeds, **{name: found})
        self._source.remember(held.span.blocks, held.speeds)
        logger.info("blocks %s: %s", held.span.blocks, held.speeds)

    async def _load(self, blocks: BlockRange) -> Span:
        begin = time.monotonic()
        span = await in_thread(lambda: self._source.load(blocks))
        self._load_seconds = time.monotonic() - begin
        return span

    async def _serve(self, span: Span) -> None:
        speeds = await in_thread(lambda: self._source.prepare(span))
        limits = self._source.limits
        executor = Executor(Backend(span), limits.pass_tokens, meters=self.meters)
        executor.start()
        self._held = _Held(span, speeds, executor, self._handle(span, executor))
        self._door.handler = self._held.handler


async def _measure(held: _Held, rows: int, tokens: int) -> float:
    try:
        return await held.executor.call(lambda: throughput.measure(held.span, rows, tokens))
    except (OutOfPages, torch.OutOfMemoryError):  # so many will never be together here
        return 0.0


def _free_memory(device: torch.device) -> None:
    """Of a span that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
