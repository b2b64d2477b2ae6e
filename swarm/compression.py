"""Hidden states in a quarter of float32's bytes: blocks of 32 with one exponent and 8-bit integers.

MXINT8 of the OCP Microscaling Formats (MX) Specification 1.0, 2023: the scale of a block is a power
of two. Hence what was decoded encodes to the same bytes again, in float32, bfloat16 and float16:
a replayed history is the history. Rounding is off by at most 1/127 of a block's largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from swarm.types import MX_BLOCK

_BIAS = 127  # of E8M0, the exponents' format; 255 means that the block is not a number
_NAN = 255
_LEAST = -126  # of float32's normal numbers


def encode_mxint8(tensor: Tensor) -> bytes:
    """Floats `[..., H]`: one byte per value, row after row, then one exponent per block."""
    *_, size = tensor.shape
    rows = tensor.detach().to("cpu", torch.float32).reshape(prod(tensor.shape[:-1]), size)
    padding = _blocks(size) * MX_BLOCK - size
    blocks = torch.nn.functional.pad(rows, (0, padding)).view(len(rows), _blocks(size), MX_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2 ** exponent
    # The smallest power of two by which nothing exceeds 127, which is 127 / 128 * 2 ** 7.
    exponent = (exponent - 7 + (mantissa > 127 / 128)).clamp(min=_LEAST)
    finite = torch.isfinite(largest)
    values = (blocks * _power_of_two(-exponent)).round_().masked_fill_(~finite, 0)
    integers = values.to(torch.int8).flatten(1)[:, :size]
    scales = (exponent + _BIAS).masked_fill(~finite, _NAN).to(torch.uint8)
    return _bytes(integers) + _bytes(scales)


def decode_mxint8(data: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse; `data` has `mxint8_bytes(shape)` bytes, whatever they are."""
    size, rows = shape[-1], prod(shape[:-1])
    if not rows * size:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8)
    values = raw[: rows * size].view(torch.int8).view(rows, size).float()
    scales = raw[rows * size :].view(rows, _blocks(size))
    factors = _power_of_two(scales.int() - _BIAS).masked_fill(scales == _NAN, torch.nan)
    return (values * factors.repeat_interleave(MX_BLOCK, 1)[:, :size]).to(dtype).view(tuple(shape))


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exactly, by the bits of a float32; 0 for less than its normal numbers."""
    return ((exponent.clamp(min=_LEAST - 1) + _BIAS).int() << 23).view(torch.float32)


def _blocks(size: int) -> int:
    return -(-size // MX_BLOCK)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
