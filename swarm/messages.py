"""Every message of the session protocol: small, frozen, valid by construction.

`docs/protocol.md` tells when each may be sent and what it means.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from swarm.errors import ErrorCode
from swarm.fields import MAX_BATCH as MAX_BATCH
from swarm.fields import MAX_BLOCKS as MAX_BLOCKS
from swarm.fields import MAX_PADDING as MAX_PADDING
from swarm.fields import MAX_TOKENS as MAX_TOKENS
from swarm.fields import PROTOCOL_VERSION as PROTOCOL_VERSION
from swarm.fields import (
    Block,
    Count,
    Credentials,
    Digest,
    Frozen,
    Id,
    Load,
    Opening,
    Position,
    PushTarget,
    Record,
    Rows,
    ShortText,
    TensorFrame,
    TraceParent,
)
from swarm.messages_training import Back, Bundle, Lend, Lent, Piece, Train, Trained
from swarm.types import Codec

HAND_OVER = "hand_over"  # the capability


class Open(Opening):
    """Client to server, first on a session stream: reserve a cache for blocks `[start, end)`, with
    an `adapter` that this client has lent, or that the server announces."""

    kind: Literal["open"] = "open"
    codec: Codec = "none"  # of what this hop sends
    ticket: Id
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    max_length: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    next: PushTarget | None = None
    adapter: Digest | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = 5


class Opened(Frozen):
    """Server to client: the session exists. At most `window` steps may be unanswered at a time."""

    kind: Literal["opened"] = "opened"
    protocol: Count
    capabilities: Annotated[tuple[ShortText, ...], Field(strict=False, max_length=32)] = ()
    window: Annotated[int, Field(ge=1, le=1 << 10)]
    max_step_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    load: Load = Load()


class Step(Frozen):
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
    inputs: dict[ShortText, TensorFrame] = Field(default_factory=dict, max_length=8)
    crop_to: Position | None = None
    reorder: Rows | None = None
    push: bool = True
    quiet: bool = False
    keep: Position | None = None
    trace: TraceParent = ""
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 60_000


class Output(Frozen):
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


class Sync(Frozen):
    """Client to server: a new epoch begins; drop what is queued and say where you stand."""

    kind: Literal["sync"] = "sync"
    epoch: Count


class Synced(Frozen):
    """Server to client: cache length and the last step applied (-1: none)."""

    kind: Literal["synced"] = "synced"
    epoch: Count
    position: Position
    last_step: Annotated[int, Field(ge=-1, le=1 << 31)]


class Redirect(Frozen):
    """Client to server: from now on push to `next` (None: nobody; the client relays)."""

    kind: Literal["redirect"] = "redirect"
    next: PushTarget | None = None


class PushFailed(Frozen):
    """Server to client: the next hop did not take a push; outputs are not pushed any more."""

    kind: Literal["push_failed"] = "push_failed"
    epoch: Count
    step: Count
    message: ShortText


class Leaving(Frozen):
    """Server to client, who named `hand_over`: it will end soon; have it hand the session over."""

    kind: Literal["leaving"] = "leaving"


class HandOver(Frozen):
    """Client to server: give what the session holds to another server's session for the same
    blocks, of which no step is known.

    To `dial` there is all that is done before it is needed. `ahead` copies what is held by now
    while steps go on; `rest` copies what came to it since, and no step may be unanswered.
    """

    kind: Literal["hand_over"] = "hand_over"
    next: PushTarget
    stage: Literal["dial", "ahead", "rest"] = "rest"


class HandedOver(Frozen):
    """Server to client: that session has `position` tokens now; None: it has not, and why."""

    kind: Literal["handed_over"] = "handed_over"
    position: Position | None
    message: ShortText = ""


class Inherit(Frozen):
    """Server to server, on a push stream: tokens `[start, length)` of what a session holds follow.

    What the receiver has from `start` on, it forgets. `padding` is bool [B, length], True for real
    tokens; None: all are. When all has come, the receiver says the same back, without padding.
    """

    kind: Literal["inherit"] = "inherit"
    start: Position = 0
    length: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    padding: TensorFrame | None = None


class Heritage(Frozen):
    """Server to server, after `Inherit`: a layer's keys and values from position `start` on, each
    [B, heads, T, head_dim]. The parts of a layer come in order, none is left out."""

    kind: Literal["heritage"] = "heritage"
    layer: Block
    start: Position
    keys: TensorFrame
    values: TensorFrame


class Close(Frozen):
    """Client to server: free the session. Ending or cancelling the stream does the same."""

    kind: Literal["close"] = "close"


class Attach(Frozen):
    """Server to server, first on a push stream: the frames that follow are for this session."""

    kind: Literal["attach"] = "attach"
    session_id: Id
    ticket: Id


class Refused(Frozen):
    """A server's last message on a stream: why it ends; with a session stream its session."""

    kind: Literal["refused"] = "refused"
    code: Annotated[ErrorCode, Field(strict=False)]  # a string on the wire
    message: ShortText
    position: Position | None = None
    retry_after: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None


class InfoRequest(Frozen):
    """Anybody (in a private swarm: a member) asks a server about itself."""

    kind: Literal["info_request"] = "info_request"
    nonce: Id
    credentials: Credentials
    padding: Annotated[bytes, Field(max_length=MAX_PADDING)] = b""  # to see how long it takes


class Info(Frozen):
    """A server about itself: its signed record, its counters since start, and the adapters that it
    has for all, by name."""

    kind: Literal["info"] = "info"
    record: Record
    load: Load
    counters: Annotated[dict[ShortText, Annotated[int, Field(ge=0)]], Field(max_length=64)] = {}  # noqa: RUF012
    adapters: Annotated[dict[ShortText, Digest], Field(max_length=16)] = {}  # noqa: RUF012


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
    | Back
    | Lend
    | Lent
    | Bundle
    | InfoRequest
    | Info
)
AnyMessage = Annotated[Message, Field(discriminator="kind")]
