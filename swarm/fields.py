"""What messages are made of: bounded fields, and parts that several messages have."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swarm.types import DTYPE_BYTES, Codec, DType, mxint8_bytes

PROTOCOL_VERSION = 1
MAX_TOKENS = 1 << 20  # positions a session may have
MAX_BATCH = 1 << 10
MAX_BLOCKS = 1 << 12
MAX_PADDING = 1 << 16


Id = Annotated[bytes, Field(min_length=16, max_length=16)]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]
Position = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
ShortText = Annotated[str, Field(max_length=200)]
TraceParent = Annotated[str, Field(max_length=55, pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-01)?$")]
Record = Annotated[bytes, Field(min_length=1, max_length=1024)]
Rows = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_BATCH)], ...],
    Field(strict=False, min_length=1, max_length=MAX_BATCH),
]
Shape = Annotated[
    tuple[Annotated[int, Field(ge=0, le=1 << 24)], ...],
    Field(strict=False, min_length=1, max_length=5),
]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_bytes="base64")


class TensorFrame(Frozen):
    """A dense row-major little-endian tensor; its size is proven before anybody uses it.

    With codec `mxint8` the data are what `compression.py` makes of floats of this dtype and shape.
    """

    dtype: Literal["float32", "bfloat16", "float16", "int64", "bool"]
    shape: Shape
    data: bytes
    codec: Codec = "none"

    @model_validator(mode="after")
    def _size_agrees(self) -> TensorFrame:
        if self.codec == "none":
            expected = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        else:
            expected = mxint8_bytes(self.shape)
        if self.codec != "none" and self.dtype not in get_args(DType):
            raise ValueError(f"{self.dtype} as {self.codec}")
        if expected != len(self.data):
            raise ValueError(f"{self.dtype}{list(self.shape)} is not {len(self.data)} bytes")
        return self


class Credentials(Frozen):
    """Proof that the opener owns `public_key` and, in a private swarm, holds the swarm key."""

    public_key: Annotated[bytes, Field(max_length=600)]
    signature: Annotated[bytes, Field(max_length=600)]
    proof: Annotated[bytes, Field(max_length=64)] = b""


class Opening(Frozen):
    """What every stream of a client begins with, whatever it is for: blocks `[start, end)` of which
    model, computed how, asked for by whom."""

    protocol_min: Count = PROTOCOL_VERSION
    protocol_max: Count = PROTOCOL_VERSION
    capabilities: Annotated[tuple[ShortText, ...], Field(strict=False, max_length=32)] = ()
    model: ShortText
    fingerprint: Annotated[str, Field(min_length=64, max_length=64)]
    dtype: DType
    quantization: ShortText = "none"
    session_id: Id
    start: Block
    end: Block
    trace_id: Annotated[str, Field(max_length=64)] = ""
    credentials: Credentials


class PushTarget(Frozen):
    """The right to push into one session of the next hop, whose signed record says where it is."""

    record: Record
    session_id: Id
    ticket: Id


class Load(Frozen):
    """How busy a server is: steps waiting, and milliseconds of its last passes (median)."""

    queue: Count = 0
    step_ms: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    free_tokens: Count = 0
