"""One inference session over a route of servers: steps, rollbacks, and replay when a hop dies.

All that ever crossed a border of the route is kept (`swarm/client/history.py`), so whatever dies,
the blocks behind a gap can be fed again from the last border that is complete. Lives in the event
loop; `swarm/client/remote.py` is its face for ordinary threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from swarm.client.history import Borders, History
from swarm.client.hop import Hop, Terms
from swarm.client.pace import Pace
from swarm.client.recoveries import Recoveries
from swarm.client.route import Interrupted, Route, Router, Silent
from swarm.client.steps import (
    Bell,
    Cutter,
    Patience,
    Pending,
    Sent,
    check_memory,
    check_step,
    composed,
    problem_with,
    store,
)
from swarm.client.tending import Tending
from swarm.client.text import Text, feeds
from swarm.config import ClientConfig
from swarm.errors import (
    ErrorCode,
    NoRoute,
    PeerUnavailable,
    RemoteProtocolError,
    SessionClosed,
)
from swarm.identity import Access
from swarm.messages import MAX_TOKENS, Output, PushFailed
from swarm.tensors import TORCH_DTYPES, to_frame
from swarm.tracing import Trails
from swarm.transport import Transport
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

_ATTEMPTS = 16  # disasters in one step, after which there is no point in going on


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
        pace: Pace,
    ) -> None:
        self.blocks = blocks
        self.position = 0
        self.recoveries = 0
        self._router = router
        self._config = config
        self._route = Route(blocks, router, transport, access, config.timeouts)
        borders, cutter = (
            Borders(blocks.start, terms.batch_size),
            Cutter(terms, config.chunk_bytes, pace),
        )
        self._text = Text(terms, borders, cutter, config.timeouts.step)
        self._sent: dict[int, Sent] = {}  # by number, oldest first
        self._reorder: tuple[int, ...] | None = None
        self._pending: Pending | None = None
        self._flowing = False  # from hop to hop; otherwise the client feeds each of them
        self._trouble: str | None = "nothing is open yet"
        self._bell = Bell()
        self._patience = Patience(config.timeouts)
        self._lock, self._closed = asyncio.Lock(), False
        self.tending = Tending(
            self._route, router, self._text, self._lock, self._is_well, config.standby_after
        )
        self._trails = Trails(str(terms.model), str(blocks))

    @property
    def hops(self) -> list[Hop]:
        """The present route, in the order of the blocks."""
        return self._route.hops

    @property
    def log(self) -> Recoveries:
        """Why somebody had to be replaced, and how long that took."""
        return self._route.recoveries

    def rollback(self, position: int) -> None:
        """The next step begins at `position`; what came after it never was."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot go to position {position}: there are {self.position}")
        self.position = position

    def reorder(self, rows: Sequence[int]) -> None:
        """From the next step on, row i continues what row `rows[i]` was (beam search)."""
        self._reorder = composed(self._reorder, rows, self._text.terms.batch_size)

    async def step(
        self,
        hidden: torch.Tensor,
        inputs: Mapping[str, torch.Tensor] | None = None,
        keep: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] of the next T positions, through all blocks of the session.

        `inputs` are of `protocol.INPUTS`, each [B, T, ...]. Of the result only the last `keep`
        positions come back (None or 0: all). Raises UsageError, SessionClosed, and
        NoRoute when blocks stay missing for `timeouts.recovery` seconds.
        """
        async with self._lock:
            self._check_open()
            if hidden.shape[1] == 0:
                return hidden
            with self._trails.step(self.position, hidden.shape[1]) as self._text.trace:
                if await self.tending.look_around(self.position, hidden.shape[1], self):
                    self._trouble = "there is a better route"
                await self._begin(hidden, inputs or {}, keep)
                assert self._pending is not None
                return await self._carry_out(self._pending, keep)

    async def _carry_out(self, pending: Pending, keep: int | None) -> torch.Tensor:
        try:
            await self._finish(pending)
            self.position = pending.end
            for hop in self.hops:
                hop.trusted = pending.end
            self.tending.step_done(self.position)
            answer = pending.answer.read(pending.wanted, pending.end)
            return answer[:, -keep:] if keep else answer
        except BaseException:
            # The position stays; what servers computed beyond it is cropped by the next step.
            self._trouble = "the last step was not finished"
            if pending.reorder is not None:  # who knows which of them applied it
                for hop in self.hops:
                    hop.lose(SessionClosed("a reorder was cut short"))
            raise
        finally:
            self._pending, self._flowing = None, False

    async def close(self) -> None:
        """Free the servers; a step that is under way raises SessionClosed."""
        self._closed = True
        self._bell.wake()
        await self._route.close()
        await self.tending.end()
        async with self._lock:  # until that step has noticed
            await self._route.close()
        self._trails.end()

    async def _begin(
        self, hidden: torch.Tensor, inputs: Mapping[str, torch.Tensor], keep: int | None
    ) -> None:
        text, terms, borders = self._text, self._text.terms, self._text.borders
        start, end = self.position, self.position + hidden.shape[1]
        check_step(hidden, inputs, end, terms)
        check_memory(borders.nbytes, self._config)
        rolled_back = borders.longest > start
        if self._reorder is not None:
            await self._settle(start)
        if rolled_back:
            text.epoch += 1
            for sent in self._sent.values():  # copies on their way are taken up to here
                sent.until = min(sent.until, start)
            borders.crop(start)
            self.tending.went_back(start)
        if self._reorder is not None:
            borders.reorder(self._reorder)
            await self.tending.dismiss(for_good=True)  # they would have to follow every reorder
        if end > terms.max_length:
            self._outgrow(end)
            await self.tending.dismiss()
        frame = to_frame(hidden.to(TORCH_DTYPES[terms.numerics.dtype]), terms.codec)
        borders.begin(start, frame, hidden.shape[1], inputs)
        text.cutter.begin(start)
        # What need not be answered may be computed apart, which whole steps must not be.
        wanted = start if terms.whole_steps else max(start, end - (keep or end))
        self._pending = Pending(start, end, wanted, frame, self._reorder, next(text.numbers))
        self._reorder = None

    async def _settle(self, start: int) -> None:
        """Wait for copies that are still on their way, since they are of the past that changes."""
        try:
            await self._until(lambda: self._text.borders.shortest >= start)
        except Interrupted as error:
            self._trouble = str(error)
        self._sent.clear()

    async def _finish(self, pending: Pending) -> None:
        """Flow if all is well, else repair; give up only when blocks stay missing."""
        clock, patience = asyncio.get_running_loop().time, self._config.timeouts.recovery
        disasters, begun, give_up, replaced = 0, clock(), clock() + patience, self.recoveries
        self._patience.begin(pending)
        while disasters < _ATTEMPTS + len(self.hops):  # each may have to say: it cannot rewind
            whole = self._trouble is None and all(hop.alive for hop in self.hops)
            try:
                if not whole:
                    self.log.noticed(clock())
                    await self._recover(give_up)
                    whole = True
                    if not pending.is_next_for(self.hops, self._borders(pending)):
                        await self._refill(pending)
                if pending.answer.length < pending.end:
                    await self._flow(pending)
                if self.recoveries == replaced:
                    self._patience.learn(pending, clock() - begun)
                self.log.done(clock(), pending.start)
                return
            except Interrupted as error:
                logger.info("session interrupted: %s", error)
                self._trouble = str(error)
                silent = isinstance(error, Silent)
                self.log.noticed(clock(), self._patience.silence if silent else 0.0)
                if silent and not self._patience.is_short:
                    owing = next((sent.awaited for sent in self._sent.values()), set[Hop]())
                    self._route.suspect(owing, self._flowing, error)
                self._patience.ask(silent=silent)
                if whole:  # another disaster, to be mended in a time of its own
                    disasters, give_up = disasters + 1, clock() + patience
                elif clock() > give_up:
                    raise NoRoute(f"gave up after {patience:g} s: {error}") from None
        raise PeerUnavailable(f"gave up after too many recoveries: {self._trouble}")

    async def _flow(self, pending: Pending) -> None:
        """Send to the first hop; each hop pushes to the next, and the last one answers."""
        self._flowing = True
        first = self.hops[0]
        text, cutter = self._text, self._text.cutter
        flight = cutter.flight(pending, self.hops)
        window, ends = min(hop.window for hop in self.hops), list[int]()
        for begin, end in cutter.pieces(pending.start, pending.end, self.hops):
            if len(ends) >= window:
                await self._wait(self.hops[-1], ends[-window])
            if len(self._sent) >= 2 * window:  # copies come more slowly than answers
                await self._until(lambda: len(self._sent) < 2 * window)
            whole = pending.hidden if (begin, end) == (pending.start, pending.end) else None
            reorder = pending.reorder if not ends and pending.is_new_to(first) else None
            step = text.step(first, begin, end, hidden=whole, reorder=reorder, crop=not ends)
            step = step.model_copy(update={"keep": pending.keep(begin, end)})
            if not ends:
                for hop in self.hops:
                    hop.position = hop.trusted = begin  # until it is known to have heard of it
            self._sent[step.step] = Sent(step, set(self.hops), end, flight)
            first.send(step)
            ends.append(end)
            if flight is not None:
                flight.left(asyncio.get_running_loop().time())
        await self._wait(self.hops[-1], pending.end)  # an answer of an older epoch is not enough

    async def _refill(self, pending: Pending) -> None:
        """Bring all hops to the end of the pending step, each from what it lacks, and as soon as
        the one before it has answered."""
        self._flowing = False
        lacking = feeds(self.hops, pending.answer, pending.end, self._text)
        while any(not feed.is_done for feed in lacking):
            for feed in lacking:
                while feed.is_ready:
                    hop = feed.hop
                    step = feed.take(pending.reorder if pending.is_new_to(hop) else None)
                    self._sent[step.step] = Sent(step, {hop}, step.start + step.hidden.shape[1])
                    hop.send(step)
            await self._until(
                lambda: (
                    any(feed.is_ready for feed in lacking) or all(feed.is_done for feed in lacking)
                )
            )

    def _borders(self, pending: Pending) -> list[History]:
        """For every hop, where its outputs are kept."""
        return [self._text.borders[hop.blocks.start] for hop in self.hops[1:]] + [pending.answer]

    async def _wait(self, hop: Hop, end: int) -> None:
        await self._until(lambda: hop.position >= end)

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Raises Interrupted if a hop is lost or nothing comes, SessionClosed."""
        while not reached():
            self._check_open()
            if self._trouble is not None:
                raise Interrupted(self._trouble)
            await self._bell.until(reached, self._patience.silence)

    def _outgrow(self, end: int) -> None:
        """More positions than the servers reserved: open everything anew, larger, and replay."""
        terms = self._text.terms
        larger = min(MAX_TOKENS, max(end, 2 * terms.max_length))
        self._text.terms = replace(terms, max_length=larger)
        for hop in self.hops:
            hop.lose(SessionClosed(f"outgrown at {end} positions"))
        self._trouble = "the session outgrew its reservation"

    def _is_well(self) -> bool:
        return not self._closed and self._trouble is None

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this inference session is closed; open a new one")

    def on_output(self, hop: Hop, output: Output) -> None:
        sent, pending, hops = self._sent.get(output.step), self._pending, self._route.hops
        if sent is None or hop not in sent.awaited or hop not in hops:
            return  # rolled back meanwhile, never asked for, or said by one that was given up
        step, index = sent.step, hops.index(hop)
        begin, end = step.start, step.start + step.hidden.shape[1]
        following = hops[index + 1] if index + 1 < len(hops) else None
        border = pending and pending.answer
        if following is not None:
            border = self._text.borders[following.blocks.start]
        problem = problem_with(output, sent, border, is_last=following is None)
        if problem is not None:
            hop.lose(RemoteProtocolError(ErrorCode.BAD_TENSOR, problem))
            self.on_lost(hop)
            return
        sent.awaited.remove(hop)
        if not sent.awaited:
            del self._sent[step.step]
        if border is not None and output.hidden.shape[1]:
            store(border, sent, output.hidden)
        # Of an older epoch `synced` has counted it, and perhaps it was cropped.
        if output.epoch == self._text.epoch:
            for reached in hops[: index + 1] if self._flowing else [hop]:
                reached.position = max(reached.position, end)
                reached.last_step = max(reached.last_step, output.step)
            pushed = output.pushed and hop.pushes_to is not None
            if self._flowing and following is not None and not pushed and not self._trouble:
                following.send(step.model_copy(update={"hidden": output.hidden}))
        if sent.flight is not None:
            sent.arrived(index, output, asyncio.get_running_loop().time())
        seconds, elapsed = output.compute_ms / 1e3, sent.elapsed(index)
        if self._flowing and end == begin + 1:
            self.tending.observe(hop, elapsed)
        self._router.worked(hop.peer_id, end - begin, seconds, len(hop.blocks), elapsed)
        self._bell.ring()

    def on_push_failed(self, hop: Hop, message: PushFailed) -> None:
        if message.epoch == self._text.epoch and hop.pushes_to is not None:  # else we left them
            hop.cannot_push_to = hop.pushes_to
            self._interrupt(f"{hop} cannot push: {message.message}")

    def on_leaving(self, hop: Hop) -> None:
        self.tending.leave(hop, self)

    def on_lost(self, hop: Hop) -> None:
        if hop in self.hops:
            self._interrupt(f"lost {hop}: {hop.failure}")

    def _interrupt(self, why: str) -> None:
        self._trouble = why
        self._bell.wake()

    async def _recover(self, give_up: float) -> None:
        """A new epoch, a whole route, and histories at just its borders. Raises NoRoute."""
        clock, pause, text = asyncio.get_running_loop().time, 0.0, self._text
        while True:
            text.epoch += 1
            newborn = next(text.numbers)
            try:
                prompt = self._pending.end if self._pending is not None else 0
                sync, take = self._patience.sync(), self.tending.take
                self.recoveries += await self._route.mend(
                    text.epoch, newborn, prompt, text.terms, self, sync, take
                )
                break
            except NoRoute as error:
                self._check_open()
                if clock() > give_up:
                    raise NoRoute(f"{error}; before that: {self._trouble}") from None
            await asyncio.sleep(min(pause, max(0.0, give_up - clock())))
            pause = self._config.timeouts.refresh  # but the first look is taken at once
            await self._router.refresh()
        self._check_open()
        text.borders.move(hop.blocks.start for hop in self.hops)
        for hop in self.hops:
            if self._pending is not None and hop.last_step > self._pending.first_number:
                hop.trusted = self._pending.end  # it went back as far as it was to
        await self.tending.settle_in()
        # What a server had not begun when the epoch began, it has dropped.
        for number, sent in list(self._sent.items()):
            sent.awaited.intersection_update(h for h in self.hops if number <= h.last_step)
            if not sent.awaited:
                del self._sent[number]
        self._trouble = None
