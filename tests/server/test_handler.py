"""Strangers' bad input gets a coded answer, harms nobody else, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch

from swarm.config import ServerLimits
from swarm.errors import ErrorCode, PeerUnavailable
from swarm.identity import SwarmKey
from swarm.messages import (
    Attach,
    Close,
    Info,
    InfoRequest,
    Load,
    Output,
    PushFailed,
    Redirect,
    Refused,
    Step,
    Sync,
    Synced,
    TensorFrame,
)
from swarm.models.spans import Span, SpanCache
from swarm.server.session import Session
from swarm.tensors import from_frame
from swarm.wire import decode, encode, pack
from tests.inprocess import InProcessSwarm, span_of
from tests.models.tiny import tiny_model
from tests.server.stranger import Stranger, Talk, assert_same, expected_of, hidden_of

LIMITS = ServerLimits(kv_tokens=1000, max_sessions=6, max_step_tokens=40, send_timeout=5.0)
TIMEOUT = 60.0


class Town:
    """Two servers, a span like theirs for comparison, and a stranger."""

    def __init__(self, limits: ServerLimits = LIMITS, key: SwarmKey | None = None) -> None:
        model = tiny_model("llama")
        self.local: Span = span_of(model, 0, 2)
        self.swarm = InProcessSwarm(limits=limits, swarm_key=key)
        self.server = self.swarm.add(span_of(model, 0, 2))
        self.next = self.swarm.add(span_of(model, 2, 4))
        self.stranger = Stranger(self.swarm, key=key)

    def __enter__(self) -> Town:
        return self

    def __exit__(self, *_: object) -> None:
        self.swarm.__exit__()

    def run(self, body: Coroutine[Any, Any, Any]) -> Any:
        return self.swarm.loop.call(body, timeout=TIMEOUT)

    async def honest(self) -> None:
        """A session as it should be still works."""
        text = hidden_of(self.local, 5)
        talk = await self.stranger.open(self.server)
        assert_same(await talk.ask(text), expected_of(self.local, text))
        await talk.send(Close())
        assert await talk.stream.receive() is None


@pytest.fixture(scope="module")
def shared() -> Iterator[Town]:
    with Town() as town:
        yield town


@pytest.fixture
def town(shared: Town) -> Iterator[Town]:
    """Somebody else's session goes on whatever a test does, and all memory comes back."""
    text = hidden_of(shared.local, 6, seed=7)
    bystander: Talk = shared.run(Stranger(shared.swarm, client=96).open(shared.server))
    shared.run(bystander.ask(text[:, :4]))
    yield shared
    got = shared.run(bystander.ask(text[:, 4:]))
    assert_same(got, expected_of(shared.local, text[:, :4], text[:, 4:]))
    shared.swarm.on_loop(bystander.stream.cancel)
    shared.run(shared.honest())
    shared.swarm.assert_quiet()


def with_field(message: Any, *path: str, value: Any) -> bytes:
    """The message's frame with one field changed past all checks."""
    fields = message.model_dump(exclude_defaults=True) | {"kind": message.kind}
    place = fields
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return pack(fields)


def frame_of(shape: tuple[int, ...], dtype: Any = "float32", data: bytes | None = None) -> Any:
    sizes = {"float32": 4, "float16": 2, "int64": 8, "bool": 1, "bfloat16": 2}
    count = 1
    for extent in shape:
        count *= extent
    return TensorFrame(dtype=dtype, shape=shape, data=data or bytes(count * sizes[dtype]))


# Openings ----------------------------------------------------------------------------------------

OPENINGS: dict[str, tuple[dict[str, Any], ErrorCode]] = {
    "too new": ({"protocol_min": 2, "protocol_max": 3}, ErrorCode.BAD_VERSION),
    "too old": ({"protocol_min": 0, "protocol_max": 0}, ErrorCode.BAD_VERSION),
    "another model": ({"model": "other"}, ErrorCode.WRONG_MODEL),
    "other weights": ({"fingerprint": "0" * 64}, ErrorCode.WRONG_MODEL),
    "another dtype": ({"dtype": "bfloat16"}, ErrorCode.WRONG_MODEL),
    "another quantization": ({"quantization": "int8"}, ErrorCode.WRONG_MODEL),
    "another codec": ({"codec": "zip"}, ErrorCode.WRONG_MODEL),
    "blocks beyond": ({"start": 0, "end": 3}, ErrorCode.BAD_SPAN),
    "blocks elsewhere": ({"start": 2, "end": 4}, ErrorCode.BAD_SPAN),
    "no blocks": ({"start": 1, "end": 1}, ErrorCode.BAD_SPAN),
    "blocks backwards": ({"start": 2, "end": 1}, ErrorCode.BAD_SPAN),
    "never fits": ({"batch_size": 10, "max_length": 101}, ErrorCode.TOO_LONG),
    "largest of all": ({"batch_size": 1024, "max_length": 1 << 20}, ErrorCode.TOO_LONG),
    "does not fit now": ({"batch_size": 10, "max_length": 99}, ErrorCode.BUSY),
}


@pytest.mark.parametrize(("changes", "code"), OPENINGS.values(), ids=OPENINGS)
def test_openings_that_cannot_be(town: Town, changes: dict[str, Any], code: ErrorCode) -> None:
    async def go() -> None:
        opening = town.stranger.opening(town.server, **changes)
        talk = Talk(await town.stranger.dial(town.server), opening)
        await talk.send(opening)
        assert await talk.refusal() is code

    town.run(go())


FRAMES: dict[str, Callable[[Any], bytes]] = {
    "nothing": lambda m: b"",
    "noise": lambda m: b"\xc1 this is not msgpack",
    "truncated": lambda m: encode(m)[:-9],
    "with a tail": lambda m: encode(m) + b"\x00",
    "a number": lambda m: pack(7),
    "a list": lambda m: pack([1, 2]),
    "of no kind": lambda m: pack({"epoch": 0}),
    "of an unknown kind": lambda m: with_field(m, "kind", value="sudo"),
    "a kind that is a list": lambda m: with_field(m, "kind", value=["step"]),
    "with one field more": lambda m: with_field(m, "metadata", value={}),
    "with an extension type": lambda m: pack({"kind": msgpack.ExtType(1, b"x")}),
    "deeper than anybody needs": lambda m: b"\x91" * 5000 + b"\xc0",
    "a million empty lists": lambda m: b"\xdd\x00\x10\x00\x00" + b"\x90" * (1 << 20),
    "announcing huge bytes": lambda m: b"\x81\xa4kind\xc6\xff\xff\xff\xff",
    "announcing a huge list": lambda m: b"\x81\xa4kind\xdd\xff\xff\xff\xff",
}


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


# Order -------------------------------------------------------------------------------------------

OUT_OF_ORDER: dict[str, Any] = {
    "sync": Sync(epoch=0),
    "redirect": Redirect(),
    "close": Close(),
    "attach": Attach(session_id=b"s" * 16, ticket=b"t" * 16),
    "output": Output(epoch=0, step=0, start=0, hidden=frame_of((1, 1, 1))),
    "synced": Synced(epoch=0, position=0, last_step=0),
    "push_failed": PushFailed(epoch=0, step=0, message=""),
    "refused": Refused(code=ErrorCode.BUSY, message=""),
    "info": Info(record=b"r", load=Load()),
    "step": Step(epoch=0, step=0, start=0, hidden=frame_of((1, 1, 48))),
}


@pytest.mark.parametrize("message", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
@pytest.mark.parametrize("method", ["session", "push"])
def test_the_first_message_must_say_what_is_wanted(town: Town, message: Any, method: str) -> None:
    if (method, message.kind) == ("push", "attach"):
        return

    async def go() -> None:
        stream = await town.stranger.dial(town.server, method)
        await stream.send(encode(message))
        assert await Talk(stream, town.stranger.opening(town.server)).refusal() in (
            ErrorCode.OUT_OF_ORDER,
        )

    town.run(go())


@pytest.mark.parametrize(
    "kind", ["attach", "output", "synced", "push_failed", "refused", "info", "open"]
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


def test_only_so_many_sessions(town: Town) -> None:
    async def go() -> None:
        talks = [
            await town.stranger.open(town.server, max_length=1)
            for _ in range(LIMITS.max_sessions - 1)
        ]
        opening = town.stranger.opening(town.server)
        talk = Talk(await town.stranger.dial(town.server), opening)
        await talk.send(opening)
        assert await talk.refusal() is ErrorCode.BUSY
        for talk in talks:
            await talk.stream.finish()
            assert await talk.stream.receive() is None

    town.run(go())


# Steps -------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[dict[str, Any], ErrorCode]] = {
    "a gap": ({"start": 5}, ErrorCode.GAP),
    "an overlap": ({"start": 2}, ErrorCode.GAP),
    "a crop to what is not there": ({"start": 9, "crop_to": 9, "epoch": 1}, ErrorCode.GAP),
    "a crop within an epoch": ({"start": 2, "crop_to": 2}, ErrorCode.OUT_OF_ORDER),
    "beyond the reservation": ({"hidden": frame_of((2, 7, 48))}, ErrorCode.TOO_LONG),
    "too many tokens": ({"hidden": frame_of((2, 21, 48))}, ErrorCode.OVERSIZE),
    "another width": ({"hidden": frame_of((2, 1, 47))}, ErrorCode.BAD_TENSOR),
    "another batch": ({"hidden": frame_of((3, 1, 48))}, ErrorCode.BAD_TENSOR),
    "too few dimensions": ({"hidden": frame_of((96,))}, ErrorCode.BAD_TENSOR),
    "too many dimensions": ({"hidden": frame_of((2, 1, 48, 1))}, ErrorCode.BAD_TENSOR),
    "another dtype": ({"hidden": frame_of((2, 1, 48), "bfloat16")}, ErrorCode.BAD_TENSOR),
    "integers": ({"hidden": frame_of((2, 1, 48), "int64")}, ErrorCode.BAD_TENSOR),
    "rows that are not there": ({"reorder": (0, 2)}, ErrorCode.BAD_TENSOR),
    "too few rows": ({"reorder": (0,)}, ErrorCode.BAD_TENSOR),
    "too many rows": ({"reorder": (0, 1, 1)}, ErrorCode.BAD_TENSOR),
    "an unknown input": ({"inputs": {"mask": frame_of((2, 1), "bool")}}, ErrorCode.BAD_TENSOR),
    "a path as an input": ({"inputs": {"../x": frame_of((2, 1), "bool")}}, ErrorCode.BAD_TENSOR),
    "padding in floats": ({"inputs": {"padding": frame_of((2, 1))}}, ErrorCode.BAD_TENSOR),
    "padding too long": ({"inputs": {"padding": frame_of((2, 9), "bool")}}, ErrorCode.BAD_TENSOR),
    "positions below zero": (
        {"inputs": {"position_ids": frame_of((2, 1), "int64", b"\xff" * 16)}},
        ErrorCode.BAD_TENSOR,
    ),
    "positions beyond all": (
        {"inputs": {"position_ids": frame_of((2, 1), "int64", b"\xff" * 7 + b"\x7f" + bytes(8))}},
        ErrorCode.BAD_TENSOR,
    ),
    "positions with odd planes": (
        {"inputs": {"position_ids": frame_of((2, 1, 7), "int64")}},
        ErrorCode.BAD_TENSOR,
    ),
}


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


# Who may come in ---------------------------------------------------------------------------------


async def refused_code(talk: Talk, opening: Any) -> ErrorCode:
    await talk.send(opening)
    return await talk.refusal()


def test_proofs_are_good_for_one_opening_by_one_key_at_one_server(town: Town) -> None:
    async def go() -> None:
        ours, other = town.stranger, Stranger(town.swarm, client=95)
        fresh = ours.opening(town.server)
        forged = fresh.credentials.model_copy(
            update={"public_key": other.access.identity.public_key}
        )
        for opening in [
            fresh.model_copy(update={"credentials": forged}),
            fresh.model_copy(update={"session_id": b"another session!"}),
            ours.opening(town.next, start=0, end=2),  # replayed to another server
            fresh.model_copy(
                update={"credentials": fresh.credentials.model_copy(update={"signature": b""})}
            ),
            fresh.model_copy(
                update={"credentials": fresh.credentials.model_copy(update={"public_key": b"k"})}
            ),
        ]:
            talk = Talk(await ours.dial(town.server), opening)
            assert await refused_code(talk, opening) is ErrorCode.UNAUTHORIZED

    town.run(go())


def test_without_the_swarm_key_nobody_comes_in() -> None:
    key = SwarmKey.generate()
    with Town(key=key) as town:

        async def go() -> None:
            for wrong in (None, SwarmKey.generate()):
                outsider = Stranger(town.swarm, client=95, key=wrong)
                opening = outsider.opening(town.server)
                talk = Talk(await outsider.dial(town.server), opening)
                assert await refused_code(talk, opening) is ErrorCode.UNAUTHORIZED
                request = InfoRequest(
                    nonce=b"n" * 16, credentials=outsider.credentials(town.server, b"n" * 16)
                )
                answer = await outsider.transport.call(
                    town.server.endpoint, "info", encode(request), 5.0
                )
                message = decode(answer)
                assert isinstance(message, Refused)
                assert message.code is ErrorCode.UNAUTHORIZED
            await town.honest()

        town.run(go())
        town.swarm.assert_quiet()


@pytest.mark.parametrize("frame", [b"", b"noise", encode(Close())])
def test_bad_questions_are_answered(town: Town, frame: bytes) -> None:
    transport = town.stranger.transport
    answer = town.run(transport.call(town.server.endpoint, "info", frame, 5.0))
    assert isinstance(decode(answer), Refused)


def test_anybody_may_ask_what_a_server_has_done(town: Town) -> None:
    nonce = b"n" * 16
    request = InfoRequest(nonce=nonce, credentials=town.stranger.credentials(town.server, nonce))
    transport = town.stranger.transport
    answer = decode(town.run(transport.call(town.server.endpoint, "info", encode(request), 5.0)))
    assert isinstance(answer, Info)
    assert answer.record == town.server.record.data
    assert answer.counters["open_sessions"] == 1
    assert answer.counters["sessions"] >= 1
    assert answer.load.free_tokens == LIMITS.kv_tokens - 64


# Patience ----------------------------------------------------------------------------------------


def alone(**limits: Any) -> Town:
    return Town(replace(LIMITS, **limits))


async def flood(town: Town, talk: Talk, steps: int) -> None:
    for _ in range(steps):
        await talk.send(talk.step(hidden_of(town.local, 0)))


def test_a_stream_that_never_says_what_it_wants_is_closed() -> None:
    with alone(open_timeout=0.05) as town:

        async def go() -> None:
            for method in ("session", "push"):
                stream = await town.stranger.dial(town.server, method)
                talk = Talk(stream, town.stranger.opening(town.server))
                assert await talk.refusal() is ErrorCode.DEADLINE
            await town.honest()

        town.run(go())
        town.swarm.assert_quiet()


def test_a_session_that_is_never_used_is_closed() -> None:
    with alone(idle_timeout=0.2) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            assert await talk.refusal() is ErrorCode.DEADLINE

        town.run(go())
        town.swarm.assert_quiet()


def test_a_session_that_is_only_pushed_to_is_used() -> None:
    with alone(idle_timeout=1.0) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            stream = await town.stranger.attach(town.server, *talk.target)
            end = asyncio.get_running_loop().time() + 2.0
            while asyncio.get_running_loop().time() < end:
                await stream.send(encode(talk.step(hidden_of(town.local, 0))))
                assert isinstance(await talk.receive(), Output)
                await asyncio.sleep(0.05)
            assert await talk.refusal() is ErrorCode.DEADLINE

        town.run(go())
        town.swarm.assert_quiet()


def test_a_client_that_does_not_read_loses_its_session_only() -> None:
    with alone(send_timeout=0.3) as town:

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            with pytest.raises(PeerUnavailable):
                await flood(town, talk, 1 << 30)
            await town.honest()

        town.run(go())
        town.swarm.assert_quiet()


def test_a_flood_of_steps_is_not_taken_in() -> None:
    """While the device is busy, a server holds no more steps than its queues have room for."""
    with alone(window=4, send_timeout=30.0) as town:
        gate = asyncio.Event()
        executor, submit = town.server.executor, town.server.executor.submit

        async def held(work: Any) -> Any:
            await gate.wait()
            return await submit(work)

        executor.submit = held  # type: ignore[method-assign]

        async def go() -> None:
            talk = await town.stranger.open(town.server)
            link = (town.stranger.name, town.server.peer_id, "session")
            before, flooding = (
                town.swarm.network.frames[link],
                asyncio.create_task(flood(town, talk, 60)),
            )
            taken = -1
            while taken != town.swarm.network.frames[link]:
                taken = town.swarm.network.frames[link]
                for _ in range(200):
                    await asyncio.sleep(0)
            session = town.server.handler._sessions[talk.opening.session_id][1]
            assert session._inbox.qsize() == session._inbox.maxsize == 8
            assert taken - before <= 8 + 2 + town.swarm.network.buffer_frames
            gate.set()
            for _ in range(60):
                assert isinstance(await talk.receive(), Output)
            await flooding
            talk.stream.cancel()

        town.run(go())
        town.swarm.assert_quiet()


def test_a_step_that_is_not_ready_in_time_is_given_up(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(work: Any) -> Any:
        await asyncio.Event().wait()

    async def go() -> None:
        talk = await town.stranger.open(town.server)
        with monkeypatch.context() as patched:
            patched.setattr(town.server.executor, "submit", never)
            await talk.send(talk.step(hidden_of(town.local, 1), deadline_ms=20))
            assert await talk.refusal() is ErrorCode.DEADLINE

    town.run(go())


def test_a_server_that_leaves_admits_nobody_and_says_so(town: Town) -> None:
    async def go() -> None:
        opening = town.stranger.opening(town.server)
        talk = Talk(await town.stranger.dial(town.server), opening)
        town.server.handler.draining = True
        assert await refused_code(talk, opening) is ErrorCode.DRAINING
        town.server.handler.draining = False

    town.run(go())


def test_memory_does_not_grow(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    """Every kind of bad frame, again and again."""
    caplog.set_level(logging.CRITICAL, logger="swarm")  # what pytest captures, it keeps

    async def bad(send: Callable[[Talk], Awaitable[None]]) -> None:
        talk = await town.stranger.open(town.server, batch_size=2, max_length=10)
        await send(talk)
        await talk.refusal()

    async def once() -> None:
        for changes, _ in STEPS.values():
            step = Step(epoch=0, step=0, start=1, hidden=frame_of((2, 1, 48)))
            step = step.model_copy(update=changes)
            await bad(lambda talk, step=step: talk.send(step))
        for make in FRAMES.values():
            frame = make(Close())
            await bad(lambda talk, frame=frame: talk.stream.send(frame))

    def held() -> int:
        gc.collect()
        return sum(type(thing) in (Session, SpanCache) for thing in gc.get_objects())

    town.run(once())
    before = held()
    tracemalloc.start()
    try:
        town.run(once())
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            town.run(once())
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - first
    finally:
        tracemalloc.stop()
    assert held() <= before
    assert grown < 100_000
