"""An adapter as it travels: for each block safetensors bytes, and a hash of what all of them are.

Whoever has the bytes, or some of them, and the hashes of the others, can tell what adapter it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.messages_training import BundleSpec
from swarm.models.adapters import DOWN, UP, Adapter, BlockAdapter, Factors
from swarm.types import BlockRange

MAX_RANK = 512
_PROMPTS = "prompts"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def to_bundle(adapter: BlockAdapter) -> bytes:
    """One block's adapter as safetensors; the same factors always give the same bytes."""
    tensors = adapter.tensors
    if adapter.prompts is not None:
        tensors[_PROMPTS] = adapter.prompts
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def digest_of(bundle: bytes) -> bytes:
    return hashlib.sha256(bundle).digest()


def id_of(specs: Iterable[BundleSpec]) -> bytes:
    """The hash of an adapter that consists of these, and of no others."""
    whole = hashlib.sha256()
    for spec in sorted(specs, key=lambda spec: spec.block):
        whole.update(spec.block.to_bytes(4, "big") + spec.digest)
    return whole.digest()


@dataclass(frozen=True, eq=False)
class Bundles:
    """All of an adapter."""

    id: bytes
    data: Mapping[int, bytes]  # by block
    specs: tuple[BundleSpec, ...]

    @classmethod
    def of(cls, data: Mapping[int, bytes]) -> Bundles:
        specs = tuple(
            BundleSpec(block=block, digest=digest_of(data[block]), size=len(data[block]))
            for block in sorted(data)
        )
        return cls(id_of(specs), data, specs)

    def touches(self, blocks: BlockRange) -> bool:
        """Whether it changes one of these."""
        return any(blocks.start <= spec.block < blocks.end for spec in self.specs)


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter that the server's owner has preloaded, as far as it is in blocks held here."""

    name: str
    id: bytes
    digests: Mapping[int, bytes]
    adapter: Adapter
    size: int


def from_bundle(
    bundle: bytes,
    sizes: Mapping[str, tuple[int, int]],
    device: torch.device,
    hidden_size: int = 0,
) -> BlockAdapter:
    """Raises RemoteProtocolError BAD_ADAPTER unless it fits layers with these `(in, out)`, and its
    prompts the hidden size (0: there may be none)."""
    try:
        tensors = load(bundle)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _bad(f"no safetensors: {error}") from None
    factors: dict[str, Factors] = {}
    prompts = tensors.pop(_PROMPTS, None)
    if prompts is not None:
        _check_prompts(prompts, hidden_size)
        prompts = prompts.to(device)
    for name in sorted(tensors):
        path, kind = name[: -len(DOWN)], name[-len(DOWN) :]
        if kind not in (DOWN, UP) or path + DOWN not in tensors or path + UP not in tensors:
            raise _bad(f"'{name[:60]}' is no factor, or one of two")
        if path not in sizes:
            raise _bad(f"there is no linear layer '{path[:60]}'")
        down, up = tensors[path + DOWN], tensors[path + UP]
        rank = down.shape[0] if down.ndim == 2 else 0
        shapes = (tuple(down.shape), tuple(up.shape))
        if shapes != ((rank, sizes[path][0]), (sizes[path][1], rank)) or not 0 < rank <= MAX_RANK:
            raise _bad(f"'{path}' has factors {shapes[0]} and {shapes[1]}")
        if down.dtype not in _FLOATS or up.dtype != down.dtype:
            raise _bad(f"'{path}' is {down.dtype} and {up.dtype}")
        if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise _bad(f"'{path}' has numbers that are not finite")
        factors[path] = down.to(device), up.to(device)
    if not factors and prompts is None:  # ten bytes, and it would cost us many times as many
        raise _bad("it changes nothing")
    return BlockAdapter(factors, prompts)


def _check_prompts(prompts: Tensor, hidden_size: int) -> None:
    shape = tuple(prompts.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size or prompts.dtype not in _FLOATS:
        raise _bad(f"prompts are {prompts.dtype}{list(shape)}")
    if not bool(prompts.isfinite().all()):
        raise _bad("prompts have numbers that are not finite")


def _bad(why: str) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.BAD_ADAPTER, f"an adapter that does not fit: {why}"[:200])
