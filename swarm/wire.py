"""Bytes of one message: the only door to msgpack, and where hostile frames stop."""

from __future__ import annotations

from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from swarm.fields import Frozen
from swarm.messages import AnyMessage, Message

MAX_FRAME_BYTES = 16 << 20
"""Largest frame that anybody may send; gRPC refuses larger ones before they are in memory."""

_MAX_VALUES = 4096  # in all lists and maps of a frame together; only tensors' bytes are large
_MAX_STRING_BYTES = 1024

_messages: TypeAdapter[Any] = TypeAdapter(AnyMessage)


def pack(value: object) -> bytes:
    """Plain values (dict, list, str, bytes, int, float, bool, None), and what messages are made of,
    to msgpack bytes."""
    packed: bytes | None = msgpack.packb(value, use_bin_type=True, default=_given)
    assert packed is not None
    return packed


def unpack(data: bytes, max_size: int = MAX_FRAME_BYTES) -> object:
    """The inverse of `pack`. Raises RemoteProtocolError: OVERSIZE or BAD_FRAME."""
    if len(data) > max_size:
        raise RemoteProtocolError(
            ErrorCode.OVERSIZE, f"a frame of {len(data)} bytes; at most {max_size} are allowed"
        )
    left = _MAX_VALUES

    def count(container: Any) -> Any:
        """A byte can become an empty list of 64: stop before 16 MB have become a gigabyte."""
        nonlocal left
        left -= 1 + len(container)
        if left < 0:
            raise ValueError("too many values")
        return container

    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            list_hook=count,
            object_hook=count,
            max_array_len=_MAX_VALUES,
            max_map_len=_MAX_VALUES,
            max_str_len=_MAX_STRING_BYTES,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(ErrorCode.BAD_FRAME, "a frame that is not msgpack") from error


def _given(part: Frozen) -> dict[str, object]:
    """What differs from the defaults, or was given all the same."""
    given = part.model_fields_set
    return {name: value for name, value in vars(part).items() if name in given}


def encode(message: Message, **changes: object) -> bytes:
    """One message, with other values in some fields, to one frame.

    Raises LocalProtocolError if it is larger than a frame may be.
    """
    data = pack(_given(message) | changes | {"kind": message.kind})
    if len(data) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"a {message.kind} of {len(data)} bytes does not fit into a frame")
    return data


def decode(data: bytes) -> Message:
    """One frame to one validated message. Raises RemoteProtocolError: OVERSIZE or BAD_FRAME."""
    value = unpack(data)
    try:
        message: Message = _messages.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "frame"
        said = f"{where}: {first['msg'].lower()}"[:200]
        safe = "".join(c if c.isprintable() else "?" for c in said)  # it goes into logs
        raise RemoteProtocolError(ErrorCode.BAD_FRAME, safe) from None
    return message
