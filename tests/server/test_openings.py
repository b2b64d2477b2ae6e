"""Openings that cannot be get a coded answer, harm nobody else, and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import ErrorCode
from swarm.messages import (
    Attach,
    Close,
    Credentials,
    HandedOver,
    Info,
    InfoRequest,
    Inherit,
    Leaving,
    Load,
    Opened,
    Output,
    PushFailed,
    Redirect,
    Refused,
    Step,
    Sync,
    Synced,
)
from tests.server.stranger import Stranger, Talk, assert_same, expected_of, hidden_of
from tests.server.town import FRAMES, LIMITS, PAGES, Town, frame_of, with_field

OPENINGS: dict[str, tuple[dict[str, Any], ErrorCode]] = {
    "too new": ({"protocol_min": 2, "protocol_max": 3}, ErrorCode.BAD_VERSION),
    "too old": ({"protocol_min": 0, "protocol_max": 0}, ErrorCode.BAD_VERSION),
    "another model": ({"model": "other"}, ErrorCode.WRONG_MODEL),
    "other weights": ({"fingerprint": "0" * 64}, ErrorCode.WRONG_MODEL),
    "another dtype": ({"dtype": "bfloat16"}, ErrorCode.WRONG_MODEL),
    "another quantization": ({"quantization": "int8"}, ErrorCode.WRONG_MODEL),
    "blocks beyond": ({"start": 0, "end": 3}, ErrorCode.BAD_SPAN),
    "blocks elsewhere": ({"start": 2, "end": 4}, ErrorCode.BAD_SPAN),
    "no blocks": ({"start": 1, "end": 1}, ErrorCode.BAD_SPAN),
    "blocks backwards": ({"start": 2, "end": 1}, ErrorCode.BAD_SPAN),
    "never fits": ({"batch_size": 9, "max_length": 65}, ErrorCode.TOO_LONG),
    "largest of all": ({"batch_size": 1024, "max_length": 1 << 20}, ErrorCode.TOO_LONG),
    "does not fit now": ({"batch_size": 8, "max_length": 99}, ErrorCode.BUSY),
}


@pytest.mark.parametrize(("changes", "code"), OPENINGS.values(), ids=OPENINGS)
def test_openings_that_cannot_be(town: Town, changes: dict[str, Any], code: ErrorCode) -> None:
    async def go() -> None:
        opening = town.stranger.opening(town.server, **changes)
        talk = Talk(await town.stranger.dial(town.server), opening)
        await talk.send(opening)
        assert await talk.refusal() is code

    town.run(go())


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("first", [True, False], ids=["as an opening", "as a step"])
def test_frames_that_are_no_messages(town: Town, make: Callable[[Any], bytes], first: bool) -> None:
    async def go() -> None:
        if first:
            opening = town.stranger.opening(town.server)
            talk = Talk(await town.stranger.dial(town.server), opening)
            await talk.stream.send(make(opening))
        else:
            talk = await town.stranger.open(town.server)
            await talk.stream.send(make(talk.step(hidden_of(town.local, 1))))
        assert await talk.refusal() is ErrorCode.BAD_FRAME

    town.run(go())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("session_id",), b"short"),
        (("ticket",), "t" * 16),
        (("batch_size",), 0),
        (("batch_size",), -1),
        (("batch_size",), True),
        (("batch_size",), float("nan")),
        (("batch_size",), 2.0),
        (("max_length",), 1 << 62),
        (("max_length",), None),
        (("start",), -1),
        (("end",), 1 << 40),
        (("fingerprint",), "f" * 65),
        (("model",), "m" * 300),
        (("dtype",), "float64"),
        (("capabilities",), ["x"] * 33),
        (("next",), {"record": b"r" * 2000, "session_id": b"s" * 16, "ticket": b"t" * 16}),
        (("credentials", "signature"), b"x" * 700),
        (("priority",), 10),
    ],
)
def test_fields_of_openings_that_cannot_be(town: Town, path: tuple[str, ...], value: Any) -> None:
    async def go() -> None:
        opening = town.stranger.opening(town.server)
        talk = Talk(await town.stranger.dial(town.server), opening)
        await talk.stream.send(with_field(opening, *path, value=value))
        assert await talk.refusal() is ErrorCode.BAD_FRAME

    town.run(go())


def test_an_opening_waits_for_its_turn() -> None:
    with Town(replace(LIMITS, kv_wait=30.0)) as town:

        async def go() -> None:
            first = await town.stranger.open(town.server, batch_size=PAGES)
            other = Stranger(town.swarm, client=96)
            opening = other.opening(town.server)
            talk = Talk(await other.dial(town.server), opening)
            await talk.send(opening)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(town.server.handler._admission) == 2
            assert town.server.handler.load().free_tokens == 0
            await first.send(Close())
            assert isinstance(await talk.receive(), Opened)
            text = hidden_of(town.local, 3)
            assert_same(await talk.ask(text), expected_of(town.local, text))
            talk.stream.cancel()

        town.run(go())
        town.swarm.assert_quiet()


# Order -------------------------------------------------------------------------------------------

OUT_OF_ORDER: dict[str, Any] = {
    "sync": Sync(epoch=0),
    "redirect": Redirect(),
    "close": Close(),
    "attach": Attach(session_id=b"s" * 16, ticket=b"t" * 16),
    "output": Output(epoch=0, step=0, start=0, hidden=frame_of((1, 1, 1))),
    "synced": Synced(epoch=0, position=0, last_step=0),
    "push_failed": PushFailed(epoch=0, step=0, message=""),
    "leaving": Leaving(),
    "handed_over": HandedOver(position=0),
    "inherit": Inherit(length=1),
    "refused": Refused(code=ErrorCode.BUSY, message=""),
    "info": Info(record=b"r", load=Load()),
    "opened": Opened(protocol=1, window=1, max_step_tokens=1),
    "info_request": InfoRequest(
        nonce=b"n" * 16, credentials=Credentials(public_key=b"k", signature=b"s")
    ),
    "step": Step(epoch=0, step=0, start=0, hidden=frame_of((1, 1, 48))),
}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *(("session", kind) for kind in OUT_OF_ORDER),
        *(("push", kind) for kind in [*OUT_OF_ORDER, "open"] if kind != "attach"),
    ],
)
def test_the_first_message_must_say_what_is_wanted(town: Town, method: str, kind: str) -> None:
    async def go() -> None:
        opening = town.stranger.opening(town.server)
        talk = Talk(await town.stranger.dial(town.server, method), opening)
        await talk.send(OUT_OF_ORDER.get(kind, opening))
        assert await talk.refusal() is ErrorCode.OUT_OF_ORDER

    town.run(go())


@pytest.mark.parametrize(
    "kind", sorted({*OUT_OF_ORDER, "open"} - {"step", "sync", "redirect", "close"})
)
def test_messages_that_no_client_may_send_later(town: Town, kind: str) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        await talk.send(OUT_OF_ORDER.get(kind, talk.opening))
        assert await talk.refusal() is ErrorCode.OUT_OF_ORDER

    town.run(go())


def test_a_session_cannot_be_opened_twice(town: Town) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        again = Talk(await town.stranger.dial(town.server), talk.opening)
        await again.send(talk.opening)
        assert await again.refusal() is ErrorCode.OUT_OF_ORDER
        text = hidden_of(town.local, 3)
        assert_same(await talk.ask(text), expected_of(town.local, text))
        talk.stream.cancel()

    town.run(go())


def test_only_so_many_sessions_and_half_of_them_for_one_client(town: Town) -> None:
    async def go() -> None:
        talks: list[Talk] = []
        for client, count in ((97, LIMITS.max_sessions // 2), (95, LIMITS.max_sessions // 2 - 1)):
            stranger = Stranger(town.swarm, client=client)
            for _ in range(count):
                talks.append(await stranger.open(town.server, max_length=1))
            opening = stranger.opening(town.server, max_length=1)
            talk = Talk(await stranger.dial(town.server), opening)
            await talk.send(opening)
            assert await talk.refusal() is ErrorCode.BUSY
        for talk in talks:
            await talk.stream.finish()
            assert await talk.stream.receive() is None

    town.run(go())
