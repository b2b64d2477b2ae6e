"""A span: consecutive blocks of a Hugging Face model, run through the model's own forward.

The stack (the module that owns the blocks) keeps its code for masks, positions and layer patterns;
everything with weights around the blocks is a stand-in, and the received hidden states enter in
front of the first block of whichever sub-span a session asked for.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swarm.errors import ErrorCode, RemoteProtocolError, UnsupportedModel
from swarm.models.adapters import BlockAdapter, Patches, Use
from swarm.models.attention import RAGGED, RaggedPass
from swarm.models.bundles import Resident
from swarm.models.cache import ProbeCache, RectanglePass, SpanCache, plan_layers
from swarm.models.families import (
    cache_argument,
    caches_latents,
    depends_on_pass,
    find_stack,
    most_positions,
    reset_ropes,
    text_config,
)
from swarm.models.packing import quicken
from swarm.models.passes import Segment, to_device
from swarm.models.replay import Replays
from swarm.models.storage import KvStore
from swarm.models.traced import Traces
from swarm.models.views import View
from swarm.types import BlockRange


@dataclass(frozen=True, slots=True)
class SpanStep:
    """One session's work in a pass.

    hidden: `[B, T, H]` in the span's dtype, on its device; T may be 0.
    position_ids: int64 `[B, T]` or `[3 | 4, B, T]`; None counts on from the cache's length.
    padding: bool or uint8 `[B, T]` for the new tokens only, 1 = real; None = all are.
    extras: further arguments of the stack's forward; the caller has checked their names.
    """

    cache: SpanCache
    hidden: Tensor
    position_ids: Tensor | None = None
    padding: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, slots=True)
class SplitProof:
    """What the self-test found out about a family.

    can_batch: sessions may share a forward. can_rewind: caches crop to any length. can_resume: a
    forward may carry several tokens onto a cache that is not empty; transformers' own Mamba layers
    forget their state there, so their tokens must go one by one. can_align: where sessions cannot
    share any forward, single tokens of several may still be the rows of one batch.
    """

    can_batch: bool
    can_rewind: bool
    can_resume: bool = True
    can_align: bool = False


class Span:
    """Blocks that a server holds. Not thread-safe: one thread owns the device.

    `model` was stripped to `blocks`. Where `takes_whole_steps`, frequencies follow the longest
    position of a forward: a step must not be cut into slices, nor replayed in other pieces.
    """

    def __init__(self, model: PreTrainedModel, blocks: BlockRange, proof: SplitProof) -> None:
        self._stack, self._list_name = find_stack(model)
        self._stack.requires_grad_(False)
        self.config = text_config(model.config)
        self.blocks = blocks
        self.proof = proof
        first = next(self._stack.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.hidden_size: int = self.config.hidden_size
        self._plan = plan_layers(self.config)
        self._views: dict[tuple[BlockRange, str], View] = {}  # by the attention, too
        self._accepted = frozenset(inspect.signature(self._stack.forward).parameters)
        self._gathers = caches_latents(self.config)
        self._cache_argument = cache_argument(self._stack.forward)
        self.takes_whole_steps = depends_on_pass(self.config)
        self.most_positions = most_positions(self.config)
        quicken(self._stack, self._try_out)
        self.store = self._make_store()
        self.replays = Replays(self.store, self.hidden_size)
        self.traces = Traces(self.hidden_size, self.dtype)
        layers: Any = getattr(self._stack, self._list_name)
        self.patches = Patches({i: layers[i] for i in range(blocks.start, blocks.end)})
        self.residents: Sequence[Resident] = ()  # adapters that the owner has preloaded
        self.own_attention: str = cast(Any, self.config)._attn_implementation
        if proof.can_batch:
            cast(Any, self.config)._attn_implementation = RAGGED

    @torch.inference_mode()
    def _try_out(self, tokens: int = 3, cache: ProbeCache | None = None) -> Tensor:
        """What a text of some numbers becomes, `[1, tokens, H]`."""
        cache = cache or ProbeCache(self._plan, self.blocks)
        size = (1, tokens, self.hidden_size)
        numbers = torch.linspace(-1, 1, size[1] * size[2], dtype=self.dtype, device=self.device)
        # Not one that is kept: what it calls will be replaced.
        view = View(self._stack, self._list_name, self.blocks)
        return view.run(numbers.view(size), **{self._cache_argument: cache})

    def _make_store(self) -> KvStore:
        """A first token shows what the layers keep: config entries are named too variously."""
        probe = ProbeCache(self._plan, self.blocks)
        self._try_out(1, probe)
        return KvStore(*probe.shapes(), self.dtype, self.device)

    def open_cache(self, blocks: BlockRange, batch_size: int, max_length: int) -> SpanCache:
        """An empty cache for one session. Raises RemoteProtocolError (BAD_SPAN)."""
        if not self.blocks.contains(blocks):
            raise RemoteProtocolError(
                ErrorCode.BAD_SPAN, f"blocks {blocks} are not held here, only {self.blocks}"
            )
        return SpanCache(
            self._plan,
            blocks,
            batch_size=batch_size,
            max_length=max_length,
            store=self.store,
        )

    def record(self) -> None:
        """From now on run passes without Python between their calls (models/traced.py). Raises
        whatever torch does where they cannot be recorded."""
        if self._gathers or self.takes_whole_steps or not self.proof.can_batch:
            raise UnsupportedModel("passes of this family depend on more than their tokens")
        self.traces.record(self._view(self.blocks))
        self.traces.on = True

    def weights(self) -> Iterable[Tensor]:
        return self._stack.parameters()

    def run_freely(
        self, block: int, hidden: Tensor, adapter: BlockAdapter | None, **inputs: Tensor | None
    ) -> Tensor:
        """`[B, T, H]` through one block, with the model's own attention and without a cache, so
        that gradients can pass. `inputs`: the stack's `attention_mask` and `position_ids`."""
        if self.takes_whole_steps:
            reset_ropes(self._stack)
        config = cast(Any, self.config)
        attention, config._attn_implementation = config._attn_implementation, self.own_attention
        try:
            given = {name: value for name, value in inputs.items() if name in self._accepted}
            view = self._view(BlockRange(block, block + 1))
            use = Use({block: adapter} if adapter else {}, 0, hidden[..., 0].numel())
            with self._adapted([use]):
                return view.run(hidden, use_cache=False, **given)
        finally:
            config._attn_implementation = attention

    @torch.inference_mode()
    def run(self, steps: Sequence[SpanStep]) -> list[Tensor]:
        """One pass: every step's new tokens go through its blocks and into its cache.

        Returns `[B, T, H]` per step, in order. Where the family allows it, steps share the forward
        of all blocks that they have in common. No two steps of a pass may share a cache. Input is
        trusted here: shapes, dtypes and lengths were checked where they came in. When it raises, no
        cache has moved.
        """
        results: list[Tensor | None] = [None] * len(steps)
        groups: dict[tuple[BlockRange | None, int], list[int]] = {}
        done = False
        try:
            for index, step in enumerate(steps):
                if step.hidden.shape[1] == 0:
                    results[index] = step.hidden
                elif self._shares(step):
                    blocks = None if self.proof.can_batch else step.cache.blocks
                    planes = 2 if step.position_ids is None else step.position_ids.ndim
                    groups.setdefault((blocks, planes), []).append(index)
                else:
                    results[index] = self._run_in_pieces(step)
            commits: list[tuple[SpanCache, Segment]] = []
            for members in groups.values():
                together = [steps[i] for i in members]
                if len(members) == 1 and not self.proof.can_batch:
                    results[members[0]] = self._run_in_pieces(together[0])
                    continue
                run = self._run_ragged if self.proof.can_batch else self._run_aligned
                for index, (segment, output) in zip(members, run(together), strict=True):
                    commits.append((steps[index].cache, segment))
                    results[index] = output
            for cache, segment in commits:
                cache.commit(segment.tokens, segment.mask)
            done = True
        finally:
            if not done:
                for step in steps:
                    step.cache.settle()
        return [cast(Tensor, result) for result in results]

    def _shares(self, step: SpanStep) -> bool:
        if step.extras or self.proof.can_batch:
            return not step.extras
        planar = step.position_ids is None or step.position_ids.ndim == 2
        planar = planar and step.cache.adapter is None
        return self.proof.can_align and step.hidden.shape[1] == 1 and planar

    def _run_in_pieces(self, step: SpanStep) -> Tensor:
        pieces = [step]
        if step.cache.length and not self.proof.can_resume:
            pieces = _one_by_one(step)
        return torch.cat([self._run_alone(piece) for piece in pieces], dim=1)

    def _run_alone(self, step: SpanStep) -> Tensor:
        cache, tokens = step.cache, step.hidden.shape[1]
        cache.make_room(tokens)
        mask = cache.whole_mask(step.padding, tokens)
        if self.takes_whole_steps:
            reset_ropes(self._stack)
        seen = mask
        if mask is not None and self._cache_argument == "cache_params":
            seen = mask[:, cache.length :]  # Mamba multiplies the new tokens by their mask
        wanted = {
            "attention_mask": None if seen is None else seen.long(),
            "position_ids": step.position_ids,
            self._cache_argument: cache,
            **step.extras,
        }
        accepted = {name: value for name, value in wanted.items() if name in self._accepted}
        with self._adapted([_use(step, 0, step.hidden[..., 0].numel())]):
            output = self._view(cache.blocks).run(step.hidden, **accepted)
        cache.commit(tokens, mask)
        return output

    def _run_ragged(self, steps: list[SpanStep]) -> list[tuple[Segment, Tensor]]:
        """Block by block where sub-spans differ: at each of their ends, some join or leave."""
        replays = self.replays.ways and not (self._gathers or self.takes_whole_steps)
        if replays and (done := self._run_again(steps)) is not None:
            return done
        size = self.hidden_size
        order = sorted(range(len(steps)), key=lambda index: steps[index].cache.blocks)
        hidden = [step.hidden.reshape(1, -1, size) for step in steps]
        segments: dict[int, Segment] = {}
        for piece in _pieces({step.cache.blocks for step in steps}):
            members = [index for index in order if steps[index].cache.blocks.contains(piece)]
            together = [steps[index] for index in members]
            packed = _segments(together)
            parts = [hidden[index] for index in members]
            uses = [_use(s, p.start, p.end) for s, p in zip(together, packed, strict=True)]
            work = RaggedPass(self.store, packed, gathers=self._gathers)
            together_hidden = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            positions = _packed_positions(together, self.device)
            with work, self._adapted(uses):
                output = self._forward(piece, together_hidden, positions, work, uses)
            for index, segment in zip(members, packed, strict=True):
                hidden[index] = output[:, segment.start : segment.end]
            segments |= zip(members, packed, strict=True)
        return [
            (segments[index], hidden[index].view(step.hidden.shape))
            for index, step in enumerate(steps)
        ]

    def _forward(
        self,
        piece: BlockRange,
        hidden: Tensor,
        positions: Tensor,
        work: RaggedPass,
        uses: Sequence[Use],
    ) -> Tensor:
        view, output = self._view(piece), None
        if not any(use.adapter for use in uses):  # they work by hooks, which are not recorded
            output = self.traces.run(view, hidden, positions, work)
        if output is None:
            output = view.run(hidden, position_ids=positions, past_key_values=work)
        return output

    def _run_again(self, steps: list[SpanStep]) -> list[tuple[Segment, Tensor]] | None:
        """By a forward that is there for passes like this one; None: there is none."""
        blocks = steps[0].cache.blocks
        for step in steps:
            other = step.position_ids is not None or step.cache.blocks != blocks
            if other or step.cache.adapter or step.hidden.shape[1] != 1:
                return None
        packed = _segments(steps)
        hidden = torch.cat([step.hidden.view(1, -1, self.hidden_size) for step in steps], dim=1)
        output = self.replays.run(packed, hidden, self._view(blocks).decode)
        if output is None:
            return None
        parts = output[0].split([segment.rows for segment in packed])
        return list(zip(packed, (part[:, None] for part in parts), strict=True))

    def _run_aligned(self, steps: list[SpanStep]) -> list[tuple[Segment, Tensor]]:
        segments, blocks = _segments(steps), steps[0].cache.blocks
        work = RectanglePass(self.store, blocks, segments)
        wanted = {
            "attention_mask": work.mask.long(),
            "position_ids": _packed_positions(steps, self.device).view(-1, 1),
            self._cache_argument: work,
        }
        accepted = {name: value for name, value in wanted.items() if name in self._accepted}
        output = self._view(blocks).run(torch.cat([step.hidden for step in steps]), **accepted)
        outputs = output.split([segment.rows for segment in segments])
        return list(zip(segments, outputs, strict=True))

    def _adapted(self, uses: Sequence[Use]) -> AbstractContextManager[None]:
        """Inside, these tokens of a pass have adapters; the last ones end where the pass does."""
        some = [use for use in uses if use.adapter]
        return self.patches.applied(some, uses[-1].end) if some else nullcontext()

    def _view(self, blocks: BlockRange) -> View:
        key = blocks, cast(Any, self.config)._attn_implementation
        if key not in self._views:
            self._views[key] = View(self._stack, self._list_name, blocks)
        return self._views[key]


def _use(step: SpanStep, begin: int, end: int) -> Use:
    """A step's adapter, for its tokens in a pass."""
    cache = step.cache
    return Use(cache.adapter or {}, begin, end, step.hidden.shape[0], cache.length)


def _pieces(spans: set[BlockRange]) -> list[BlockRange]:
    """The stretches between all beginnings and ends in which there is some span."""
    cuts = sorted({edge for span in spans for edge in (span.start, span.end)})
    pieces = [BlockRange(start, end) for start, end in itertools.pairwise(cuts)]
    return [piece for piece in pieces if any(span.contains(piece) for span in spans)]


def _one_by_one(step: SpanStep) -> list[SpanStep]:
    if step.padding is not None and not bool(step.padding.all()):
        raise UnsupportedModel("this family cannot take padding after the beginning of a text")
    return [
        SpanStep(
            step.cache,
            step.hidden[:, now : now + 1],
            None if step.position_ids is None else step.position_ids[..., now : now + 1],
        )
        for now in range(step.hidden.shape[1])
    ]


def _segments(steps: list[SpanStep]) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for step in steps:
        cache, (rows, tokens, _) = step.cache, step.hidden.shape
        cache.make_room(tokens)
        mask = cache.whole_mask(step.padding, tokens)
        segments.append(Segment(cache.tables, cache.length, start, rows, tokens, mask))
        start = segments[-1].end
    return segments


def _packed_positions(steps: list[SpanStep], device: torch.device) -> Tensor:
    """int64 `[1, N]` (or `[3 | 4, 1, N]`): as given, else counted from the cache's length."""
    if all(step.position_ids is None for step in steps):
        spans = [
            (step.cache.length, step.hidden.shape[1])
            for step in steps
            for _ in range(step.hidden.shape[0])
        ]
        counted = [position for start, tokens in spans for position in range(start, start + tokens)]
        return to_device(counted, device)[None]
    parts: list[Tensor] = []
    for step in steps:
        rows, tokens, _ = step.hidden.shape
        if step.position_ids is None:
            start = step.cache.length
            parts.append(torch.arange(start, start + tokens, device=device).repeat(rows))
        else:
            parts.append(step.position_ids.flatten(-2))
    return torch.cat(parts, dim=-1).unsqueeze(-2)
