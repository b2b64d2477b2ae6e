"""Blockwise int8: small, close, the same bytes again, and safe with any bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.compression import decode_mxint8, encode_mxint8
from swarm.types import MX_BLOCK, mxint8_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
shapes = st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(1, 3 * MX_BLOCK + 1))


@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**32), st.integers(-12, 12))
def test_what_was_decoded_encodes_to_the_same_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 2.0**scale).to(dtype)
    data = encode_mxint8(tensor)
    assert len(data) == mxint8_bytes(shape)
    decoded = decode_mxint8(data, shape, dtype)
    assert (decoded.dtype, decoded.shape) == (dtype, tensor.shape)
    assert encode_mxint8(decoded) == data


@given(shapes, st.integers(0, 2**32))
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(
    shape: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator) ** 5  # some are far larger than the others
    decoded = decode_mxint8(encode_mxint8(tensor), shape, torch.float32)
    for values, got in zip(tensor.split(MX_BLOCK, -1), decoded.split(MX_BLOCK, -1), strict=True):
        step = values.abs().amax(-1, keepdim=True) / 63.5  # of the coarsest scale there may be
        assert bool(((values - got).abs() <= step / 2 * (1 + 1e-6)).all())


def test_it_is_a_quarter_of_float32() -> None:
    assert mxint8_bytes((1, 1, 4096)) == 4096 + 128


def test_a_block_with_an_infinite_value_is_no_number_and_others_are_untouched() -> None:
    tensor = torch.ones(1, 2 * MX_BLOCK)
    tensor[0, 3] = torch.inf
    decoded = decode_mxint8(encode_mxint8(tensor), tensor.shape, torch.float32)
    assert bool(decoded[0, :MX_BLOCK].isnan().all())
    assert torch.equal(decoded[0, MX_BLOCK:], tensor[0, MX_BLOCK:])


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-45, 127.0, -128.0, 3e38])
def test_the_ends_of_the_range(value: float) -> None:
    tensor = torch.full((1, MX_BLOCK), value)
    decoded = decode_mxint8(encode_mxint8(tensor), tensor.shape, torch.float32)
    assert torch.allclose(decoded, tensor, rtol=1 / 127, atol=1e-38)


@given(st.data(), shapes)
def test_any_bytes_of_the_right_length_decode(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = mxint8_bytes(shape)
    decoded = decode_mxint8(
        data.draw(st.binary(min_size=size, max_size=size)), shape, torch.float32
    )
    assert decoded.shape == shape
