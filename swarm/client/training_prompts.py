"""Soft prompts: vectors that are learnt in front of every text, and if deep within every block.

P-tuning v2: X. Liu et al., arXiv 2110.07602. The modes are called as in Petals.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from swarm.errors import UsageError
from swarm.models.adapters import BlockAdapter
from swarm.models.adapters_peft import Live
from swarm.types import BlockRange

MODES = ("ptune", "deep_ptune")
_SPREAD = 0.02  # of the first values, where the embeddings do not tell a better one


class SoftPrompts(nn.Module):
    """first: `[P, H]`, goes in front of each text where it enters the first block. deep:
    `[L, P, H]` (None with "ptune"), added to these positions of what enters block i. Float32; the
    blocks' caches count the prompts, and nobody else does."""

    def __init__(self, mode: str, length: int, blocks: int, embeddings: Tensor) -> None:
        """`embeddings` `[V, H]` tell where to put them and how large they are at first.

        Raises UsageError.
        """
        super().__init__()
        if mode not in MODES:
            raise UsageError(f"tuning_mode is '{mode}'; there are {' and '.join(MODES)}")
        if length < 1:
            raise UsageError(f"pre_seq_len is {length}; with tuning_mode it must be at least 1")
        size = embeddings.shape[1]
        sample = embeddings[: 1 << 12].float()
        spread = sample.std().item() or _SPREAD
        start = torch.randn(length, size, device=embeddings.device) * spread
        self.first = nn.Parameter(start)
        deep = torch.zeros(blocks, length, size, device=embeddings.device)
        self.deep = nn.Parameter(deep) if mode == "deep_ptune" else None

    def __len__(self) -> int:
        return self.first.shape[0]

    def before(self, hidden: Tensor) -> Tensor:
        """`[B, P + T, H]`: the prompts, and then the texts."""
        first = self.first.to(hidden.device, hidden.dtype)
        return torch.cat([first.expand(hidden.shape[0], -1, -1), hidden], dim=1)

    def within(self, live: Live, blocks: BlockRange, dtype: torch.dtype) -> Live:
        """These adapters of `blocks`, with the deep prompts, as sessions have them."""
        if self.deep is None:
            return live
        deep = dict(zip(range(blocks.start, blocks.end), self.deep.to(dtype), strict=True))
        none = BlockAdapter({})
        return {b: replace(live.get(b, none), prompts=deep[b]) for b in deep}

    def padding(self, padding: Tensor | None) -> Tensor | None:
        """Of `before`: prompts are real."""
        return None if padding is None else nn.functional.pad(padding, (len(self), 0), value=1)

    def positions(self, position_ids: Tensor | None, *, begun: bool) -> Tensor | None:
        """`[..., T]` behind the prompts; or, if the texts begin now, `[..., P + T]`."""
        if position_ids is None:
            return None
        shifted = position_ids + len(self)
        if begun:
            return shifted
        prompts = torch.arange(len(self), device=position_ids.device)
        return torch.cat([prompts.expand(*shifted.shape[:-1], -1), shifted], dim=-1)
