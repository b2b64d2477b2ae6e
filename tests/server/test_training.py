"""What strangers may ask a server to train, what comes of nonsense, and who goes first."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest
import torch

from swarm.config import ServerLimits
from swarm.errors import ErrorCode
from swarm.messages import Back, Close, Message, Opened, Piece, Refused, Train, Trained
from swarm.messages_training import KEEP, TensorSpec
from swarm.models.spans import Span
from swarm.models.training import Batch as SpanBatch
from swarm.models.training import SpanTraining, Units
from swarm.pieces import Gathering, in_pieces, spec_of
from swarm.tensors import to_frame
from swarm.transport import Stream
from swarm.wire import decode, encode
from tests.inprocess import MODEL, Server
from tests.models import splits
from tests.server.stranger import Stranger, hidden_of
from tests.server.town import Town

HIDDEN = 48


def spec(*shape: int, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


GOOD = {"hidden": spec(2, 5, HIDDEN), "gradient": spec(2, 5, HIDDEN)}


def request(stranger: Stranger, server: Server, **changes: Any) -> Train:
    """Backward through all blocks, but for the changes."""
    session_id = secrets.token_bytes(16)
    blocks = server.record.record.blocks
    fields: dict[str, Any] = {
        "model": MODEL.name,
        "fingerprint": MODEL.fingerprint,
        "dtype": "float32",
        "session_id": session_id,
        "start": blocks.start,
        "end": blocks.end,
        "backward": True,
        "tensors": GOOD,
        "credentials": stranger.credentials(server, session_id),
    }
    return Train(**fields | changes)


async def say(stream: Stream, *messages: Message) -> None:
    for message in messages:
        await stream.send(encode(message))


async def hear(stream: Stream) -> Message:
    frame = await stream.receive()
    assert frame is not None
    return decode(frame)


async def refused(stream: Stream) -> ErrorCode:
    while not isinstance(message := await hear(stream), Refused):
        pass
    return message.code


async def train(stranger: Stranger, server: Server, **tensors: torch.Tensor) -> dict[str, Any]:
    """An honest request, and all of its answer."""
    stream = await stranger.dial(server)
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    backward = "gradient" in tensors
    asked = request(stranger, server, tensors=specs, backward=backward)
    return await exchange(stream, asked, tensors)


async def exchange(
    stream: Stream, asked: Train | Back, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    await say(stream, asked)
    assert isinstance(await hear(stream), Opened)
    await say(stream, *in_pieces(tensors, "none"))
    backward = "gradient" in tensors
    wanted = {"gradient" if backward else "hidden": spec_of(next(iter(tensors.values())))}
    gathering = Gathering(wanted)
    while isinstance(message := await hear(stream), Piece):
        gathering.add(message)
    assert isinstance(message, Trained)
    assert gathering.complete
    return gathering.tensors


async def forth(
    stranger: Stranger, server: Server, hidden: torch.Tensor, **changes: Any
) -> tuple[Stream, torch.Tensor]:
    """Forward, by a stream by which one may go back."""
    stream = await stranger.dial(server)
    changes = {"capabilities": (KEEP,), "backward": False} | changes
    asked = request(stranger, server, tensors={"hidden": spec_of(hidden)}, **changes)
    return stream, (await exchange(stream, asked, {"hidden": hidden}))["hidden"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "another"}, ErrorCode.WRONG_MODEL),
        ({"dtype": "bfloat16"}, ErrorCode.WRONG_MODEL),
        ({"protocol_min": 2, "protocol_max": 9}, ErrorCode.BAD_VERSION),
        ({"session_id": b"another session!"}, ErrorCode.UNAUTHORIZED),
        ({"start": 0, "end": 64}, ErrorCode.BAD_SPAN),
        ({"start": 1, "end": 1}, ErrorCode.BAD_SPAN),
        ({"tensors": {}}, ErrorCode.BAD_TENSOR),
        ({"tensors": {"gradient": spec(2, 5, HIDDEN)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": {"hidden": spec(2, 5, HIDDEN)}}, ErrorCode.BAD_TENSOR),  # no gradient
        ({"backward": False}, ErrorCode.BAD_TENSOR),  # and one too many
        ({"tensors": GOOD | {"hidden": spec(2, 5, HIDDEN + 1)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"hidden": spec(2, 5)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"hidden": spec(0, 5, HIDDEN)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"gradient": spec(2, 6, HIDDEN)}}, ErrorCode.BAD_TENSOR),
        (
            {"tensors": GOOD | {"gradient": spec(2, 5, HIDDEN, dtype="float16")}},
            ErrorCode.BAD_TENSOR,
        ),
        ({"tensors": GOOD | {"weights": spec(2, 5)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"padding": spec(2, 5)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"padding": spec(1, 5, dtype="bool")}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"position_ids": spec(2, 5, 7, dtype="int64")}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"prompts": spec(1, 2, HIDDEN)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": GOOD | {"prompts": spec(2, 6, HIDDEN)}}, ErrorCode.BAD_TENSOR),
        ({"tensors": {k: spec(1 << 10, 1 << 10, HIDDEN) for k in GOOD}}, ErrorCode.OVERSIZE),
        ({"tensors": {k: spec(1, 1 << 20, HIDDEN) for k in GOOD}}, ErrorCode.OVERSIZE),
    ],
)
def test_nonsense_is_refused_before_anything_is_sent(
    town: Town, changes: dict[str, Any], code: ErrorCode
) -> None:
    async def go() -> None:
        stream = await town.stranger.dial(town.server)
        await say(stream, request(town.stranger, town.server, **changes))
        assert await refused(stream) is code
        stream.cancel()

    town.run(go())


@pytest.mark.parametrize(
    "piece",
    [
        Piece(name="nobody", start=0, rows=to_frame(torch.zeros(1, HIDDEN))),
        Piece(name="hidden", start=1, rows=to_frame(torch.zeros(1, HIDDEN))),
        Piece(name="hidden", start=0, rows=to_frame(torch.zeros(11, HIDDEN))),
        Piece(name="hidden", start=0, rows=to_frame(torch.zeros(0, HIDDEN))),
        Piece(name="hidden", start=0, rows=to_frame(torch.zeros(1, HIDDEN - 1))),
        Piece(name="hidden", start=0, rows=to_frame(torch.zeros(HIDDEN))),
        Piece(name="hidden", start=0, rows=to_frame(torch.zeros(1, HIDDEN).half())),
    ],
)
def test_pieces_that_do_not_fit_are_refused(town: Town, piece: Piece) -> None:
    async def go() -> None:
        stream = await town.stranger.dial(town.server)
        await say(stream, request(town.stranger, town.server))
        assert isinstance(await hear(stream), Opened)
        await say(stream, piece)
        assert await refused(stream) is ErrorCode.BAD_TENSOR
        stream.cancel()

    town.run(go())


def test_positions_beyond_all_texts_are_refused(town: Town) -> None:
    async def go() -> None:
        stream = await town.stranger.dial(town.server)
        tensors = {"hidden": torch.zeros(1, 2, HIDDEN), "position_ids": torch.full((1, 2), -1)}
        specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
        asked = request(town.stranger, town.server, tensors=specs, backward=False)
        await say(stream, asked, *in_pieces(tensors, "none"))
        assert await refused(stream) is ErrorCode.BAD_TENSOR
        stream.cancel()

    town.run(go())


def test_who_announces_a_batch_and_vanishes_gives_its_memory_back(town: Town) -> None:
    async def go() -> None:
        streams = [await town.stranger.dial(town.server) for _ in range(3)]
        for stream in streams:
            await say(stream, request(town.stranger, town.server))
            assert isinstance(await hear(stream), Opened)
        desk = town.server.handler._training
        assert desk._admission.promised > 0
        streams[0].cancel()
        await say(streams[1], *in_pieces({"hidden": torch.zeros(2, 5, HIDDEN)}, "none"))
        streams[1].cancel()
        await streams[2].finish()
        while desk._admission.promised:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert len(desk) == 0

    town.run(go())


def test_memory_goes_to_whoever_came_first_and_nobody_waits_for_ever() -> None:
    size = 3 * 2 * 5 * HIDDEN * 4  # of one request: two tensors, and an answer
    limits = ServerLimits(training_bytes=size, training_wait=0.3, send_timeout=2.0)
    with Town(limits=limits) as town:

        async def go() -> None:
            first = await town.stranger.dial(town.server)
            await say(first, request(town.stranger, town.server))
            assert isinstance(await hear(first), Opened)
            other = Stranger(town.swarm, client=94)
            second = await other.dial(town.server)
            await say(second, request(other, town.server))
            assert await refused(second) is ErrorCode.BUSY
            third = await other.dial(town.server)
            await say(third, request(other, town.server))
            first.cancel()
            assert isinstance(await hear(third), Opened)
            third.cancel()

        town.run(go())


def test_who_went_forward_may_go_back_with_the_gradient_alone(town: Town) -> None:
    async def go() -> None:
        hidden = hidden_of(town.local, 5, rows=2)
        stream, output = await forth(town.stranger, town.server, hidden)
        keeping = town.server.handler._training.keeping
        assert keeping.used > 2 * hidden.nbytes
        found = await exchange(stream, Back(), {"gradient": output.sin()})
        assert await stream.receive() is None
        assert keeping.used == 0
        whole = await train(town.stranger, town.server, hidden=hidden, gradient=output.sin())
        torch.testing.assert_close(found["gradient"], whole["gradient"], atol=1e-6, rtol=1e-5)

    town.run(go())


def test_nothing_is_kept_for_who_does_not_ask_for_it_or_is_gone(town: Town) -> None:
    async def go() -> None:
        hidden, keeping = hidden_of(town.local, 5, rows=2), town.server.handler._training.keeping
        stream, _ = await forth(town.stranger, town.server, hidden, capabilities=("more",))
        assert await stream.receive() is None
        assert keeping.used == 0
        leaving, closing, breaking = [
            (await forth(town.stranger, town.server, hidden))[0] for _ in range(3)
        ]
        assert len(keeping) == 3
        await leaving.finish()
        await say(closing, Close())
        breaking.cancel()
        while keeping.used:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    town.run(go())


def test_what_is_said_instead_of_going_back_is_refused(town: Town) -> None:
    async def go() -> None:
        hidden = hidden_of(town.local, 5, rows=2)
        stream, _ = await forth(town.stranger, town.server, hidden)
        await say(stream, *in_pieces({"hidden": hidden}, "none"))
        assert await refused(stream) is ErrorCode.OUT_OF_ORDER
        stream, _ = await forth(town.stranger, town.server, hidden)
        await say(stream, Back())
        assert isinstance(await hear(stream), Opened)
        await say(stream, *in_pieces({"hidden": hidden}, "none"))
        assert await refused(stream) is ErrorCode.BAD_TENSOR

    town.run(go())


def test_who_has_to_make_room_or_waits_too_long_is_told() -> None:
    """There is room for the graphs of one batch."""
    with Town() as other:
        hidden = hidden_of(other.local, 40, rows=2)
        work = other.server.handler._training._work
        other.run(train(other.stranger, other.server, hidden=hidden, gradient=hidden))
        room = work.keeping(SpanBatch(other.local.blocks, hidden)) * 3 // 2
    with Town(limits=ServerLimits(kept_bytes=room, kept_seconds=0.5)) as town:
        desk = town.server.handler._training

        async def go() -> None:
            first, _ = await forth(town.stranger, town.server, hidden)
            second, output = await forth(town.stranger, town.server, hidden)
            assert await refused(first) is ErrorCode.UNKNOWN_SESSION
            await exchange(second, Back(), {"gradient": output})
            third, _ = await forth(town.stranger, town.server, hidden)
            assert await refused(third) is ErrorCode.UNKNOWN_SESSION
            assert await third.receive() is None
            assert desk.keeping.used == 0

        town.run(go())
        town.swarm.assert_quiet()


def test_a_server_that_keeps_nothing_says_so_at_once() -> None:
    with Town(limits=ServerLimits(kept_bytes=0)) as town:

        async def go() -> None:
            stream, _ = await forth(town.stranger, town.server, hidden_of(town.local, 5))
            assert await refused(stream) is ErrorCode.UNKNOWN_SESSION

        town.run(go())


def test_a_batch_of_nan_harms_nobody_else(town: Town) -> None:
    async def go() -> None:
        bad = torch.full((2, 5, HIDDEN), torch.nan)
        good = hidden_of(town.local, 5, rows=2)
        ill, well = await asyncio.gather(
            train(town.stranger, town.server, hidden=bad, gradient=bad),
            train(town.stranger, town.server, hidden=good, gradient=good),
        )
        assert ill["gradient"].isnan().all()
        assert well["gradient"].isfinite().all()

    town.run(go())


def test_steps_of_sessions_go_between_two_blocks(town: Town, monkeypatch: Any) -> None:
    """A long batch has begun; a step comes, and is answered before that is through."""
    events: list[str] = []
    run = SpanTraining.run

    def watched(self: SpanTraining, *given: Any) -> Units:
        result = yield from run(self, *given)
        events.append("trained")
        return result

    monkeypatch.setattr(SpanTraining, "run", watched)

    async def go() -> None:
        talk = await town.stranger.open(town.server, max_length=64)
        await talk.ask(hidden_of(town.local, 4))
        batch = hidden_of(town.local, 60, rows=32)
        training = asyncio.create_task(
            train(town.stranger, town.server, hidden=batch, gradient=batch)
        )
        desk = town.server.handler._training
        while not town.server.executor._trainings:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(4):
            await talk.ask(hidden_of(town.local, 1))
            events.append("step")
        await training
        assert desk.served
        talk.stream.cancel()

    town.run(go())
    assert events == ["step"] * 4 + ["trained"]


def test_graphs_stay_within_their_budget() -> None:
    """The less memory, the more is computed twice; the numbers are the same."""
    span: Span = splits.span("llama")
    hidden = hidden_of(span, 24, rows=4)
    found: list[torch.Tensor] = []
    counts: list[int] = []
    for budget in (1 << 30, 400_000, 150_000):
        work = SpanTraining(span, budget)
        units = work.run(SpanBatch(span.blocks, hidden, gradient=hidden), lambda: 1 << 20)
        held: list[int] = []
        graph = work._graph

        def noted(*given: Any, graph: Any = graph, held: list[int] = held) -> Any:
            made = graph(*given)
            held.append(made[1])
            return made

        work._graph = noted  # type: ignore[method-assign]
        while True:
            try:
                next(units)
            except StopIteration as end:
                found.append(end.value["gradient"])
                break
        assert max(held) <= budget
        counts.append(len(held))
    assert counts[0] == len(span.blocks) < counts[1] <= counts[2]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-4)
    assert not SpanTraining(span, 10_000).fits(24)
