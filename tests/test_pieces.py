"""Tensors arrive as they were sent, in frames of bounded size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import pieces
from swarm.errors import RemoteProtocolError
from swarm.messages import Piece
from swarm.pieces import Gathering, in_pieces, spec_of
from swarm.wire import decode, encode

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(["hidden", "gradient", "padding"]), shapes, max_size=3))
def test_every_tensor_comes_together_again(wanted: dict[str, list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 64)
        tensors = {
            name: torch.randn(shape) > 0 if name == "padding" else torch.randn(shape)
            for name, shape in wanted.items()
        }
        gathering = Gathering({name: spec_of(tensor) for name, tensor in tensors.items()})
        for piece in in_pieces(tensors, "none"):
            assert not gathering.complete
            received = decode(encode(piece))
            assert isinstance(received, Piece)
            assert received.rows.shape[0] == 1 or len(received.rows.data) <= 64
            gathering.add(received)
        assert gathering.complete
    for name, tensor in tensors.items():
        assert torch.equal(gathering.tensors[name], tensor)


def test_a_piece_counts_once() -> None:
    tensors = {"hidden": torch.randn(2, 3, 4)}
    gathering = Gathering({"hidden": spec_of(tensors["hidden"])})
    (piece,) = in_pieces(tensors, "mxint8")
    gathering.add(piece)
    with pytest.raises(RemoteProtocolError, match="not what comes next"):
        gathering.add(piece)
    near = (gathering.tensors["hidden"] - tensors["hidden"]).abs().max()
    assert near < 0.05
