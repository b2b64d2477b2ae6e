"""Gradients through remote blocks: `loss.backward()` as if they were here.

A batch is cut into parts by rows, and each part goes its own way from server to server. Servers
remember nothing: what entered every hop stays here, and goes there once more with the gradients.
So whatever a server owed when it died is asked of another one, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from swarm.client.hop import Terms, endpoint_of
from swarm.client.training_hop import Post
from swarm.client.training_plan import BACKWARD, Leg, Workers
from swarm.dht.records import SignedRecord
from swarm.errors import ErrorCode, NoRoute, RemoteProtocolError, SwarmError, UsageError
from swarm.loop import BackgroundLoop
from swarm.transport import Endpoint
from swarm.types import BlockRange

T = TypeVar("T")

_PART_TOKENS = 128  # at least, of a part of a batch; one text may have more
_PARTS = 16  # of a batch, at most
_PAUSE = 0.1  # seconds between two looks for somebody who serves the blocks
# What another server would say as well.
_OURS = {ErrorCode.BAD_FRAME, ErrorCode.BAD_TENSOR}


class Market(Protocol):
    """Who serves what; the client's router."""

    def holders(self, terms: Terms) -> Sequence[SignedRecord]:
        """Servers of the model that may be asked now."""
        ...

    async def refresh(self) -> None: ...
    def failed(self, endpoint: Endpoint, error: SwarmError) -> None: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """On the CPU and in the servers' dtype. `inputs` have `position_ids` and `padding` where they
    are needed, both `[B, T, ...]`; `prompts` is `[blocks, P, H]`."""

    blocks: BlockRange
    hidden: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    prompts: Tensor | None = None

    def rows(self, begin: int, end: int) -> Batch:
        inputs = {name: value[begin:end] for name, value in self.inputs.items()}
        return Batch(self.blocks, self.hidden[begin:end], inputs, self.prompts)

    def at(self, blocks: BlockRange, hidden: Tensor) -> Batch:
        """The same texts where they enter some of the blocks."""
        first = self.blocks.start
        own = slice(blocks.start - first, blocks.end - first)
        prompts = None if self.prompts is None else self.prompts[own]
        return Batch(blocks, hidden, self.inputs, prompts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        given = {"hidden": self.hidden, **self.inputs}
        return given if self.prompts is None else given | {"prompts": self.prompts}


Trail = list[Batch]
"""What a part was when it entered each hop."""


@dataclass(frozen=True, slots=True)
class TrainingClient:
    """Its coroutines run on the loop."""

    post: Post
    market: Market
    workers: Workers

    async def forward(self, batch: Batch) -> tuple[Tensor, list[Trail]]:
        """What leaves the last block, and what `backward` needs. Raises NoRoute, UsageError."""
        done = await _together([self._forward(part) for part in self._parts(batch)])
        return torch.cat([output for output, _ in done]), [trail for _, trail in done]

    async def backward(self, trails: list[Trail], gradient: Tensor) -> Mapping[str, Tensor]:
        """`gradient` by what entered the first block, and by all `prompts`."""
        sizes = [trail[0].hidden.shape[0] for trail in trails]
        parts = zip(trails, gradient.split(sizes), strict=True)
        done = await _together([self._backward(list(trail), part) for trail, part in parts])
        result = {"gradient": torch.cat([part["gradient"] for part in done])}
        if "prompts" in done[0]:
            result["prompts"] = torch.stack([part["prompts"] for part in done]).sum(0)
        return result

    def _parts(self, batch: Batch) -> list[Batch]:
        rows, tokens, _ = batch.hidden.shape
        if self.post.terms.whole_steps:  # numbers follow the longest text of all
            return [batch]
        count = max(1, min(rows, _PARTS, ceil(rows * tokens / _PART_TOKENS)))
        cuts = [rows * i // count for i in range(count + 1)]
        return [batch.rows(*ends) for ends in pairwise(cuts)]

    async def _forward(self, part: Batch) -> tuple[Tensor, Trail]:
        trail: Trail = []
        hidden, at, end = part.hidden, part.blocks.start, part.blocks.end
        search = _Search(self)
        while at < end:
            tokens = hidden.shape[0] * hidden.shape[1]
            rest = BlockRange(at, end)
            leg = self.workers.next_leg(self.market.holders(self.post.terms), rest, tokens)
            if leg is None:
                await search.wait(rest)
                continue
            entering = part.at(leg.blocks, hidden)
            answer = await self._ask(leg, entering, None)
            if answer is not None:
                trail.append(entering)
                hidden, at = answer["hidden"], leg.blocks.end
                search = _Search(self)
        return hidden, trail

    async def _backward(self, trail: Trail, gradient: Tensor) -> Mapping[str, Tensor]:
        learnt: list[Tensor] = []
        search = _Search(self)
        while trail:
            entering = trail[-1]
            servers, blocks = self.market.holders(self.post.terms), entering.blocks
            tokens = entering.hidden.shape[0] * entering.hidden.shape[1]
            leg = self.workers.holder(servers, blocks, ceil(BACKWARD * tokens))
            if leg is None:
                if self.workers.next_leg(servers, blocks, tokens) is None:
                    await search.wait(blocks)
                else:  # several servers have them now: find what enters each of these
                    _, finer = await self._forward(entering)
                    trail[-1:] = finer
                continue
            answer = await self._ask(leg, entering, gradient)
            if answer is not None:
                trail.pop()
                gradient = answer["gradient"]
                if "prompts" in answer:
                    learnt.append(answer["prompts"])
                search = _Search(self)
        result = {"gradient": gradient}
        return result | ({"prompts": torch.cat(learnt[::-1])} if learnt else {})

    async def _ask(
        self, leg: Leg, part: Batch, gradient: Tensor | None
    ) -> Mapping[str, Tensor] | None:
        """The answer; None: that server failed. Raises UsageError, RemoteProtocolError."""
        rows, length, _ = part.hidden.shape
        tokens = rows * length * (1.0 if gradient is None else BACKWARD)
        tensors = part.tensors | ({} if gradient is None else {"gradient": gradient})
        clock = asyncio.get_running_loop().time
        begin, work = clock(), self.workers.give(leg, tokens)
        try:
            answer = await self.post.ask(leg, tensors, backward=gradient is not None)
        except RemoteProtocolError as error:
            if error.code is ErrorCode.OVERSIZE and rows > 1:
                return await self._halves(leg, part, gradient)
            if error.code is ErrorCode.OVERSIZE:
                raise UsageError(
                    f"texts of {length} tokens are too long to train with: {error}"
                ) from None
            if error.code in _OURS:
                raise
            self.market.failed(endpoint_of(leg.server.record), error)
            return None
        except SwarmError as error:
            self.market.failed(endpoint_of(leg.server.record), error)
            return None
        else:
            self.workers.took(leg, tokens, clock() - begin)
            return answer
        finally:
            self.workers.take(leg, work)

    async def _halves(
        self, leg: Leg, part: Batch, gradient: Tensor | None
    ) -> Mapping[str, Tensor] | None:
        """One after the other."""
        rows = part.hidden.shape[0]
        answers: list[Mapping[str, Tensor]] = []
        for ends in ((0, rows // 2), (rows // 2, rows)):
            own = None if gradient is None else gradient[slice(*ends)]
            answer = await self._ask(leg, part.rows(*ends), own)
            if answer is None:
                return None
            answers.append(answer)
        one, two = answers
        return {
            name: one[name] + two[name] if name == "prompts" else torch.cat([one[name], two[name]])
            for name in one
        }


class _Search:
    """For blocks that nobody serves at the moment."""

    def __init__(self, client: TrainingClient) -> None:
        self._client = client
        self._since: float | None = None

    async def wait(self, blocks: BlockRange) -> None:
        """Look again in a moment. Raises NoRoute when that was long enough."""
        now = asyncio.get_running_loop().time()
        self._since = now if self._since is None else self._since
        patience = self._client.post.config.timeouts.recovery
        if now - self._since > patience:
            raise NoRoute(
                f"nobody who serves blocks {blocks} of {self._client.post.terms.model} could be "
                f"asked to train for {patience:g} s"
            )
        await self._client.market.refresh()
        await asyncio.sleep(_PAUSE)


async def _together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them, or the first error, after which the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part) for part in parts]
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in running]


class _Passage(torch.autograd.Function):
    """The remote blocks as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any, client: TrainingClient, batch: Batch, hidden: Tensor, prompts: Tensor | None
    ) -> Tensor:
        output, ctx.trails = BackgroundLoop.shared().call(client.forward(batch))
        ctx.client, ctx.like, ctx.prompts = client, hidden, prompts
        ctx.versions = _versions(hidden, prompts)
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise UsageError("gradients of gradients do not pass through remote blocks")
        hidden, prompts = ctx.like, ctx.prompts
        if ctx.versions != _versions(hidden, prompts):
            raise RuntimeError("what entered remote blocks was modified in place since")
        client: TrainingClient = ctx.client
        gradient = gradients[0].detach().to("cpu", ctx.trails[0][0].hidden.dtype)
        found = BackgroundLoop.shared().call(client.backward(ctx.trails, gradient))
        by_prompts = None
        if prompts is not None:
            by_prompts = found["prompts"].to(prompts.device, prompts.dtype)
        return None, None, found["gradient"].to(hidden.device, hidden.dtype), by_prompts


def _versions(*tensors: Tensor | None) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


def pass_through(
    client: TrainingClient,
    blocks: BlockRange,
    hidden: Tensor,
    inputs: Mapping[str, Tensor],
    prompts: Tensor | None = None,
) -> Tensor:
    """`[B, T, H]` through remote blocks, so that gradients find back to `hidden` and `prompts`.

    Raises NoRoute, UsageError.
    """
    dtype = getattr(torch, client.post.terms.numerics.dtype)
    own = hidden.detach().to("cpu", dtype)
    deep = None if prompts is None else prompts.detach().to("cpu", dtype)
    batch = Batch(blocks, own, inputs, deep)
    return cast(Tensor, _Passage.apply(client, batch, hidden, prompts))
