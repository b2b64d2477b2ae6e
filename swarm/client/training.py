"""Gradients through remote blocks: `loss.backward()` as if they were here.

A batch is cut into parts by rows, and each part goes its own way from server to server. What
entered every hop stays here. A server that still has its graphs is sent the gradients alone; any
other one gets both, so whatever a server owed when it died is asked of another one, nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, inf
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from swarm.client.hop import Terms, endpoint_of
from swarm.client.training_hop import Held, Post
from swarm.client.training_loans import Lender, Loans
from swarm.client.training_plan import BACKWARD, RETURN, Leg, Workers
from swarm.dht.records import SignedRecord
from swarm.errors import ErrorCode, NoRoute, RemoteProtocolError, SwarmError, UsageError
from swarm.loop import BackgroundLoop
from swarm.messages_training import TensorSpec
from swarm.models.adapters_peft import ShellAdapters, bundles_of
from swarm.models.bundles import Bundles
from swarm.pieces import spec_of
from swarm.transport import Endpoint
from swarm.types import BlockRange

T = TypeVar("T")

_PART_TOKENS = 128  # at least, of a part of a batch; one text may have more
# At least, that its first server has to compute: a part costs client and server 10 ms besides, and
# small products are slow (model A, 8 x 128 tokens back and forth in 8, 4 and 2 parts: 2.0, 1.8 and
# 1.3 s of processors).
_PART_SECONDS = 0.05
_PARTS = 16  # of a batch, at most
_PAUSE = 0.1  # seconds between two looks for somebody who serves the blocks
_ROWS = ("hidden", "gradient")  # belong to single texts; other tensors to all together
# What another server would say as well.
_OURS = {ErrorCode.BAD_FRAME, ErrorCode.BAD_TENSOR, ErrorCode.BAD_ADAPTER}


class Market(Protocol):
    """Who serves what; the client's router."""

    def holders(self, terms: Terms) -> Sequence[SignedRecord]:
        """Servers of the model that may be asked now."""
        ...

    async def refresh(self) -> None: ...
    def failed(self, endpoint: Endpoint, error: SwarmError) -> None: ...


@dataclass(frozen=True, slots=True)
class Adapted:
    """Adapters that the blocks have: `shapes` are those of their factors, by `BLOCK.NAME`."""

    bundles: Bundles
    shapes: Mapping[str, TensorSpec]

    def within(self, blocks: BlockRange) -> dict[str, TensorSpec]:
        return {
            name: spec
            for name, spec in self.shapes.items()
            if blocks.start <= int(name.partition(".")[0]) < blocks.end
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """On the CPU and in the servers' dtype. `inputs` have `position_ids` and `padding` where they
    are needed, both `[B, T, ...]`; `prompts` is `[blocks, P, H]`."""

    blocks: BlockRange
    hidden: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    prompts: Tensor | None = None
    adapted: Adapted | None = None
    returns: bool = False  # gradients are expected to come back

    def rows(self, begin: int, end: int) -> Batch:
        inputs = {name: value[begin:end] for name, value in self.inputs.items()}
        return replace(self, hidden=self.hidden[begin:end], inputs=inputs)

    def at(self, blocks: BlockRange, hidden: Tensor) -> Batch:
        """The same texts where they enter some of the blocks."""
        first = self.blocks.start
        own = slice(blocks.start - first, blocks.end - first)
        prompts = None if self.prompts is None else self.prompts[own]
        return replace(self, blocks=blocks, hidden=hidden, prompts=prompts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        given = {"hidden": self.hidden, **self.inputs}
        return given if self.prompts is None else given | {"prompts": self.prompts}

    def answer(self, *, backward: bool) -> dict[str, TensorSpec]:
        """What a server says that has all its blocks."""
        if not backward:
            return {"hidden": spec_of(self.hidden)}
        answer = {"gradient": spec_of(self.hidden)}
        if self.prompts is not None:
            answer["prompts"] = spec_of(self.prompts)
        return answer | (self.adapted.within(self.blocks) if self.adapted else {})


class Stop(NamedTuple):
    """What a part was when it entered a hop, and who may still have what became of it there."""

    entering: Batch
    held: Held | None = None


Trail = list[Stop]
"""Of all hops of a part."""

Answer = tuple[Mapping[str, Tensor], Held | None]


@dataclass(frozen=True, slots=True)
class TrainingClient:
    """Its coroutines run on the loop."""

    post: Post
    market: Market
    workers: Workers
    lender: Lender
    loans: Loans

    async def forward(self, batch: Batch) -> tuple[Tensor, list[Trail]]:
        """What leaves the last block, and what `backward` needs. Raises NoRoute, UsageError."""
        done = await _together([self._forward(part) for part in self._parts(batch)])
        return torch.cat([output for output, _ in done]), [trail for _, trail in done]

    async def backward(self, trails: list[Trail], gradient: Tensor) -> Mapping[str, Tensor]:
        """`gradient` by what entered the first block, by all `prompts` and factors of adapters."""
        sizes = [trail[0].entering.hidden.shape[0] for trail in trails]
        parts = zip(trails, gradient.split(sizes), strict=True)
        done = await _together([self._backward(list(trail), part) for trail, part in parts])
        result = {"gradient": torch.cat([part.pop("gradient") for part in done])}
        for name in done[0]:
            result[name] = sum((part[name] for part in done[1:]), done[0][name])
        return result

    def _parts(self, batch: Batch) -> list[Batch]:
        rows, tokens, _ = batch.hidden.shape
        if self.post.terms.whole_steps:  # numbers follow the longest text of all
            return [batch]
        servers = self.market.holders(self.post.terms)
        leg = self.workers.next_leg(servers, batch.blocks, rows * tokens)
        seconds = inf if leg is None else self.workers.work(leg, rows * tokens)
        enough = min(rows * tokens / _PART_TOKENS, seconds / _PART_SECONDS)
        count = max(1, min(rows, _PARTS, ceil(enough)))
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
                trail.append(Stop(entering, answer[1]))
                hidden, at = answer[0]["hidden"], leg.blocks.end
                search = _Search(self)
        return hidden, trail

    async def _backward(self, trail: Trail, gradient: Tensor) -> dict[str, Tensor]:
        learnt: list[Tensor] = []
        result: dict[str, Tensor] = {}
        search = _Search(self)
        while trail:
            entering, held = trail[-1]
            held = None if held is None or held.asked else held
            servers, blocks = self.market.holders(self.post.terms), entering.blocks
            tokens = entering.hidden.shape[0] * entering.hidden.shape[1]
            leg = held.leg if held else self.workers.holder(servers, blocks, BACKWARD * tokens)
            if leg is None:
                if self.workers.next_leg(servers, blocks, tokens) is None:
                    await search.wait(blocks)
                else:  # several servers have them now: find what enters each of these
                    _, finer = await self._forward(entering)
                    trail[-1:] = finer
                continue
            answer = await self._ask(leg, entering, gradient, held)
            if answer is not None:
                trail.pop()
                found, _ = answer
                result |= found
                gradient = found["gradient"]
                learnt.extend(found[name] for name in found if name == "prompts")
                search = _Search(self)
        return result | ({"prompts": torch.cat(learnt[::-1])} if learnt else {})

    async def _ask(
        self, leg: Leg, part: Batch, gradient: Tensor | None, held: Held | None = None
    ) -> Answer | None:
        """The answer, perhaps by the short way, and perhaps a short way back. None: that server
        failed, or there is no short way any more. Raises UsageError, RemoteProtocolError."""
        rows, length, _ = part.hidden.shape
        tokens = rows * length * (1.0 if gradient is None else RETURN if held else BACKWARD)
        clock = asyncio.get_running_loop().time
        begin, work = clock(), self.workers.give(leg, tokens)
        try:
            answer = await self._send(leg, part, gradient, held)
        except RemoteProtocolError as error:
            if held is not None:
                return None
            if error.code is ErrorCode.OVERSIZE and rows > 1:
                return await self._halves(leg, part, gradient)
            if error.code is ErrorCode.OVERSIZE:
                raise UsageError(
                    f"texts of {length} tokens are too long to train with: {error}"
                ) from None
            if error.code in _OURS:
                raise
            self._blame(leg, error)
            return None
        except SwarmError as error:
            if isinstance(error, UsageError):
                raise
            self._blame(leg, error)
            return None
        else:
            self.workers.took(leg, tokens, clock() - begin)
            return answer
        finally:
            self.workers.take(leg, work)

    async def _send(
        self, leg: Leg, part: Batch, gradient: Tensor | None, held: Held | None
    ) -> Answer:
        """Raises PeerUnavailable, RemoteProtocolError, UsageError."""
        answer, peer_id = part.answer(backward=gradient is not None), leg.server.record.peer_id
        if held is not None and gradient is not None:
            return await held.back(gradient, answer), None
        tensors = part.tensors | ({} if gradient is None else {"gradient": gradient})
        keep = part.returns and gradient is None
        for last in (False, True):
            try:
                async with self._adapter(leg, part.adapted) as adapter:
                    return await self.post.ask(leg, tensors, adapter, answer, keep=keep)
            except RemoteProtocolError as error:
                if last or part.adapted is None or error.code is not ErrorCode.UNKNOWN_ADAPTER:
                    raise
                self.loans.lost(peer_id, part.adapted.bundles.id)  # it may have been started anew
        raise AssertionError

    @asynccontextmanager
    async def _adapter(self, leg: Leg, adapted: Adapted | None) -> AsyncGenerator[bytes | None]:
        """Inside, the server has it, by this hash. Raises as `_send`."""
        if adapted is None:
            yield None
            return
        server, lender = leg.server.record, self.lender
        async with self.loans.lent(lender, server, adapted.bundles, leg.blocks) as name:
            yield name

    def _blame(self, leg: Leg, error: SwarmError) -> None:
        self.loans.lost(leg.server.record.peer_id)
        self.market.failed(endpoint_of(leg.server.record), error)

    async def _halves(self, leg: Leg, part: Batch, gradient: Tensor | None) -> Answer | None:
        """One after the other, and no short way back."""
        rows = part.hidden.shape[0]
        answers: list[Mapping[str, Tensor]] = []
        for ends in ((0, rows // 2), (rows // 2, rows)):
            own = None if gradient is None else gradient[slice(*ends)]
            answer = await self._ask(leg, part.rows(*ends), own)
            if answer is None:
                return None
            answers.append(answer[0])
        one, two = answers
        return {
            name: torch.cat([one[name], two[name]]) if name in _ROWS else one[name] + two[name]
            for name in one
        }, None


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
    """The remote blocks as one operation of autograd, of hidden states, prompts and factors."""

    @staticmethod
    def forward(
        ctx: Any, client: TrainingClient, batch: Batch, hidden: Tensor, *learning: Tensor | None
    ) -> Tensor:
        output, ctx.trails = BackgroundLoop.shared().call(client.forward(batch))
        ctx.client, ctx.batch, ctx.given = client, batch, (hidden, *learning)
        ctx.versions = _versions(ctx.given)
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        batch: Batch = ctx.batch
        if torch.is_grad_enabled():
            raise UsageError("gradients of gradients do not pass through remote blocks")
        if ctx.versions != _versions(ctx.given):
            raise RuntimeError("what entered remote blocks was modified in place since")
        client: TrainingClient = ctx.client
        gradient = gradients[0].detach().to("cpu", batch.hidden.dtype)
        found = BackgroundLoop.shared().call(client.backward(ctx.trails, gradient))
        names = ["gradient", "prompts", *(batch.adapted.shapes if batch.adapted else ())]
        results = [
            None if given is None else found[name].to(given.device, given.dtype)
            for name, given in zip(names, ctx.given, strict=True)
        ]
        return None, None, *results


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


def pass_through(
    client: TrainingClient,
    blocks: BlockRange,
    hidden: Tensor,
    inputs: Mapping[str, Tensor],
    prompts: Tensor | None = None,
    adapters: ShellAdapters | None = None,
) -> Tensor:
    """`[B, T, H]` through remote blocks, so that gradients find back to `hidden` and `prompts`, and
    to the parameters of `adapters`.

    Raises NoRoute, UsageError.
    """
    dtype = getattr(torch, client.post.terms.numerics.dtype)
    own = hidden.detach().to("cpu", dtype)
    deep = None if prompts is None else prompts.detach().to("cpu", dtype)
    factors: dict[str, Tensor] = {}
    adapted = None
    if adapters is not None:
        live = adapters.live()
        for block in sorted(live):
            if blocks.start <= block < blocks.end:
                factors |= {f"{block}.{name}": t for name, t in live[block].tensors.items()}
        shapes = {name: spec_of(tensor) for name, tensor in factors.items()}
        adapted = Adapted(bundles_of(live), shapes) if factors else None
    learning = [hidden, *factors.values(), *([] if prompts is None else [prompts])]
    returns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learning)
    batch = Batch(blocks, own, inputs, deep, adapted, returns)
    return cast(Tensor, _Passage.apply(client, batch, hidden, prompts, *factors.values()))
