"""Every message of the session protocol: small, frozen, valid by construction.

`docs/protocol.md` tells when each may be sent and what it means.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from swarm.errors import ErrorCode
from swarm.types import DTYPE_BYTES, Codec, DType, mxint8_bytes

PROTOCOL_VERSION = 1
HAND_OVER = "hand_over"  # the capability
MAX_TOKENS = 1 << 20  # positions a session may have
MAX_BATCH = 1 << 10
MAX_BLOCKS = 1 << 12
MAX_PADDING = 1 << 16


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Id = Annotated[bytes, Field(min_length=16, max_length=16)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]
Position = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Block = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
ShortText = Annotated[str, Field(max_length=200)]
TraceParent = Annotated[str, Field(max_length=55, pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-01)?$")]
Record = Annotated[bytes, Field(min_length=1, max_length=1024)]
Rows = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_BATCH)], ...],
    BeforeValidator(_tuple),
    Field(min_length=1, max_length=MAX_BATCH),
]
Shape = Annotated[
    tuple[Annotated[int, Field(ge=0, le=1 << 24)], ...],
    BeforeValidator(_tuple),
    Field(min_length=1, max_length=5),
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_bytes="base64")


class TensorFrame(_Frozen):
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


class PushTarget(_Frozen):
    """The right to push into one session of the next hop, whose signed record says where it is."""

    record: Record
    session_id: Id
    ticket: Id


class Credentials(_Frozen):
    """Proof that the opener owns `public_key` and, in a private swarm, holds the swarm key."""

    public_key: Annotated[bytes, Field(max_length=600)]
    signature: Annotated[bytes, Field(max_length=600)]
    proof: Annotated[bytes, Field(max_length=64)] = b""


class Load(_Frozen):
    """How busy a server is: steps waiting, and milliseconds of its last passes (median)."""

    queue: Count = 0
    step_ms: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    free_tokens: Count = 0


class Open(_Frozen):
    """Client to server, first on a session stream: reserve a cache for blocks `[start, end)`."""

    kind: Literal["open"] = "open"
    protocol_min: Count = PROTOCOL_VERSION
    protocol_max: Count = PROTOCOL_VERSION
    capabilities: Annotated[
        tuple[ShortText, ...], BeforeValidator(_tuple), Field(max_length=32)
    ] = ()
    model: ShortText
    fingerprint: Annotated[str, Field(min_length=64, max_length=64)]
    dtype: DType
    quantization: ShortText = "none"
    codec: Codec = "none"  # of what this hop sends
    session_id: Id
    ticket: Id
    start: Block
    end: Block
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    max_length: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    next: PushTarget | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    trace_id: Annotated[str, Field(max_length=64)] = ""
    credentials: Credentials


class Opened(_Frozen):
    """Server to client: the session exists. At most `window` steps may be unanswered at a time."""

    kind: Literal["opened"] = "opened"
    protocol: Count
    capabilities: Annotated[
        tuple[ShortText, ...], BeforeValidator(_tuple), Field(max_length=32)
    ] = ()
    window: Annotated[int, Field(ge=1, le=1 << 10)]
    max_step_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    load: Load = Load()


class Step(_Frozen):
    """New positions `[start, start + T)` of every row, from the client or the hop before.

    `hidden` is [B, T, H]; `inputs` are what else travels with these tokens, each [B, T, ...], by
    allow-listed name (`position_ids` int64, `padding` bool with True for real tokens).
    Before computing: crop the cache to `crop_to`, then let row i continue row `reorder[i]`.
    `push` allows the output to travel on to the next hop; `quiet` spares the client its copy.
    The last hop, and one that is not to `push`, answer with the last `keep` positions (None: all).
    `trace` is the client's span, if somebody traces this step: a W3C `traceparent` that is sampled.
    """

    kind: Literal["step"] = "step"
    epoch: Count
    step: Count
    start: Position
    hidden: TensorFrame
    inputs: Annotated[dict[ShortText, TensorFrame], Field(max_length=8)] = {}
    crop_to: Position | None = None
    reorder: Rows | None = None
    push: bool = True
    quiet: bool = False
    keep: Position | None = None
    trace: TraceParent = ""
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 60_000


class Output(_Frozen):
    """Server to client: what a step became, [B, T, H]; a copy if it was also `pushed` onwards.

    After a `quiet` step `hidden` is [B, 0, H]; [B, keep, H] if fewer positions are wanted.
    """

    kind: Literal["output"] = "output"
    epoch: Count
    step: Count
    start: Position
    hidden: TensorFrame
    pushed: bool = False
    compute_ms: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    load: Load = Load()


class Sync(_Frozen):
    """Client to server: a new epoch begins; drop what is queued and say where you stand."""

    kind: Literal["sync"] = "sync"
    epoch: Count


class Synced(_Frozen):
    """Server to client: cache length and the last step applied (-1: none)."""

    kind: Literal["synced"] = "synced"
    epoch: Count
    position: Position
    last_step: Annotated[int, Field(ge=-1, le=1 << 31)]


class Redirect(_Frozen):
    """Client to server: from now on push to `next` (None: nobody; the client relays)."""

    kind: Literal["redirect"] = "redirect"
    next: PushTarget | None = None


class PushFailed(_Frozen):
    """Server to client: the next hop did not take a push; outputs are not pushed any more."""

    kind: Literal["push_failed"] = "push_failed"
    epoch: Count
    step: Count
    message: ShortText


class Leaving(_Frozen):
    """Server to client, who named `hand_over`: it will end soon; have it hand the session over."""

    kind: Literal["leaving"] = "leaving"


class HandOver(_Frozen):
    """Client to server: give what the session holds to another server's session for the same
    blocks, of which no step is known.

    To `dial` there is all that is done before it is needed. `ahead` copies what is held by now
    while steps go on; `rest` copies what came to it since, and no step may be unanswered.
    """

    kind: Literal["hand_over"] = "hand_over"
    next: PushTarget
    stage: Literal["dial", "ahead", "rest"] = "rest"


class HandedOver(_Frozen):
    """Server to client: that session has `position` tokens now; None: it has not, and why."""

    kind: Literal["handed_over"] = "handed_over"
    position: Position | None
    message: ShortText = ""


class Inherit(_Frozen):
    """Server to server, on a push stream: tokens `[start, length)` of what a session holds follow.

    What the receiver has from `start` on, it forgets. `padding` is bool [B, length], True for real
    tokens; None: all are. When all has come, the receiver says the same back, without padding.
    """

    kind: Literal["inherit"] = "inherit"
    start: Position = 0
    length: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    padding: TensorFrame | None = None


class Heritage(_Frozen):
    """Server to server, after `Inherit`: a layer's keys and values from position `start` on, each
    [B, heads, T, head_dim]. The parts of a layer come in order, none is left out."""

    kind: Literal["heritage"] = "heritage"
    layer: Block
    start: Position
    keys: TensorFrame
    values: TensorFrame


class Close(_Frozen):
    """Client to server: free the session. Ending or cancelling the stream does the same."""

    kind: Literal["close"] = "close"


class Attach(_Frozen):
    """Server to server, first on a push stream: the frames that follow are for this session."""

    kind: Literal["attach"] = "attach"
    session_id: Id
    ticket: Id


class Refused(_Frozen):
    """A server's last message on a stream: why it ends; with a session stream its session."""

    kind: Literal["refused"] = "refused"
    code: Annotated[ErrorCode, Field(strict=False)]  # a string on the wire
    message: ShortText
    position: Position | None = None
    retry_after: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None


class TensorSpec(_Frozen):
    """What a tensor will be that follows in pieces."""

    dtype: Literal["float32", "bfloat16", "float16", "int64", "bool"]
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Train(_Frozen):
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
        tuple[ShortText, ...], BeforeValidator(_tuple), Field(max_length=32)
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
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 600_000
    trace_id: Annotated[str, Field(max_length=64)] = ""
    credentials: Credentials


class Piece(_Frozen):
    """Either way: rows `[start, start + n)` of a tensor taken as [rows, last dimension]. The pieces
    of a tensor come in order, none is left out."""

    kind: Literal["piece"] = "piece"
    name: ShortText
    start: Count
    rows: TensorFrame


class Trained(_Frozen):
    """Server to client: that was the whole answer."""

    kind: Literal["trained"] = "trained"
    compute_ms: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    load: Load = Load()


class InfoRequest(_Frozen):
    """Anybody (in a private swarm: a member) asks a server about itself."""

    kind: Literal["info_request"] = "info_request"
    nonce: Id
    credentials: Credentials
    padding: Annotated[bytes, Field(max_length=MAX_PADDING)] = b""  # to see how long it takes


class Info(_Frozen):
    """A server about itself: its signed record and its counters since start."""

    kind: Literal["info"] = "info"
    record: Record
    load: Load
    counters: Annotated[dict[ShortText, Annotated[int, Field(ge=0)]], Field(max_length=64)] = {}


Message = (
    Open
    | Opened
    | Step
    | Output
    | Sync
    | Synced
    | Redirect
    | PushFailed
    | Leaving
    | HandOver
    | HandedOver
    | Inherit
    | Heritage
    | Close
    | Attach
    | Refused
    | Train
    | Piece
    | Trained
    | InfoRequest
    | Info
)
AnyMessage = Annotated[Message, Field(discriminator="kind")]
