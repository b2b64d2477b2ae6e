"""Steps and pushes that cannot be get a coded answer, and harm no session but their own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from swarm.errors import ErrorCode, PeerUnavailable
from swarm.messages import (
    Close,
    Output,
    Refused,
    Sync,
    Synced,
)
from swarm.tensors import from_frame
from swarm.wire import decode, encode
from tests.server.stranger import assert_same, expected_of, hidden_of
from tests.server.town import STEPS, Town, with_field


@pytest.mark.parametrize(("changes", "code"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("pushed", [False, True], ids=["sent", "pushed"])
def test_steps_that_cannot_be(
    town: Town, changes: dict[str, Any], code: ErrorCode, pushed: bool
) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server, batch_size=2, max_length=10)
        await talk.ask(hidden_of(town.local, 4, rows=2))
        hidden = changes.get("hidden")
        step = talk.step(hidden_of(town.local, 1, rows=2))
        step = step.model_copy(update=changes | ({} if hidden is None else {"hidden": hidden}))
        if pushed:
            stream = await town.stranger.attach(town.server, *talk.target)
            await stream.send(encode(step))
        else:
            await talk.send(step)
        assert await talk.refusal() is code

    town.run(go())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("epoch",), -1),
        (("epoch",), float("nan")),
        (("step",), 1 << 63),
        (("step",), "1"),
        (("start",), 1 << 21),
        (("deadline_ms",), 0),
        (("deadline_ms",), float("inf")),
        (("push",), 1),
        (("reorder",), []),
        (("reorder",), [-1]),
        (("reorder",), [0] * 2000),
        (("hidden",), None),
        (("hidden", "codec"), "zip"),
        (("hidden", "codec"), "mxint8"),  # of another length
        (("hidden", "shape"), [1, 2, 48]),
        (("hidden", "shape"), [-1, -1, 48]),
        (("hidden", "shape"), [1 << 24] * 5),
        (("hidden", "shape"), []),
        (("hidden", "shape"), [1, 1.0, 48]),
        (("hidden", "dtype"), "complex64"),
        (("hidden", "data"), b""),
        (("inputs",), {str(i): {} for i in range(9)}),
    ],
)
def test_fields_of_steps_that_cannot_be(town: Town, path: tuple[str, ...], value: Any) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        step = talk.step(hidden_of(town.local, 1))
        await talk.stream.send(with_field(step, *path, value=value))
        assert await talk.refusal() is ErrorCode.BAD_FRAME

    town.run(go())


def test_an_older_epoch_cannot_be_synced(town: Town) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        await talk.send(Sync(epoch=4))
        assert await talk.receive() == Synced(epoch=4, position=0, last_step=-1)
        await talk.send(Sync(epoch=3))
        assert await talk.refusal() is ErrorCode.OUT_OF_ORDER

    town.run(go())


def test_answers_given_before_a_refusal_still_arrive(town: Town) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        for _ in range(3):
            await talk.send(talk.step(hidden_of(town.local, 2)))
        await talk.send(talk.step(hidden_of(town.local, 1), start=60))
        for _ in range(3):
            assert isinstance(await talk.receive(), Output)
        assert await talk.refusal() is ErrorCode.GAP

    town.run(go())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_values_that_are_no_numbers_stay_in_their_session(town: Town, value: float) -> None:
    """They share passes with the sessions of others."""

    async def go() -> None:
        text = hidden_of(town.local, 12)
        poison, honest = (
            await town.stranger.open(town.server),
            await town.stranger.open(town.server),
        )
        outputs: list[torch.Tensor] = []
        for position in range(12):
            await poison.send(poison.step(torch.full((1, 1, town.local.hidden_size), value)))
            await honest.send(honest.step(text[:, position : position + 1]))
            await poison.receive()
            output = await honest.receive()
            assert isinstance(output, Output)
            outputs.append(from_frame(output.hidden))
        assert_same(torch.cat(outputs, dim=1), expected_of(town.local, text))
        for talk in (poison, honest):
            talk.stream.cancel()

    town.run(go())


def test_repeated_late_and_empty_steps(town: Town) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        text = hidden_of(town.local, 6)
        first = talk.step(text[:, :4], epoch=2)
        await talk.send(first)
        once = await talk.receive()
        stream = await town.stranger.attach(town.server, *talk.target)
        await stream.send(encode(first))
        assert await talk.receive() == once  # from the last kept reply
        for late in (first.model_copy(update={"epoch": 1}), talk.step(text[:, :1], epoch=1)):
            await stream.send(encode(late))
            await talk.send(late)
        talk.position = 4
        empty = await talk.ask(text[:, :0], epoch=2)
        assert empty.shape == (1, 0, town.local.hidden_size)
        got = await talk.ask(text[:, 4:], epoch=2)
        assert_same(got, expected_of(town.local, text[:, :4], text[:, 4:]))
        stream.cancel()
        talk.stream.cancel()

    town.run(go())


def test_tokens_of_several_sessions_are_computed_in_one_pass(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a pass runs, others get ready; then the next pass takes all of them."""
    gate, begun = threading.Event(), threading.Event()
    span = town.server.handler._span
    run, passes = span.run, list[int]()

    def held(steps: Any) -> Any:
        begun.set()
        assert gate.wait(30)
        passes.append(len(steps))
        return run(steps)

    async def go() -> None:
        talks = [await town.stranger.open(town.server) for _ in range(3)]
        first, *others = talks
        token = hidden_of(town.local, 1)
        with monkeypatch.context() as patched:
            patched.setattr(span, "run", held)
            await first.send(first.step(token))
            await asyncio.to_thread(begun.wait, 30)
            for talk in others:
                await talk.send(talk.step(token))
            while town.server.handler.load().queue < 3:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # the last one goes to the device after this round of the loop
            gate.set()
            for talk in talks:
                output = await talk.receive()
                assert isinstance(output, Output)
                assert_same(from_frame(output.hidden), expected_of(town.local, token))
                talk.stream.cancel()
        assert passes == [1, 2]

    town.run(go())


# Pushing -----------------------------------------------------------------------------------------


def test_a_wrong_ticket_and_an_unknown_session_look_the_same(town: Town) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        session_id, ticket = talk.target
        closed = await town.stranger.open(town.server)
        closed.stream.cancel()
        while len(town.server.handler._sessions) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        answers: list[Any] = []
        for target in [
            (session_id, b"x" * 16),
            (session_id[:-1] + b"\x00", ticket),
            (bytes(16), bytes(16)),
            closed.target,
        ]:
            stream = await town.stranger.attach(town.server, *target)
            frame = await stream.receive()
            assert frame is not None
            answers.append(decode(frame))
            assert await stream.receive() is None
        assert answers[0].code is ErrorCode.UNKNOWN_SESSION
        assert all(answer == answers[0] for answer in answers)
        text = hidden_of(town.local, 3)
        assert_same(await talk.ask(text), expected_of(town.local, text))
        talk.stream.cancel()

    town.run(go())


def test_a_push_stream_ends_with_its_session(town: Town) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        old = await town.stranger.attach(town.server, *talk.target)
        await old.send(encode(talk.step(hidden_of(town.local, 1))))
        assert isinstance(await talk.receive(), Output)
        new = await town.stranger.attach(town.server, *talk.target)
        with pytest.raises(PeerUnavailable):  # there is only one hop before
            await old.receive()
        await talk.send(Close())
        assert await talk.stream.receive() is None
        with pytest.raises(PeerUnavailable):
            await new.receive()

    town.run(go())


@pytest.mark.parametrize("frame", [b"noise", encode(Sync(epoch=1)), encode(Close())])
def test_bad_frames_on_a_push_stream_do_not_harm_the_session(town: Town, frame: bytes) -> None:
    async def go() -> None:
        talk = await town.stranger.open(town.server)
        stream = await town.stranger.attach(town.server, *talk.target)
        await stream.send(frame)
        assert isinstance(decode(await stream.receive() or b""), Refused)
        text = hidden_of(town.local, 3)
        assert_same(await talk.ask(text), expected_of(town.local, text))
        talk.stream.cancel()

    town.run(go())
