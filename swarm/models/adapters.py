"""Low-rank adapters (LoRA) and deep prompts of clients in a server's blocks: parsed, checked, and
added in passes.

E. Hu et al., arXiv 2106.09685. An adapter is data: two factors for each linear layer that it
changes. In a pass that sessions share, all their factors are multiplied at once, and what a token
gets of the others' is struck out; so one more adapter costs hardly more than one more row.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from swarm.errors import ErrorCode, RemoteProtocolError

MAX_RANK = 512
_DOWN, _UP = ".lora_A", ".lora_B"
_PROMPTS = "prompts"
_MIXTURES = 256  # of factors of several adapters, kept for the next pass
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Factors = tuple[Tensor, Tensor]
"""`[rank, in]` and `[out, rank]`, whatever they are to be scaled by included."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockAdapter:
    """What is added to one block, by the paths of its linear layers. prompts: `[P, H]`, added to
    what enters it at the first P positions of a session (a batch brings its own)."""

    factors: Mapping[str, Factors]
    prompts: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its factors, by the names that they have in a bundle."""
        named: dict[str, Tensor] = {}
        for path, (down, up) in self.factors.items():
            named |= {path + _DOWN: down, path + _UP: up}
        return named


Adapter = Mapping[int, BlockAdapter]
"""By block, counted over the whole model."""


class Use(NamedTuple):
    """An adapter for tokens `[begin, end)` of a pass, counted over all its rows: those of `rows`
    rows of a session from `position` on (None: of no session)."""

    adapter: Adapter
    begin: int
    end: int
    rows: int = 1
    position: int | None = None


def to_bundle(adapter: BlockAdapter) -> bytes:
    """One block's adapter as safetensors; the same factors always give the same bytes."""
    tensors = adapter.tensors
    if adapter.prompts is not None:
        tensors[_PROMPTS] = adapter.prompts
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def digest_of(bundle: bytes) -> bytes:
    return hashlib.sha256(bundle).digest()


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
        path, kind = name[: -len(_DOWN)], name[-len(_DOWN) :]
        if kind not in (_DOWN, _UP) or path + _DOWN not in tensors or path + _UP not in tensors:
            raise _bad(f"'{name[:60]}' is no factor, or one of two")
        if path not in sizes:
            raise _bad(f"there is no linear layer '{path[:60]}'")
        down, up = tensors[path + _DOWN], tensors[path + _UP]
        rank = down.shape[0] if down.ndim == 2 else 0
        shapes = (tuple(down.shape), tuple(up.shape))
        if shapes != ((rank, sizes[path][0]), (sizes[path][1], rank)) or not 0 < rank <= MAX_RANK:
            raise _bad(f"'{path}' has factors {shapes[0]} and {shapes[1]}")
        if down.dtype not in _FLOATS or up.dtype != down.dtype:
            raise _bad(f"'{path}' is {down.dtype} and {up.dtype}")
        if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise _bad(f"'{path}' has numbers that are not finite")
        factors[path] = down.to(device), up.to(device)
    return BlockAdapter(factors, prompts)


def _check_prompts(prompts: Tensor, hidden_size: int) -> None:
    shape = tuple(prompts.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size or prompts.dtype not in _FLOATS:
        raise _bad(f"prompts are {prompts.dtype}{list(shape)}")
    if not bool(prompts.isfinite().all()):
        raise _bad("prompts have numbers that are not finite")


def _bad(why: str) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.BAD_ADAPTER, f"an adapter that does not fit: {why}"[:200])


def linear_sizes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """`(in, out)` of the layers of a block that every token passes through, by path."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in block.named_modules():
        found: Any = module
        if "experts" in path.split("."):  # only some tokens come there
            continue
        if isinstance(getattr(found, "in_features", None), int):
            sizes[path] = found.in_features, found.out_features
        elif type(found).__name__ == "Conv1D":  # as GPT-2 has it
            sizes[path] = found.weight.shape[0], found.weight.shape[1]
    return sizes


class Patches:
    """The blocks of a span, and what is added to them for the length of a pass."""

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        self._blocks = blocks
        self._sizes: dict[int, dict[str, tuple[int, int]]] = {}
        self._mixtures: OrderedDict[tuple[Any, ...], tuple[list[Factors], Factors]] = OrderedDict()

    def sizes(self, block: int) -> Mapping[str, tuple[int, int]]:
        if block not in self._sizes:
            self._sizes[block] = linear_sizes(self._blocks[block])
        return self._sizes[block]

    @contextmanager
    def applied(self, uses: Sequence[Use], tokens: int) -> Generator[None]:
        """Inside, a pass of so many tokens (rows x positions) is computed with these adapters."""
        owners: dict[tuple[Any, ...], Tensor] = {}
        with ExitStack() as hooks:
            for block in {block for use in uses for block in use.adapter}:
                mine = [use for use in uses if block in use.adapter]
                if prompted := [found for use in mine if (found := _prompted(use, block))]:
                    hook = _prompter(prompted)
                    module = self._blocks[block]
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                for path in {path for use in mine for path in use.adapter[block].factors}:
                    entries = [
                        (use.begin, use.end, use.adapter[block].factors[path])
                        for use in mine
                        if path in use.adapter[block].factors
                    ]
                    module = self._blocks[block].get_submodule(path)
                    add = self._adder(entries, tokens, owners)
                    hooks.callback(module.register_forward_hook(add).remove)
            yield

    def _adder(
        self,
        entries: list[tuple[int, int, Factors]],
        tokens: int,
        owners: dict[tuple[Any, ...], Tensor],
    ) -> Any:
        down, up = self._mixture([factors for _, _, factors in entries])
        key = tuple((begin, end, factors[0].shape[0]) for begin, end, factors in entries)
        if key not in owners and [key[0][:2]] != [(0, tokens)]:
            owners[key] = _owners(key, tokens, down)
        owner = owners.get(key)

        def add(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            x = given[0].reshape(-1, given[0].shape[-1]).to(down.dtype)
            inner = x @ down.T
            added = (inner if owner is None else inner * owner) @ up.T
            return output + added.to(output.dtype).view(output.shape)

        return add

    def _mixture(self, factors: list[Factors]) -> Factors:
        """All of them as one pair."""
        if len(factors) == 1:
            return factors[0]
        key = tuple(id(down) for down, _ in factors)
        if key not in self._mixtures:
            dtype = factors[0][0].dtype
            down = torch.cat([down.to(dtype) for down, _ in factors])
            up = torch.cat([up.to(dtype) for _, up in factors], dim=1)
            self._mixtures[key] = factors, (down, up)  # who is kept alive keeps its id
            if len(self._mixtures) > _MIXTURES:
                self._mixtures.popitem(last=False)
        self._mixtures.move_to_end(key)
        return self._mixtures[key][1]

    def forget(self) -> None:
        """Let go of mixtures: an adapter in them is to be freed."""
        self._mixtures.clear()


def _owners(key: tuple[Any, ...], tokens: int, like: Tensor) -> Tensor:
    """`[tokens, ranks]`: 1 where a token has that rank's adapter."""
    owner = torch.zeros(tokens, sum(rank for _, _, rank in key))
    at = 0
    for begin, end, rank in key:
        owner[begin:end, at : at + rank] = 1
        at += rank
    return owner.to(like)


_Prompted = tuple[slice, int, Tensor]
"""Tokens of a pass, in so many rows, and what is added where each row begins."""


def _prompted(use: Use, block: int) -> _Prompted | None:
    """None: behind the prompts, as most steps are."""
    prompts, position = use.adapter[block].prompts, use.position
    if prompts is None or position is None or position >= len(prompts):
        return None
    return slice(use.begin, use.end), use.rows, prompts[position:]


def _prompter(entries: Sequence[_Prompted]) -> Any:
    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        hidden = given.reshape(-1, given.shape[-1]).clone()
        for tokens, rows, prompts in entries:
            own = hidden[tokens].view(rows, -1, hidden.shape[-1])
            own[:, : len(prompts)] += prompts[: own.shape[1]].to(own.dtype)
        hidden = hidden.view(given.shape)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    return add
