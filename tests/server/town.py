"""Two servers and a stranger, and what strangers may not send."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgpack

from swarm.config import ServerLimits
from swarm.errors import ErrorCode
from swarm.identity import SwarmKey
from swarm.messages import (
    Close,
    TensorFrame,
)
from swarm.models.pages import PAGE
from swarm.models.spans import Span
from swarm.wire import encode, pack
from tests.inprocess import InProcessSwarm, span_of
from tests.models.tiny import tiny_model
from tests.server.stranger import Stranger, assert_same, expected_of, hidden_of

PAGES = 16
LIMITS = ServerLimits(
    kv_bytes=PAGES * PAGE * 2 * 2 * 24 * 4,  # blocks, keys and values, heads x head_dim, float32
    kv_overcommit=1.0,
    kv_wait=0.1,
    max_sessions=6,
    max_step_tokens=40,
    send_timeout=5.0,
)
TIMEOUT = 60.0


class Town:
    """Two servers, a span like theirs for comparison, and a stranger."""

    def __init__(self, limits: ServerLimits = LIMITS, key: SwarmKey | None = None) -> None:
        model = tiny_model("llama")
        self.local: Span = span_of(model, 0, 2)
        self.swarm = InProcessSwarm(limits=limits, swarm_key=key)
        self.server = self.swarm.add(span_of(model, 0, 2))
        self.next = self.swarm.add(span_of(model, 2, 4))
        self.stranger = Stranger(self.swarm, key=key)

    def __enter__(self) -> Town:
        return self

    def __exit__(self, *_: object) -> None:
        self.swarm.__exit__()

    def run(self, body: Coroutine[Any, Any, Any]) -> Any:
        return self.swarm.loop.call(body, timeout=TIMEOUT)

    async def honest(self) -> None:
        """A session as it should be still works."""
        text = hidden_of(self.local, 5)
        talk = await self.stranger.open(self.server)
        assert_same(await talk.ask(text), expected_of(self.local, text))
        await talk.send(Close())
        assert await talk.stream.receive() is None


def with_field(message: Any, *path: str, value: Any) -> bytes:
    """The message's frame with one field changed past all checks."""
    fields = message.model_dump(exclude_defaults=True) | {"kind": message.kind}
    place = fields
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return pack(fields)


def frame_of(shape: tuple[int, ...], dtype: Any = "float32", data: bytes | None = None) -> Any:
    sizes = {"float32": 4, "float16": 2, "int64": 8, "bool": 1, "bfloat16": 2}
    count = 1
    for extent in shape:
        count *= extent
    return TensorFrame(dtype=dtype, shape=shape, data=data or bytes(count * sizes[dtype]))


# Openings ----------------------------------------------------------------------------------------


FRAMES: dict[str, Callable[[Any], bytes]] = {
    "nothing": lambda m: b"",
    "noise": lambda m: b"\xc1 this is not msgpack",
    "truncated": lambda m: encode(m)[:-9],
    "with a tail": lambda m: encode(m) + b"\x00",
    "a number": lambda m: pack(7),
    "a list": lambda m: pack([1, 2]),
    "of no kind": lambda m: pack({"epoch": 0}),
    "of an unknown kind": lambda m: with_field(m, "kind", value="sudo"),
    "a kind that is a list": lambda m: with_field(m, "kind", value=["step"]),
    "with one field more": lambda m: with_field(m, "metadata", value={}),
    "with an extension type": lambda m: pack({"kind": msgpack.ExtType(1, b"x")}),
    "deeper than anybody needs": lambda m: b"\x91" * 5000 + b"\xc0",
    "a million empty lists": lambda m: b"\xdd\x00\x10\x00\x00" + b"\x90" * (1 << 20),
    "announcing huge bytes": lambda m: b"\x81\xa4kind\xc6\xff\xff\xff\xff",
    "announcing a huge list": lambda m: b"\x81\xa4kind\xdd\xff\xff\xff\xff",
}


STEPS: dict[str, tuple[dict[str, Any], ErrorCode]] = {
    "a gap": ({"start": 5}, ErrorCode.GAP),
    "an overlap": ({"start": 2}, ErrorCode.GAP),
    "a crop to what is not there": ({"start": 9, "crop_to": 9, "epoch": 1}, ErrorCode.GAP),
    "a crop within an epoch": ({"start": 2, "crop_to": 2}, ErrorCode.OUT_OF_ORDER),
    "beyond the reservation": ({"hidden": frame_of((2, 7, 48))}, ErrorCode.TOO_LONG),
    "too many tokens": ({"hidden": frame_of((2, 21, 48))}, ErrorCode.OVERSIZE),
    "another width": ({"hidden": frame_of((2, 1, 47))}, ErrorCode.BAD_TENSOR),
    "another batch": ({"hidden": frame_of((3, 1, 48))}, ErrorCode.BAD_TENSOR),
    "too few dimensions": ({"hidden": frame_of((96,))}, ErrorCode.BAD_TENSOR),
    "too many dimensions": ({"hidden": frame_of((2, 1, 48, 1))}, ErrorCode.BAD_TENSOR),
    "another dtype": ({"hidden": frame_of((2, 1, 48), "bfloat16")}, ErrorCode.BAD_TENSOR),
    "integers": ({"hidden": frame_of((2, 1, 48), "int64")}, ErrorCode.BAD_TENSOR),
    "rows that are not there": ({"reorder": (0, 2)}, ErrorCode.BAD_TENSOR),
    "too few rows": ({"reorder": (0,)}, ErrorCode.BAD_TENSOR),
    "too many rows": ({"reorder": (0, 1, 1)}, ErrorCode.BAD_TENSOR),
    "an unknown input": ({"inputs": {"mask": frame_of((2, 1), "bool")}}, ErrorCode.BAD_TENSOR),
    "a path as an input": ({"inputs": {"../x": frame_of((2, 1), "bool")}}, ErrorCode.BAD_TENSOR),
    "padding in floats": ({"inputs": {"padding": frame_of((2, 1))}}, ErrorCode.BAD_TENSOR),
    "padding too long": ({"inputs": {"padding": frame_of((2, 9), "bool")}}, ErrorCode.BAD_TENSOR),
    "positions below zero": (
        {"inputs": {"position_ids": frame_of((2, 1), "int64", b"\xff" * 16)}},
        ErrorCode.BAD_TENSOR,
    ),
    "positions beyond all": (
        {"inputs": {"position_ids": frame_of((2, 1), "int64", b"\xff" * 7 + b"\x7f" + bytes(8))}},
        ErrorCode.BAD_TENSOR,
    ),
    "positions with odd planes": (
        {"inputs": {"position_ids": frame_of((2, 1, 7), "int64")}},
        ErrorCode.BAD_TENSOR,
    ),
}
