"""Low-rank adapters (LoRA) and deep prompts in a server's blocks, added in passes that many
sessions share.

E. Hu et al., arXiv 2106.09685. An adapter is data: two factors for each linear layer that it
changes. In a pass that sessions share, all their factors are multiplied at once, and what a token
gets of the others' is struck out; so one more adapter costs hardly more than one more row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DOWN, UP = ".lora_A", ".lora_B"
_MIXED_BYTES = 1 << 27  # of factors of several adapters side by side, kept for the next pass

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
            named |= {path + DOWN: down, path + UP: up}
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


def linear_sizes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """`(in, out)` of the layers of a block that every token passes through, by path."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in block.named_modules():
        found: Any = module
        if "experts" in path.split("."):  # only some tokens come there
            continue
        if path.rpartition(".")[0] in sizes:  # how it is computed (packing.py)
            continue
        if isinstance(getattr(found, "in_features", None), int):
            sizes[path] = found.in_features, found.out_features
        elif type(found).__name__ == "Conv1D":  # as GPT-2 has it
            sizes[path] = found.weight.shape[0], found.weight.shape[1]
    return sizes


_Place = tuple[int, int]  # of tokens, `[begin, end)`
_Entry = tuple[list[_Place], Factors]
_Key = tuple[tuple[tuple[_Place, ...], int], ...]


class Patches:
    """The blocks of a span, and what is added to them for the length of a pass."""

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        self._blocks = blocks
        self._sizes: dict[int, dict[str, tuple[int, int]]] = {}
        self.mixed_bytes = 0
        self._mixtures: OrderedDict[tuple[Any, ...], tuple[list[Factors], Factors]] = OrderedDict()

    def sizes(self, block: int) -> Mapping[str, tuple[int, int]]:
        if block not in self._sizes:
            self._sizes[block] = linear_sizes(self._blocks[block])
        return self._sizes[block]

    @contextmanager
    def applied(self, uses: Sequence[Use], tokens: int) -> Generator[None]:
        """Inside, a pass of so many tokens (rows x positions) is computed with these adapters."""
        places: dict[int, tuple[Adapter, list[_Place]]] = {}  # several sessions may have the same
        for use in uses:
            places.setdefault(id(use.adapter), (use.adapter, []))[1].append((use.begin, use.end))
        masks: dict[_Key, Tensor] = {}
        with ExitStack() as hooks:
            for block in {block for adapter, _ in places.values() for block in adapter}:
                mine = [use for use in uses if block in use.adapter]
                if prompted := [found for use in mine if (found := _prompted(use, block))]:
                    hook = _prompter(prompted)
                    module = self._blocks[block]
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                for path, entries in _by_layer(places.values(), block).items():
                    module = self._blocks[block].get_submodule(path)
                    for alike in entries.values():
                        add = self._adder(alike, tokens, masks)
                        hooks.callback(module.register_forward_hook(add).remove)
            yield

    def _adder(self, entries: list[_Entry], tokens: int, masks: dict[_Key, Tensor]) -> Any:
        down, up = self._mixture([factors for _, factors in entries])
        key = tuple((tuple(places), factors[0].shape[0]) for places, factors in entries)
        alone = [places for places, _ in key] == [((0, tokens),)]
        if key not in masks and not alone:
            masks[key] = _others(key, tokens, down.device)
        others = masks.get(key)

        def add(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            x = given[0].reshape(-1, given[0].shape[-1]).to(down.dtype)
            inner = x @ down.T
            if others is not None:  # not by a factor 0: others' numbers may be too large for it
                inner = inner.masked_fill(others, 0.0)
            return output + (inner @ up.T).to(output.dtype).view(output.shape)

        return add

    def _mixture(self, factors: list[Factors]) -> Factors:
        """All of them as one pair."""
        if len(factors) == 1:
            return factors[0]
        key = tuple(id(down) for down, _ in factors)
        if key not in self._mixtures:
            down = torch.cat([down for down, _ in factors])
            up = torch.cat([up for _, up in factors], dim=1)
            self._mixtures[key] = factors, (down, up)  # who is kept alive keeps its id
            self.mixed_bytes += down.nbytes + up.nbytes
            while self.mixed_bytes > _MIXED_BYTES and len(self._mixtures) > 1:
                _, (_, gone) = self._mixtures.popitem(last=False)
                self.mixed_bytes -= sum(part.nbytes for part in gone)
        self._mixtures.move_to_end(key)
        return self._mixtures[key][1]

    def forget(self) -> None:
        """Let go of mixtures: an adapter in them is to be freed."""
        self._mixtures.clear()
        self.mixed_bytes = 0


def _by_layer(
    places: Iterable[tuple[Adapter, list[_Place]]], block: int
) -> dict[str, dict[torch.dtype, list[_Entry]]]:
    """What is added to each layer of a block. Factors are multiplied in their own dtype, whoever
    else is in the pass."""
    layers: dict[str, dict[torch.dtype, list[_Entry]]] = {}
    for adapter, where in places:
        if block in adapter:
            for path, factors in adapter[block].factors.items():
                alike = layers.setdefault(path, {}).setdefault(factors[0].dtype, [])
                alike.append((where, factors))
    return layers


def _others(key: _Key, tokens: int, device: torch.device) -> Tensor:
    """bool `[tokens, ranks]`: False where a token has that rank's adapter."""
    others = torch.ones(tokens, sum(rank for _, rank in key), dtype=torch.bool)
    at = 0
    for places, rank in key:
        for begin, end in places:
            others[begin:end, at : at + rank] = False
        at += rank
    return others.to(device)


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
