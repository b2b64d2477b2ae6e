"""All choices of one request, as they are written: text, and what happens to the servers behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from swarm.api.asked import Asked
from swarm.api.engine import Engine, Prompt, Stream
from swarm.api.text import Detokenizer, Stopper, Told
from swarm.client.hop import Hop
from swarm.errors import SessionClosed

_LOOK_SECONDS = 0.05  # between looks at the servers, by who wants to know

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of one choice, and the text that can be shown now, which may be empty."""

    choice: int
    text: str
    told: Sequence[Told]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Leg:
    """Who has which blocks. `name` was chosen by a stranger."""

    blocks: str
    peer: str
    name: str
    lost: bool


@dataclass(frozen=True, slots=True)
class Travel:
    """The servers behind one choice, whenever that changes; `recoveries` is how often one had to
    be replaced."""

    choice: int
    legs: Sequence[Leg]
    recoveries: int


Item = Piece | Travel


async def write(
    engine: Engine, prompts: Sequence[Prompt], asked: Asked, count: Callable[[int], object]
) -> AsyncGenerator[Item]:
    """Pieces of `asked.n` choices for each prompt, until all are finished.

    Closing it frees the servers at once. `count` is told of every token. Raises what streams raise.
    """
    items: asyncio.Queue[Item | BaseException | None] = asyncio.Queue()
    choices = asked.n or 1
    travels = asked.stream_options is not None and asked.stream_options.include_route

    async def one(index: int) -> None:
        try:
            stream = engine.begin(prompts[index // choices], asked, index % choices)
        except Exception as error:  # noqa: BLE001  # raised again where the items are taken
            items.put_nowait(error)
            return
        watch = _Watch(stream, index, items.put_nowait)
        watching = asyncio.create_task(watch.keep_looking()) if travels else None
        try:
            before = prompts[index // choices].ids
            async with aclosing(_pieces(engine, stream, asked, index, before, count)) as pieces:
                async for piece in pieces:
                    if travels:
                        watch.look()
                    items.put_nowait(piece)
        except Exception as error:  # noqa: BLE001  # raised again where the items are taken
            items.put_nowait(error)
        finally:
            stream.cancel()
            if watching is not None:
                watching.cancel()

    async def everyone() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(len(prompts) * choices):
                group.create_task(one(index))

    work = asyncio.create_task(everyone())
    work.add_done_callback(lambda _: items.put_nowait(None))  # however it ended
    try:
        while (item := await items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        work.cancel()
        await asyncio.wait([work])


async def _pieces(
    engine: Engine,
    stream: Stream,
    asked: Asked,
    choice: int,
    before: Sequence[int],
    count: Callable[[int], object],
) -> AsyncGenerator[Piece]:
    """One for every token behind those `before`, and a last one that says why it is the last."""
    text, stopper = Detokenizer(engine.decode, before), Stopper(asked.stops)
    finish: Finish = "length"
    async for token in stream:
        count(1)
        if token.id in engine.ends:
            finish = "stop"
            continue
        if token.logprob is not None:
            stopper.tell(Told(token.id, token.logprob, token.top, stopper.end))
        shown, told = stopper.add(text.add(token.id))
        yield Piece(choice, shown, told, None)
        if stopper.stopped:
            break
    if not stopper.stopped:
        shown, told = stopper.add(text.end(), last=True)
        if shown or told:
            yield Piece(choice, shown, told, None)
    yield Piece(choice, "", (), "stop" if stopper.stopped else finish)


@dataclass(slots=True)
class _Watch:
    """Tells where a stream passes, when that changes."""

    stream: Stream
    choice: int
    tell: Callable[[Travel], object]
    _last: Travel | None = None

    def look(self) -> None:
        hops = self.stream.hops
        if not hops:
            return  # not begun, or over
        travel = Travel(self.choice, tuple(map(_leg, hops)), self.stream.recoveries)
        if travel != self._last:
            self._last = travel
            self.tell(travel)

    async def keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()


def _leg(hop: Hop) -> Leg:
    lost = hop.failure is not None and not isinstance(hop.failure, SessionClosed)
    return Leg(str(hop.blocks), hop.peer_id, hop.name, lost)
