"""One inference session over a route of servers: steps, rollbacks, and replay when a hop dies.

The idea: `histories[b]` holds all that ever entered block b at a border of the route. Border 0 is
always complete, so whatever dies, the blocks behind a gap can be fed again from the last border
that is. Lives in the event loop; `swarm/client/sessions.py` is its face for ordinary threads.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from swarm.client.history import History, InputHistory
from swarm.client.hop import Hop, Terms
from swarm.client.route import Interrupted, Route, Router
from swarm.config import ClientConfig
from swarm.errors import (
    ErrorCode,
    NoRoute,
    PeerUnavailable,
    RemoteProtocolError,
    SessionClosed,
    UsageError,
)
from swarm.identity import Access
from swarm.messages import Output, PushFailed, Step
from swarm.tensors import TORCH_DTYPES, from_frame, to_frame
from swarm.transport import Transport
from swarm.types import DTYPE_BYTES, BlockRange

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """The step that the caller waits for: positions `[start, end)`."""

    start: int
    end: int
    reorder: tuple[int, ...] | None
    first_number: int
    answer: History = field(init=False)

    def __post_init__(self) -> None:
        self.answer = History(base=self.start)


class RemoteSession:
    """Attention caches for `blocks` of a model, kept on servers, and the means to rebuild them."""

    def __init__(
        self,
        blocks: BlockRange,
        terms: Terms,
        router: Router,
        transport: Transport,
        access: Access,
        config: ClientConfig,
    ) -> None:
        self.blocks = blocks
        self.position = 0
        self.recoveries = 0
        self._terms = terms
        self._router = router
        self._config = config
        self._route = Route(blocks, router, transport, access, config.timeouts)
        self._epoch = 0
        self._numbers = itertools.count()
        self._sent: dict[int, Step] = {}  # the latest steps by number
        self._histories: dict[int, History] = {blocks.start: History()}
        self._inputs = InputHistory(terms.batch_size)
        self._reorder: tuple[int, ...] | None = None
        self._pending: _Pending | None = None
        self._flowing = False
        self._trouble: str | None = "nothing is open yet"
        self._event = asyncio.Event()
        self._lock = asyncio.Lock()
        self._closed = False

    @property
    def hops(self) -> list[Hop]:
        """The present route, in the order of the blocks."""
        return self._route.hops

    def rollback(self, position: int) -> None:
        """The next step begins at `position`; what came after it never was."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot go to position {position}: there are {self.position}")
        self.position = position

    def reorder(self, rows: Sequence[int]) -> None:
        """From the next step on, row i continues what row `rows[i]` was (beam search)."""
        before = self._reorder
        self._reorder = tuple(rows) if before is None else tuple(before[row] for row in rows)

    async def step(
        self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Hidden states [B, T, H] of the next T positions, through all blocks of the session.

        Raises NoRoute when blocks stay missing for `timeouts.recovery` seconds, SessionClosed.
        """
        async with self._lock:
            if self._closed:
                raise SessionClosed("this inference session is closed; open a new one")
            tokens = hidden.shape[1]
            if tokens == 0:
                return hidden
            await self._begin(hidden, inputs or {})
            assert self._pending is not None
            try:
                await self._finish(self._pending)
                self.position = self._pending.end
                return self._pending.answer.read(self._pending.start, self._pending.end)
            except BaseException:
                # The position stays; what servers computed beyond it is cropped by the next step.
                self._trouble = "the last step was not finished"
                if self._pending.reorder is not None:  # who knows which of them applied it
                    for hop in self.hops:
                        hop.lose(SessionClosed("a reorder was cut short"))
                raise
            finally:
                self._pending, self._flowing = None, False

    async def close(self) -> None:
        self._closed = True
        self._event.set()
        await self._route.close()

    # Steps -------------------------------------------------------------------------------------

    async def _begin(self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        start, end = self.position, self.position + hidden.shape[1]
        if any(history.length > start for history in self._histories.values()):
            await self._forget(start)
        if self._reorder is not None:
            for history in self._histories.values():
                history.reorder(self._reorder)
            self._inputs.reorder(self._reorder)
        if end > self._terms.max_length:
            self._outgrow(end)
        dtype = TORCH_DTYPES[self._terms.numerics.dtype]
        self._histories[self.blocks.start].append(start, hidden.detach().to("cpu", dtype))
        self._inputs.append(start, hidden.shape[1], inputs)
        self._check_memory()
        self._pending = _Pending(start, end, self._reorder, next(self._numbers))
        self._reorder = None

    async def _forget(self, start: int) -> None:
        """Drop all that came after `start`, once the copies of what came before it are here."""
        if self._trouble is None:
            try:
                for border in self._histories.values():
                    await self._wait(border, start)
            except Interrupted as error:
                self._trouble = str(error)
        for history in self._histories.values():
            history.crop(start)
        self._inputs.crop(start)
        self._sent.clear()
        self._epoch += 1

    async def _finish(self, pending: _Pending) -> None:
        """Flow if all is well, else repair; give up only when blocks stay missing."""
        clock = asyncio.get_running_loop().time
        timeouts = self._config.timeouts
        give_up = clock() + timeouts.recovery
        while pending.answer.length < pending.end:
            try:
                if self._trouble is not None:
                    await self._recover()
                if self._in_step(pending):
                    await self._flow(pending)
                else:
                    await self._refill(pending)
            except Interrupted as error:
                self._trouble = str(error)
                logger.info("session interrupted: %s", error)
                if clock() > give_up:
                    raise PeerUnavailable(
                        f"gave up after {timeouts.recovery:g} s of recoveries: {error}"
                    ) from None
            except NoRoute:
                if clock() > give_up:
                    raise
                await self._router.refresh()
                await asyncio.sleep(min(timeouts.refresh, max(0.0, give_up - clock())))

    def _in_step(self, pending: _Pending) -> bool:
        """All servers stand at the same place and know the same reorders: one flow serves all."""
        first = self.hops[0]
        return first.position >= pending.start and all(
            hop.position == first.position
            and self._lacks_reorder(hop, pending) == self._lacks_reorder(first, pending)
            and border.length >= pending.start
            for hop, border in zip(self.hops, self._borders(pending), strict=True)
        )

    async def _flow(self, pending: _Pending) -> None:
        """Send to the first hop; each hop pushes to the next, and the last one answers."""
        self._flowing = True
        first, answer = self.hops[0], pending.answer
        chunks = self._chunks(pending.start, pending.end, self.hops)
        window = min(hop.window for hop in self.hops)
        for index, (begin, end) in enumerate(chunks):
            if index >= window:
                await self._wait(answer, chunks[index - window][1])
            step = self._make_step(first, pending, begin, end, opening=index == 0)
            if index == 0:
                for hop in self.hops:
                    hop.position = begin
            await self._send(first, step)
        await self._wait(answer, pending.end)

    async def _refill(self, pending: _Pending) -> None:
        """Bring hop after hop to the end of the pending step, each from what it lacks."""
        self._flowing = False
        for hop, border in zip(self.hops, self._borders(pending), strict=True):
            begin, known = min(hop.position, border.length), border.length
            if begin >= pending.end:
                continue
            # What the border holds already is computed for the server's cache only, quietly.
            chunks = self._chunks(begin, known, [hop]) + self._chunks(known, pending.end, [hop])
            for index, (low, high) in enumerate(chunks):
                if index >= hop.window:
                    await self._wait(hop, chunks[index - hop.window][1])
                step = self._make_step(hop, pending, low, high, opening=index == 0)
                step = step.model_copy(update={"push": False, "quiet": high <= known})
                hop.position = low if index == 0 else hop.position
                await self._send(hop, step)
            await self._wait(hop, pending.end)

    def _make_step(
        self, hop: Hop, pending: _Pending, begin: int, end: int, *, opening: bool
    ) -> Step:
        return Step(
            epoch=self._epoch,
            step=next(self._numbers),
            start=begin,
            hidden=to_frame(self._histories[hop.blocks.start].read(begin, end)),
            inputs={name: to_frame(t) for name, t in self._inputs.read(begin, end).items()},
            crop_to=begin if opening and hop.position > begin else None,
            reorder=pending.reorder if opening and self._lacks_reorder(hop, pending) else None,
            deadline_ms=max(1, int(self._config.timeouts.step * 1000)),
        )

    async def _send(self, hop: Hop, step: Step) -> None:
        self._sent[step.step] = step
        while len(self._sent) > 2 * max(hop.window for hop in self.hops):
            del self._sent[next(iter(self._sent))]  # more than ever are unanswered
        await hop.send(step)

    def _chunks(self, begin: int, end: int, hops: Sequence[Hop]) -> list[tuple[int, int]]:
        """Pieces of `[begin, end)` that every hop takes as one step; none if it is empty."""
        terms = self._terms
        row_bytes = terms.hidden_size * DTYPE_BYTES[terms.numerics.dtype]
        rows = terms.batch_size
        most = min(self._config.chunk_bytes // row_bytes, *(hop.max_step_tokens for hop in hops))
        width = max(1, most // rows)
        return [(low, min(end, low + width)) for low in range(begin, end, width)]

    def _borders(self, pending: _Pending) -> list[History]:
        """For every hop, where its outputs are kept."""
        return [self._histories[hop.blocks.start] for hop in self.hops[1:]] + [pending.answer]

    @staticmethod
    def _lacks_reorder(hop: Hop, pending: _Pending) -> bool:
        return pending.reorder is not None and hop.last_step < pending.first_number

    async def _wait(self, progress: History | Hop, end: int) -> None:
        """Until it reaches `end`. Raises Interrupted if a hop is lost or nothing comes."""
        silence = self._config.timeouts.step
        while (progress.length if isinstance(progress, History) else progress.position) < end:
            if self._trouble is not None:
                raise Interrupted(self._trouble)
            self._event.clear()
            try:
                async with asyncio.timeout(silence):
                    await self._event.wait()
            except TimeoutError:
                raise Interrupted(f"nothing came for {silence:g} s") from None

    def _outgrow(self, end: int) -> None:
        """More positions than the servers reserved: open everything anew, larger, and replay."""
        self._terms = replace(self._terms, max_length=max(end, 2 * self._terms.max_length))
        for hop in self.hops:
            hop.lose(SessionClosed(f"outgrown at {end} positions"))
        self._trouble = "the session outgrew its reservation"

    def _check_memory(self) -> None:
        held = sum(border.nbytes for border in self._histories.values()) + self._inputs.nbytes
        if held > self._config.history_bytes:
            raise UsageError(
                f"the session's history takes {held >> 20} MiB, more than history_bytes allows; "
                "raise it in ClientConfig, or use fewer or shorter sequences"
            )

    # What hops tell --------------------------------------------------------------------------

    async def on_output(self, hop: Hop, output: Output) -> None:
        step, pending = self._sent.get(output.step), self._pending
        if step is None or hop not in self.hops:
            return  # rolled back meanwhile, or said by a hop that was given up
        begin, end = step.start, step.start + step.hidden.shape[1]
        index = self.hops.index(hop)
        following = self.hops[index + 1] if index + 1 < len(self.hops) else None
        border = pending and pending.answer
        if following is not None:
            border = self._histories[following.blocks.start]
        problem = self._problem(output, step, border)
        if problem is not None:
            hop.lose(RemoteProtocolError(ErrorCode.BAD_TENSOR, problem))
            self.on_lost(hop)
            return
        if border is not None and output.hidden.shape[1]:
            border.append(begin, from_frame(output.hidden))
        for reached in self.hops[: index + 1] if self._flowing else [hop]:
            reached.position = max(reached.position, end)
            reached.last_step = max(reached.last_step, output.step)
        self._router.worked(hop.peer_id, end - begin, output.compute_ms / 1e3)
        if self._flowing and following is not None and not output.pushed and not self._trouble:
            relayed = {"hidden": output.hidden, "epoch": self._epoch}
            await following.send(step.model_copy(update=relayed))
        self._event.set()

    def _problem(self, output: Output, step: Step, border: History | None) -> str | None:
        """Why an output cannot be what we asked for."""
        rows, tokens, size = step.hidden.shape
        allowed = [(rows, tokens, size)] + ([(rows, 0, size)] if step.quiet else [])
        if output.hidden.shape not in allowed or output.hidden.dtype != step.hidden.dtype:
            return f"answered {output.hidden.dtype}{list(output.hidden.shape)}"
        if border is not None and step.start > border.length:
            return f"answered position {step.start} before {border.length}"
        return None

    def on_push_failed(self, hop: Hop, message: PushFailed) -> None:
        hop.cannot_push_to = hop.pushes_to
        self._interrupt(f"{hop} cannot push: {message.message}")

    def on_lost(self, hop: Hop) -> None:
        if hop in self.hops:
            self._interrupt(f"lost {hop}: {hop.failure}")

    def _interrupt(self, why: str) -> None:
        self._trouble = why
        self._event.set()

    async def _recover(self) -> None:
        """A new epoch, a whole route, and histories at just its borders."""
        self._epoch += 1
        newborn = next(self._numbers)
        self.recoveries += await self._route.mend(self._epoch, newborn, self._terms, self)
        starts = {hop.blocks.start for hop in self.hops}
        for start in starts - set(self._histories):
            self._histories[start] = History()
        for start in set(self._histories) - starts:
            del self._histories[start]
        self._trouble = None
