"""Tensors to wire frames and back; values from strangers are checked before torch computes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from swarm.compression import decode_mxint8, encode_mxint8
from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.messages import MAX_TOKENS, TensorFrame
from swarm.types import Codec

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_SENT = {"dtype", "shape", "data"}  # of a frame without a codec

# torch warns that bytes are read-only; nobody writes into a received tensor.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def to_frame(tensor: torch.Tensor, codec: Codec = "none") -> TensorFrame:
    """Any device, any strides; with codec `none` the frame holds the very bits of the tensor."""
    if codec == "mxint8":
        return TensorFrame.model_construct(
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            data=encode_mxint8(tensor),
            codec=codec,
        )
    # Few calls, since between two steps each of them has gone from the processor's caches.
    plain = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor  # as numpy likes
    return TensorFrame.model_construct(
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        data=plain.numpy(force=True).tobytes(),
        codec="none",
        _fields_set=_SENT,
    )


def from_frame(frame: TensorFrame) -> torch.Tensor:
    """A read-only view of the frame's bytes on the CPU; sizes were proven by the message."""
    dtype = TORCH_DTYPES[frame.dtype]
    if frame.codec == "mxint8":
        return decode_mxint8(frame.data, frame.shape, dtype)
    if not frame.data:
        return torch.empty(frame.shape, dtype=dtype)
    if dtype is torch.bool:  # any byte but 0 and 1 would be undefined behaviour
        return torch.frombuffer(frame.data, dtype=torch.uint8).reshape(frame.shape) != 0
    return torch.frombuffer(frame.data, dtype=dtype).reshape(frame.shape)


def inputs_from_frames(frames: Mapping[str, TensorFrame]) -> dict[str, torch.Tensor]:
    """What travels beside the hidden states. Raises RemoteProtocolError BAD_TENSOR."""
    tensors = {name: from_frame(frame) for name, frame in frames.items()}
    if "position_ids" in tensors:
        check_positions(tensors["position_ids"])
    return tensors


def check_positions(positions: torch.Tensor) -> None:
    """Raises RemoteProtocolError BAD_TENSOR for positions that no text has."""
    if positions.numel():
        low, high = torch.aminmax(positions)
        if low < 0 or high >= MAX_TOKENS:
            raise RemoteProtocolError(
                ErrorCode.BAD_TENSOR, f"position_ids lie outside 0..{MAX_TOKENS - 1}"
            )
