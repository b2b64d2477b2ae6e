"""The messages of training: batches, and adapters that are lent (docs/protocol.md, 13 and 14)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from swarm.fields import (
    PROTOCOL_VERSION,
    Block,
    Count,
    Credentials,
    Frozen,
    Id,
    Load,
    Shape,
    ShortText,
    TensorFrame,
    as_tuple,
)
from swarm.types import DTYPE_BYTES, Codec, DType


class TensorSpec(Frozen):
    """What a tensor will be that follows in pieces."""

    dtype: Literal["float32", "bfloat16", "float16", "int64", "bool"]
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Train(Frozen):
    """Client to server, first on a session stream: run a batch through blocks `[start, end)`, or
    (`backward`) gradients back through them. After `opened` all `tensors` follow in pieces; then
    the answer comes in pieces, and `trained`. Nothing outlives the stream.

    `hidden` is [B, T, H], `gradient` (of what `hidden` becomes) likewise, `position_ids` and
    `padding` as in a step, `prompts` [end - start, P, H]: added to the first P positions of what
    enters each block.
    """

    kind: Literal["train"] = "train"
    protocol_min: Count = PROTOCOL_VERSION
    protocol_max: Count = PROTOCOL_VERSION
    capabilities: Annotated[
        tuple[ShortText, ...], BeforeValidator(as_tuple), Field(max_length=32)
    ] = ()
    model: ShortText
    fingerprint: Annotated[str, Field(min_length=64, max_length=64)]
    dtype: DType
    quantization: ShortText = "none"
    codec: Codec = "none"  # of what the server sends
    session_id: Id
    start: Block
    end: Block
    backward: bool = False
    tensors: Annotated[dict[ShortText, TensorSpec], Field(max_length=8)]
    loan: Id | None = None  # of adapters that were lent here
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 600_000
    trace_id: Annotated[str, Field(max_length=64)] = ""
    credentials: Credentials


class BundleSpec(Frozen):
    """One block's adapter: SHA-256 and length of its safetensors bytes."""

    block: Block
    digest: Annotated[bytes, Field(min_length=32, max_length=32)]
    size: Annotated[int, Field(ge=1, le=1 << 30)]


class Lend(Frozen):
    """Client to server, first on a session stream: keep these adapters while the stream lasts, for
    the session with this id, or for batches that name it as their `loan`."""

    kind: Literal["lend"] = "lend"
    protocol_min: Count = PROTOCOL_VERSION
    protocol_max: Count = PROTOCOL_VERSION
    model: ShortText
    fingerprint: Annotated[str, Field(min_length=64, max_length=64)]
    dtype: DType
    quantization: ShortText = "none"
    session_id: Id
    bundles: Annotated[
        tuple[BundleSpec, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=512)
    ]
    credentials: Credentials


class Lent(Frozen):
    """Server to client: the bundles of these blocks are `missing`; none is once all can be used."""

    kind: Literal["lent"] = "lent"
    missing: Annotated[tuple[Block, ...], BeforeValidator(as_tuple), Field(max_length=512)] = ()


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
