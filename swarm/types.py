"""Values that both ends must agree on: block ranges, model identities, numerics, addresses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from swarm.errors import UsageError

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none"]
Codec = Literal["none", "mxint8"]
"""How hidden states travel: as they are, or in a quarter of float32's bytes (compression.py)."""

DTYPE_BYTES: dict[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}


MX_BLOCK = 32  # values that share an exponent in mxint8


def mxint8_bytes(shape: Sequence[int]) -> int:
    """How long the mxint8 encoding of a tensor of this shape is."""
    return prod(shape[:-1]) * (shape[-1] + -(-shape[-1] // MX_BLOCK))


@dataclass(frozen=True, slots=True, order=True)
class BlockRange:
    """Blocks `[start, end)` of a model, never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise UsageError(
                f"blocks {self.start}:{self.end} are not a range; write START:END with START < END"
            )

    @classmethod
    def parse(cls, text: str) -> BlockRange:
        """`"8:16"` means blocks 8 to 15. Raises UsageError."""
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if match is None:
            raise UsageError(f"blocks '{text}' are not START:END, for example 0:20")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __len__(self) -> int:
        return self.end - self.start

    def contains(self, other: BlockRange) -> bool:
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: BlockRange) -> bool:
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class ModelId:
    """A model's public name and the fingerprint (64 hex digits) of its config and weights."""

    name: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}@{self.fingerprint[:8]}"


@dataclass(frozen=True, slots=True)
class Numerics:
    """What the arithmetic of a hop is; every hop of a route must have the same."""

    dtype: DType = "float32"
    quantization: Quantization = "none"
