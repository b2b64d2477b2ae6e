"""Servers that lie: what shows is gone round, and the rest does no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.errors import ErrorCode
from swarm.messages import (
    Leaving,
    Message,
    Open,
    Opened,
    Output,
    PushFailed,
    Refused,
    Synced,
)
from swarm.tensors import from_frame, to_frame
from swarm.transport import Service, Stream
from swarm.wire import decode, encode
from tests.client.twins import THIRDS, House
from tests.inprocess import STEADY

Lie = Callable[[Message], list[Message | bytes]]


class Tampered(Stream):
    """What a server says, changed on its way out; what it hears, changed on its way in."""

    def __init__(self, stream: Stream, lie: Lie, hears: Callable[[Message], Message]) -> None:
        self.stream = stream
        self.lie = lie
        self.hears = hears

    async def send(self, frame: bytes) -> None:
        for message in self.lie(decode(frame)):
            await self.stream.send(message if isinstance(message, bytes) else encode(message))

    def send_nowait(self, frame: bytes) -> bool:
        return False

    async def receive(self) -> bytes | None:
        frame = await self.stream.receive()
        return None if frame is None else encode(self.hears(decode(frame)))

    async def finish(self) -> None:
        await self.stream.finish()

    def cancel(self) -> None:
        self.stream.cancel()


def truth(message: Message) -> Message:
    return message


def about(cls: type[Message], change: Callable[[Any], list[Any]]) -> Lie:
    return lambda message: change(message) if isinstance(message, cls) else [message]


def with_fields(cls: type[Message], **fields: Any) -> Lie:
    return about(cls, lambda message: [message.model_copy(update=fields)])


def with_hidden(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    def lie(output: Output) -> list[Message]:
        return [output.model_copy(update={"hidden": to_frame(change(from_frame(output.hidden)))})]

    return about(Output, lie)


HARMFUL: dict[str, Lie] = {
    "too many positions": with_hidden(lambda hidden: torch.cat([hidden, hidden], dim=1)),
    "no positions": with_hidden(lambda hidden: hidden[:, :0]),
    "more rows": with_hidden(lambda hidden: hidden.repeat(2, 1, 1)),
    "another width": with_hidden(lambda hidden: hidden[..., :-1]),
    "two dimensions": with_hidden(lambda hidden: hidden[0]),
    "another dtype": with_hidden(lambda hidden: hidden.half()),
    "integers": with_hidden(lambda hidden: hidden.long()),
    "nothing at all": about(Output, lambda output: []),
    "another step's number": about(
        Output, lambda output: [output.model_copy(update={"step": output.step + 1000})]
    ),
    "noise": about(Output, lambda output: [b"noise"]),
    "opened again": about(
        Output, lambda output: [Opened(protocol=1, window=1, max_step_tokens=1), output]
    ),
    "no answer to open": about(Opened, lambda opened: []),
    "output before opened": about(
        Opened, lambda opened: [Output(epoch=0, step=0, start=0, hidden=to_frame(torch.ones(1)))]
    ),
    "goodbye": about(Output, lambda output: [Refused(code=ErrorCode.INTERNAL, message="oops")]),
    **{
        f"never has what was before: {code}": about(
            Output, lambda output, code=code: [Refused(code=code, message="no")]
        )
        for code in (ErrorCode.GAP, ErrorCode.CANNOT_REWIND)
    },
    **{
        f"refuses: {code}": about(
            Opened, lambda opened, code=code: [Refused(code=code, message="no")]
        )
        for code in (ErrorCode.BUSY, ErrorCode.UNAUTHORIZED, ErrorCode.DRAINING, ErrorCode.TOO_LONG)
    },
}


def lying(house: House, lie: Lie, hears: Callable[[Message], Message] = truth) -> None:
    """The first server of the house tells lies from now on."""
    handler = house.servers[0].handler

    async def session(stream: Stream) -> None:
        await handler.session(Tampered(stream, lie, hears))

    service = Service(session, handler.push, handler.info)
    house.swarm.on_loop(house.swarm.network.serve, house.servers[0].endpoint, service)


@pytest.fixture(scope="module", params=range(3))
def liars(request: pytest.FixtureRequest) -> Iterator[House]:
    """Two for each span, and in front of those of one a server that will lie."""
    with House(spans=[THIRDS[request.param], *THIRDS, *THIRDS]) as house:
        yield house


IMPATIENT = replace(STEADY, connect=1.0, step=1.0, sync=1.0)


@pytest.mark.parametrize("lie", HARMFUL.values(), ids=HARMFUL)
def test_lies_that_show_are_gone_round(liars: House, lie: Lie) -> None:
    liars.swarm.revive(liars.servers[0])
    lying(liars, lie)
    with liars.twin(timeouts=IMPATIENT) as twin:
        twin.step(5)
        for _ in range(20):  # who keeps but copies back is found out when too many are owed
            twin.step()
            if liars.servers[0].peer_id not in {hop.peer_id for hop in twin.session.hops}:
                break
        assert liars.servers[0].peer_id in liars.swarm.router.banned


def test_who_says_again_and_again_that_it_leaves_is_heard_once(liars: House) -> None:
    liars.swarm.revive(liars.servers[0])
    lying(liars, about(Output, lambda output: [*[Leaving()] * 50, output]))
    openings: list[Message] = []

    def note(*frame: Any) -> bool:
        openings.extend([frame[3]] if isinstance(frame[3], Open) else [])
        return False

    with liars.twin(timeouts=IMPATIENT) as twin:
        liars.swarm.trap(note, asyncio.Event().wait)  # type: ignore[arg-type]
        twin.step(5)
        twin.step()
    assert len(openings) <= 4, "the route, and one to move to"


HARMLESS: dict[str, tuple[Lie, Callable[[Message], Message]]] = {
    "a window of one": (with_fields(Opened, window=1), truth),
    "a huge window": (with_fields(Opened, window=1024), truth),
    "single tokens": (with_fields(Opened, max_step_tokens=1), truth),
    "outputs twice": (about(Output, lambda output: [output, output]), truth),
    "outputs of steps never sent": (
        about(
            Output,
            lambda output: [output.model_copy(update={"step": output.step + 10_000}), output],
        ),
        truth,
    ),
    "synced by itself": (
        about(Output, lambda output: [Synced(epoch=0, position=9, last_step=9), output]),
        truth,
    ),
    "pushes that it does not make": (
        with_fields(Output, pushed=True),
        lambda message: (
            message.model_copy(update={"next": None}) if hasattr(message, "next") else message
        ),
    ),
    "pushes that it says it does not make": (with_fields(Output, pushed=False), truth),
    "failures of pushes that succeed": (
        about(Output, lambda o: [o, PushFailed(epoch=o.epoch, step=o.step, message="alas")]),
        truth,
    ),
}


@pytest.mark.parametrize(("lie", "hears"), HARMLESS.values(), ids=HARMLESS)
def test_lies_that_do_no_harm(liars: House, lie: Lie, hears: Callable[[Message], Message]) -> None:
    liars.swarm.revive(liars.servers[0])
    lying(liars, lie, hears)
    with liars.twin(timeouts=IMPATIENT, chunk_bytes=3 * 4 * 48) as twin:
        twin.step(8)
        for _ in range(3):
            twin.step()


@pytest.mark.parametrize("position", [0, 3, 1 << 20])
@pytest.mark.parametrize("last_step", [-1, 1 << 31])
def test_absurd_positions_after_a_failure(liars: House, position: int, last_step: int) -> None:
    for server in liars.servers:
        liars.swarm.revive(server)
    lying(liars, with_fields(Synced, position=position, last_step=last_step))
    with liars.twin(timeouts=IMPATIENT) as twin:
        twin.step(5)
        route = [hop.peer_id for hop in twin.session.hops]
        twin.kill((route.index(liars.servers[0].peer_id) + 1) % 3)
        twin.step()
        twin.step()
