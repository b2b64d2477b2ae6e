"""Tensors of any size in frames of bounded size, and together again: what training sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.messages import Piece
from swarm.messages_training import TensorSpec
from swarm.tensors import DTYPE_NAMES, TORCH_DTYPES, from_frame, to_frame
from swarm.types import Codec

PIECE_BYTES = 1 << 20  # of a tensor in one frame, if a single row is not larger
_CODED = ("hidden", "gradient")  # what a codec may squeeze: as much as a whole batch


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))  # type: ignore[arg-type]


def in_pieces(tensors: Mapping[str, Tensor], codec: Codec) -> Iterator[Piece]:
    """Tensors that have at least one dimension, piece by piece."""
    for name, tensor in tensors.items():
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, 1)
        count = max(1, PIECE_BYTES // max(1, rows.shape[1] * rows.element_size()))
        used: Codec = codec if name in _CODED else "none"
        for start in range(0, len(rows), count):
            yield Piece(name=name, start=start, rows=to_frame(rows[start : start + count], used))


class Gathering:
    """Tensors that arrive in pieces. Memory for all of them is taken at once: whoever makes one
    has checked that `specs` are what may come."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.tensors = {
            name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
            for name, spec in specs.items()
        }
        self._come = {name: 0 for name, tensor in self.tensors.items() if tensor.numel()}

    @property
    def complete(self) -> bool:
        return not self._come

    def add(self, piece: Piece) -> None:
        """Raises RemoteProtocolError BAD_TENSOR."""
        frame, name, start = piece.rows, piece.name, piece.start
        if self._come.get(name) != start:
            raise _wrong(piece, "not what comes next")
        tensor = self.tensors[name]
        rows = tensor.view(-1, tensor.shape[-1])
        fits = len(frame.shape) == 2 and frame.shape[1] == rows.shape[1] and frame.shape[0]
        coded = frame.codec == "none" or name in _CODED
        end = start + frame.shape[0]
        if not fits or not coded or end > len(rows) or TORCH_DTYPES[frame.dtype] != tensor.dtype:
            raise _wrong(piece, f"does not fit {DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}")
        rows[start:end] = from_frame(frame)
        if end == len(rows):
            del self._come[name]
        else:
            self._come[name] = end


def _wrong(piece: Piece, why: str) -> RemoteProtocolError:
    shape = list(piece.rows.shape)
    return RemoteProtocolError(
        ErrorCode.BAD_TENSOR, f"piece of '{piece.name[:40]}' {shape} from {piece.start} on: {why}"
    )
