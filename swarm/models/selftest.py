"""Proves, before a server serves a model, that cutting it changes nothing.

A tiny random model of the same class runs whole, by transformers alone, and cut into single blocks
behind a shell; what does not agree is refused. Some families come out wrong without any error.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from swarm.errors import CannotRewind, UnsupportedModel
from swarm.models.cache import SpanCache
from swarm.models.families import cache_argument, causal_class, depends_on_pass, text_config
from swarm.models.shell import ShellCache, make_shell
from swarm.models.shrink import VOCAB, shrink
from swarm.models.spans import Span, SpanStep, SplitProof
from swarm.models.stripping import strip
from swarm.types import BlockRange

TOLERANCE = 1e-4  # of logits, absolute, or relative to the largest one
ALIKE = 1e-2  # the same for passes that differ; recurrent states amplify rounding a lot
TEXT = 14  # tokens; more than twice the small model's window
SEED = 7
ALONE = SplitProof(can_batch=False, can_rewind=True)  # no session shares a forward


class ChainCache(ShellCache):
    """A session on a `ChainedSpans`: one cache per link."""

    def __init__(self, caches: list[SpanCache]) -> None:
        super().__init__()
        self.caches = caches

    def crop_to(self, length: int) -> None:
        for cache in self.caches:
            cache.crop(length)
        self.length = length


class ChainedSpans:
    """A `RemoteStack` in this process: parts of spans, one after another."""

    def __init__(self, links: Sequence[tuple[Span, BlockRange]], max_length: int) -> None:
        self.links = links
        self.max_length = max_length

    def open(self, rows: int) -> ChainCache:
        """A new session: what to pass to the shell as `past_key_values`."""
        return ChainCache(
            [span.open_cache(blocks, rows, self.max_length) for span, blocks in self.links]
        )

    def __call__(
        self,
        hidden: Tensor,
        *,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        extras: Mapping[str, Tensor],
    ) -> Tensor:
        tokens = hidden.shape[1]
        padding = None if attention_mask is None else attention_mask[:, -tokens:]
        if past_key_values is None:
            raise UnsupportedModel("this family keeps no cache")
        for (span, _), cache in zip(self.links, past_key_values.caches, strict=True):
            step = SpanStep(cache, hidden, position_ids, padding, extras)
            hidden = span.run([step])[0]
        past_key_values.length += tokens
        return hidden


def prove_split(config: PreTrainedConfig) -> SplitProof:
    """Compare a tiny model of this family, cut after every block, with itself in one piece.

    Raises UnsupportedModel when they differ or when the family cannot be cut at all.
    """
    threads = torch.get_num_threads()
    try:
        # So small a model gains nothing from more threads, and on a busy machine they wait for
        # each other: two for two cores took 28 s instead of 0.7.
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(SEED)
            rehearsal = _Rehearsal(config)
            can_resume = rehearsal.resume()
            rehearsal.padding()
            can_rewind = rehearsal.rewind()
            can_batch = rehearsal.batch()
            return SplitProof(
                can_batch, can_rewind, can_resume, not can_batch and rehearsal.align()
            )
    except UnsupportedModel:
        raise
    # Strangers' configs, and models cut where they must not be, make transformers raise anything.
    except Exception as error:
        kind = text_config(config).model_type
        raise UnsupportedModel(
            f"'{kind}' models cannot be proven to work in spans: {error}"
        ) from error
    finally:
        torch.set_num_threads(threads)


def _small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of the family, with weights large enough for every part to show."""
    small = shrink(config)
    model = cast(Any, causal_class(small))._from_config(small, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class _Rehearsal:
    """One small model, whole and cut, and the same texts for both."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.whole = _small_model(config)
        self.whole_passes = depends_on_pass(self.whole.config)
        self.span = self._span()
        # The finest cut: whatever one block hands to the next besides hidden states is lost.
        singles = [BlockRange(i, i + 1) for i in range(len(self.span.blocks))]
        self.chain = ChainedSpans([(self.span, block) for block in singles], max_length=2 * TEXT)
        self.shell = copy.deepcopy(self.whole)
        make_shell(self.shell, self.chain)
        self.cache_argument = cache_argument(self.whole.forward)
        self.ids = torch.randint(3, VOCAB, (2, TEXT))
        self.positioned = "position_ids" in inspect.signature(self.whole.forward).parameters

    def _span(self, proof: SplitProof = ALONE) -> Span:
        model = copy.deepcopy(self.whole)
        blocks = BlockRange(0, model.config.num_hidden_layers)
        strip(model, blocks)
        return Span(model, blocks, proof)

    def resume(self) -> bool:
        """Prefill and decode; whether a forward may add several tokens to what is held."""
        once, pieces = self._whole((TEXT,)), (5, 2, *[1] * (TEXT - 7))
        self._agree("prefill", self._cut((TEXT,)), once)
        can_resume = self.whole_passes or _close(self._whole(pieces), once, ALIKE)
        if not can_resume:
            pieces = (7, *[1] * (TEXT - 7))
            self.span.proof = replace(self.span.proof, can_resume=False)
        self._agree("one token after another", self._cut(pieces), self._whole(pieces))
        return can_resume

    def padding(self) -> None:
        """On the left; and, where forwards may go on, also in the middle of a session."""
        mask, pieces = torch.ones_like(self.ids), (11, 1, 1, 1)
        mask[0, :4] = 0
        if self.span.proof.can_resume:
            mask[1, 8:10] = 0
            pieces = (7, 4, 1, 1, 1)
        real = mask.bool()
        self._agree("padding", self._cut(pieces, mask)[real], self._whole(pieces, mask)[real])

    def rewind(self) -> bool:
        cache = self.chain.open(2)
        first = (5, TEXT - 5) if self.span.proof.can_resume else (TEXT,)
        self._passes(self.shell, cache, self.ids, first)
        try:
            cache.crop_to(5)
        except CannotRewind:
            cache.crop_to(0)
        kept, ids = cache.length, torch.cat([self.ids[:, :5], self.ids.flip(1)[:, 5:]], dim=1)
        pieces = (kept, TEXT - kept) if kept else (TEXT,)
        expected = self._whole(pieces, ids=ids)[:, kept:]
        self._agree("rewind", self._passes(self.shell, cache, ids[:, kept:], pieces[-1:]), expected)
        return kept > 0

    def batch(self) -> bool:
        """Whether three sessions of different shapes come out the same when they share passes."""
        if self.whole_passes or not cast(Any, self.whole)._supports_attention_backend:
            return False
        return self._may_share(SplitProof(can_batch=True, can_rewind=True))

    def align(self) -> bool:
        """Whether the same holds for single tokens as the rows of one batch."""
        if self.whole_passes or not self.span.store.is_plain:
            return False
        return self._may_share(SplitProof(can_batch=False, can_rewind=True, can_align=True))

    def _may_share(self, proof: SplitProof) -> bool:
        torch.manual_seed(SEED)
        hidden = torch.randn(2, TEXT, self.span.hidden_size)
        mask = torch.ones_like(self.ids, dtype=torch.bool)
        mask[1, :3] = False
        try:
            alone = self._sessions(self._span(), hidden, mask, together=False)
            shared = self._sessions(self._span(proof), hidden, mask, together=True)
        # Models that do things in their own way fail here in their own ways; they run alone.
        except Exception:  # noqa: BLE001
            return False
        return all(_close(a, b) for a, b in zip(shared, alone, strict=True))

    def _sessions(
        self, span: Span, hidden: Tensor, mask: Tensor, *, together: bool
    ) -> list[Tensor]:
        padded = span.open_cache(span.blocks, 2, TEXT)
        plain = span.open_cache(span.blocks, 1, TEXT)
        late = span.open_cache(span.blocks, 1, TEXT)
        results: list[Tensor] = []
        for start, end in ((0, 9), (9, 10), (10, TEXT)):
            now = slice(start, end)
            steps = [
                SpanStep(padded, hidden[:, now], padding=mask[:, now]),
                SpanStep(plain, hidden[:1, now]),
            ]
            if start:
                steps.append(SpanStep(late, hidden[1:, start - 9 : end - 9]))
            outputs = span.run(steps) if together else [span.run([step])[0] for step in steps]
            results += [outputs[0][mask[:, now]], *outputs[1:]]
        return results

    def _whole(
        self, pieces: tuple[int, ...], mask: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """Logits by transformers alone, in the same passes: numerics differ between pieces."""
        cache = DynamicCache(config=self.whole.config)
        return self._passes(self.whole, cache, self.ids if ids is None else ids, pieces, mask)

    def _cut(self, pieces: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
        """The same through single blocks, with a neighbour's session in between."""
        return self._passes(self.shell, self.chain.open(2), self.ids, pieces, mask)

    def _passes(
        self,
        model: Any,
        cache: Cache,
        ids: Tensor,
        pieces: tuple[int, ...],
        mask: Tensor | None = None,
    ) -> Tensor:
        neighbour = self.chain.open(1)
        outputs: list[Tensor] = []
        start = 0
        for piece in ids.split(pieces, dim=1):
            end = start + piece.shape[1]
            arguments = self._arguments(mask, start, end) | {self.cache_argument: cache}
            outputs.append(model(piece, use_cache=True, **arguments).logits)
            if model is self.shell:
                model(piece[:1], use_cache=True, **{self.cache_argument: neighbour})
            start = end
        return torch.cat(outputs, dim=1)

    def _arguments(self, mask: Tensor | None, start: int, end: int) -> dict[str, Any]:
        """As `generate` would pass them: Mamba takes a mask for the prompt only."""
        if mask is None or (start and self.cache_argument == "cache_params"):
            return {}
        arguments: dict[str, Any] = {"attention_mask": mask[:, :end]}
        if self.positioned:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        return arguments

    def _agree(self, what: str, got: Tensor, expected: Tensor) -> None:
        if not _close(got, expected):
            error = (got - expected).abs().max().item()
            kind = self.whole.config.model_type
            raise UnsupportedModel(
                f"'{kind}' models give other numbers when they are cut ({what}: "
                f"off by {error:.1e}), so they cannot be served"
            )


def _close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    scale = max(1.0, expected.abs().max().item())
    return bool((got - expected).abs().max() <= tolerance * scale)
