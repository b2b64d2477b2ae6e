"""The messages of training: batches, and adapters that are lent (docs/protocol.md, 13 and 14)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from swarm.fields import (
    Block,
    Count,
    Digest,
    Frozen,
    Load,
    Opening,
    Shape,
    ShortText,
    TensorFrame,
)
from swarm.types import DTYPE_BYTES, Codec

KEEP = "keep"  # the capability: what went forward may go back by the same stream


class TensorSpec(Frozen):
    """What a tensor will be that follows in pieces."""

    dtype: Literal["float32", "bfloat16", "float16", "int64", "bool"]
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Train(Opening):
    """Client to server, first on a session stream: run a batch through blocks `[start, end)`, or
    (`backward`) gradients back through them. After `opened` all `tensors` follow in pieces; then
    the answer comes in pieces, and `trained`. Nothing outlives the stream. Forward, with capability
    `keep` on both sides, `back` may follow.

    `hidden` is [B, T, H], `gradient` (of what `hidden` becomes) likewise, `position_ids` and
    `padding` as in a step, `prompts` [end - start, P, H]: added to the first P positions of what
    enters each block.
    """

    kind: Literal["train"] = "train"
    codec: Codec = "none"  # of what the server sends
    backward: bool = False
    tensors: Annotated[dict[ShortText, TensorSpec], Field(max_length=8)]
    adapter: Digest | None = None  # as in `open`
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 600_000


class Back(Frozen):
    """Client to server, after `trained`, where both can `keep`: gradients back through what went
    forward on this stream. After `opened` the `gradient` follows, and the answer as for `train`.

    A server that does not keep it any more says `refused`, `unknown_session`, at any time.
    """

    kind: Literal["back"] = "back"
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 600_000


class BundleSpec(Frozen):
    """One block's adapter: SHA-256 and length of its safetensors bytes."""

    block: Block
    digest: Digest
    size: Annotated[int, Field(ge=1, le=1 << 30)]


class Lend(Opening):
    """Client to server, first on a session stream: while the stream lasts, and what was begun
    meanwhile with this adapter, keep it for me in blocks `[start, end)`. `bundles` are all that it
    consists of, whoever has their blocks: its hash is theirs."""

    kind: Literal["lend"] = "lend"
    bundles: Annotated[tuple[BundleSpec, ...], Field(strict=False, min_length=1, max_length=512)]


class Lent(Frozen):
    """Server to client: the bundles of these blocks are `missing`; none is once all can be used."""

    kind: Literal["lent"] = "lent"
    missing: Annotated[tuple[Block, ...], Field(strict=False, max_length=512)] = ()


class Bundle(Frozen):
    """Client to server: bytes from `start` on of a bundle that was missing, in order."""

    kind: Literal["bundle"] = "bundle"
    block: Block
    start: Count
    data: Annotated[bytes, Field(min_length=1)]


class Piece(Frozen):
    """Either way: rows `[start, start + n)` of a tensor taken as [rows, last dimension]. The pieces
    of a tensor come in order, none is left out."""

    kind: Literal["piece"] = "piece"
    name: ShortText
    start: Count
    rows: TensorFrame


class Trained(Frozen):
    """Server to client: that was the whole answer."""

    kind: Literal["trained"] = "trained"
    compute_ms: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    load: Load = Load()
