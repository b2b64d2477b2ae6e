"""What may come when, and what a step means: every entry of every table, every line of judgment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ErrorCode, RemoteProtocolError
from swarm.messages import (
    Attach,
    Back,
    Bundle,
    Close,
    Credentials,
    HandedOver,
    HandOver,
    Heritage,
    Info,
    InfoRequest,
    Inherit,
    Leaving,
    Lend,
    Lent,
    Load,
    Message,
    Open,
    Opened,
    Output,
    Piece,
    PushFailed,
    PushTarget,
    Redirect,
    Refused,
    Step,
    Sync,
    Synced,
    TensorFrame,
    Train,
    Trained,
)
from swarm.messages_training import BundleSpec
from swarm.protocol import (
    LENDING,
    LOANS,
    PUSH,
    REPLIES,
    SESSION,
    TRAINED,
    TRAINING,
    Conversation,
    Ledger,
    Phase,
    Table,
    Verdict,
    agree_on_version,
)

BATCH, HIDDEN = 2, 4


def tensor(*shape: int, dtype: Any = "float32", size: int = 4) -> TensorFrame:
    count = 1
    for extent in shape:
        count *= extent
    return TensorFrame(dtype=dtype, shape=shape, data=bytes(count * size))


def step(start: int = 0, tokens: int = 1, **fields: Any) -> Step:
    fields = {"epoch": 0, "step": 0, "hidden": tensor(BATCH, tokens, HIDDEN)} | fields
    return Step(start=start, **fields)


def opening(**fields: Any) -> Open:
    fields = {
        "model": "m",
        "fingerprint": "0" * 64,
        "dtype": "float32",
        "session_id": b"s" * 16,
        "ticket": b"t" * 16,
        "start": 0,
        "end": 1,
        "batch_size": 1,
        "max_length": 1,
        "credentials": Credentials(public_key=b"", signature=b""),
    } | fields
    return Open(**fields)


def ledger(**fields: Any) -> Ledger:
    fields = {"max_length": 32, "max_step_tokens": 24} | fields
    return Ledger(batch_size=BATCH, hidden_size=HIDDEN, dtype="float32", **fields)


MESSAGES: list[Message] = [
    opening(),
    Opened(protocol=1, window=1, max_step_tokens=1),
    step(),
    Output(epoch=0, step=0, start=0, hidden=tensor(1, 1, 1)),
    Sync(epoch=0),
    Synced(epoch=0, position=0, last_step=-1),
    Redirect(),
    PushFailed(epoch=0, step=0, message=""),
    Leaving(),
    HandOver(next=PushTarget(record=b"r", session_id=b"s" * 16, ticket=b"t" * 16)),
    HandedOver(position=0),
    Inherit(length=1),
    Heritage(layer=0, start=0, keys=tensor(1, 1, 1, 1), values=tensor(1, 1, 1, 1)),
    Close(),
    Attach(session_id=b"s" * 16, ticket=b"t" * 16),
    Refused(code=ErrorCode.BUSY, message=""),
    Train(
        model="m",
        fingerprint="0" * 64,
        dtype="float32",
        session_id=b"s" * 16,
        start=0,
        end=1,
        tensors={},
        credentials=Credentials(public_key=b"", signature=b""),
    ),
    Lend(
        model="m",
        fingerprint="0" * 64,
        dtype="float32",
        session_id=b"s" * 16,
        start=0,
        end=1,
        bundles=(BundleSpec(block=0, digest=b"d" * 32, size=1),),
        credentials=Credentials(public_key=b"", signature=b""),
    ),
    Lent(),
    Bundle(block=0, start=0, data=b"x"),
    Piece(name="hidden", start=0, rows=tensor(1, 1)),
    Trained(),
    Back(),
    InfoRequest(nonce=b"n" * 16, credentials=Credentials(public_key=b"", signature=b"")),
    Info(record=b"r", load=Load()),
]


def paths_to(table: Table) -> dict[Phase, list[type[Message]]]:
    """For each phase that can be reached, messages that lead there."""
    paths: dict[Phase, list[type[Message]]] = {Phase.NEW: []}
    for phase in (Phase.NEW, Phase.OPEN):
        for cls, after in table[phase].items():
            if phase in paths:
                paths.setdefault(after, [*paths[phase], cls])
    return paths


@pytest.mark.parametrize(
    "table",
    [SESSION, REPLIES, PUSH, TRAINING, TRAINED, LENDING, LOANS],
    ids=["session", "replies", "push", "training", "trained", "lending", "loans"],
)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_every_message_in_every_phase(table: Table, message: Message) -> None:
    samples = {type(sample): sample for sample in MESSAGES}
    for phase, path in paths_to(table).items():
        conversation = Conversation(table)
        for cls in path:
            conversation.receive(samples[cls])
        assert conversation.phase is phase
        after = table[phase].get(type(message))
        if after is None:
            with pytest.raises(RemoteProtocolError) as caught:
                conversation.receive(message)
            assert caught.value.code is ErrorCode.OUT_OF_ORDER
            assert conversation.phase is phase
        else:
            assert conversation.receive(message) is message
            assert conversation.phase is after


@pytest.mark.parametrize(("low", "high", "fits"), [(1, 1, True), (0, 9, True), (2, 9, False)])
def test_versions(low: int, high: int, fits: bool) -> None:
    message = opening(protocol_min=low, protocol_max=high)
    if fits:
        assert agree_on_version(message) == 1
    else:
        with pytest.raises(RemoteProtocolError, match="update") as caught:
            agree_on_version(message)
        assert caught.value.code is ErrorCode.BAD_VERSION


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (lambda: step(4, step=9, hidden=tensor(BATCH, 1, HIDDEN + 1)), ErrorCode.BAD_TENSOR),
        (lambda: step(4, step=9, hidden=tensor(BATCH + 1, 1, HIDDEN)), ErrorCode.BAD_TENSOR),
        (lambda: step(4, step=9, hidden=tensor(BATCH, HIDDEN)), ErrorCode.BAD_TENSOR),
        (lambda: step(4, step=9, hidden=tensor(BATCH, 1, 1, HIDDEN)), ErrorCode.BAD_TENSOR),
        (
            lambda: step(4, step=9, hidden=tensor(BATCH, 1, HIDDEN, dtype="float16", size=2)),
            ErrorCode.BAD_TENSOR,
        ),
        (lambda: step(4, tokens=13, step=9), ErrorCode.OVERSIZE),
        (lambda: step(5, step=9), ErrorCode.GAP),
        (lambda: step(3, step=9), ErrorCode.GAP),
        (lambda: step(9, step=9, epoch=1, crop_to=9), ErrorCode.GAP),
        (lambda: step(3, step=9, epoch=1, crop_to=2), ErrorCode.GAP),
        (lambda: step(2, step=9, crop_to=2), ErrorCode.OUT_OF_ORDER),
        (lambda: step(0, tokens=3, step=5), ErrorCode.OUT_OF_ORDER),
        (lambda: step(4, step=9, reorder=(0, 2)), ErrorCode.BAD_TENSOR),
        (lambda: step(4, step=9, reorder=(0,)), ErrorCode.BAD_TENSOR),
        (lambda: step(4, step=9, reorder=(0, 1, 0)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("flash", tensor(BATCH, 1)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("padding", tensor(BATCH, 1)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("padding", flags(BATCH, 2)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("padding", flags(BATCH)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("padding", flags(BATCH, 1, 1)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("position_ids", ids(BATCH, 1, 5)), ErrorCode.BAD_TENSOR),
        (lambda: with_input("position_ids", ids(BATCH, 1, 3, 1)), ErrorCode.BAD_TENSOR),
    ],
)
def test_what_a_step_must_not_be(bad: Callable[[], Step], code: ErrorCode) -> None:
    book = ledger()
    book.applied(step(0, tokens=4, step=5))
    before = (book.epoch, book.position, book.last_step)
    with pytest.raises(RemoteProtocolError) as caught:
        book.admit(bad())
    assert caught.value.code is code
    assert (book.epoch, book.position, book.last_step) == before
    assert (caught.value.position is not None) == (code is ErrorCode.GAP)
    assert book.admit(step(4, step=9)) is Verdict.COMPUTE


def with_input(name: str, frame: TensorFrame) -> Step:
    return step(4, step=9, inputs={name: frame})


def flags(*shape: int) -> TensorFrame:
    return tensor(*shape, dtype="bool", size=1)


def ids(*shape: int) -> TensorFrame:
    return tensor(*shape, dtype="int64", size=8)


@pytest.mark.parametrize("frame", [ids(BATCH, 1), ids(BATCH, 1, 3), ids(BATCH, 1, 4)])
def test_positions_may_have_planes(frame: TensorFrame) -> None:
    assert ledger().admit(step(inputs={"position_ids": frame})) is Verdict.COMPUTE


def test_a_session_does_not_outgrow_its_reservation() -> None:
    book = ledger(max_length=6)
    book.applied(step(0, tokens=4))
    with pytest.raises(RemoteProtocolError) as caught:
        book.admit(step(4, tokens=3, step=1))
    assert caught.value.code is ErrorCode.TOO_LONG
    assert book.admit(step(4, tokens=2, step=1)) is Verdict.COMPUTE


def test_epochs_only_grow() -> None:
    book = ledger()
    book.sync(3)
    book.sync(3)
    with pytest.raises(RemoteProtocolError) as caught:
        book.sync(2)
    assert caught.value.code is ErrorCode.OUT_OF_ORDER


STEPS = st.lists(
    st.tuples(
        st.integers(0, 3),  # epoch
        st.integers(0, 6),  # number
        st.integers(0, 8),  # start
        st.integers(0, 3),  # tokens
        st.one_of(st.none(), st.integers(0, 8)),  # crop_to
        st.booleans(),  # preceded by a sync of that epoch
    ),
    max_size=25,
)


@given(STEPS)
def test_a_ledger_counts_as_a_list_of_positions_would(steps: list[Any]) -> None:
    book = ledger(max_length=9)
    positions: list[int] = []  # who wrote each position of the cache
    epoch, last, last_epoch = 0, -1, -1
    for new_epoch, number, start, tokens, crop_to, syncs in steps:
        if syncs and new_epoch >= epoch:
            book.sync(new_epoch)
            epoch = new_epoch
        message = step(start, tokens, epoch=new_epoch, step=number, crop_to=crop_to)
        base = len(positions) if crop_to is None else crop_to
        legal = (
            base <= len(positions)
            and (base == len(positions) or new_epoch != last_epoch)
            and start == base
            and start + tokens <= 9
        )
        try:
            verdict = book.admit(message)
        except RemoteProtocolError:
            assert new_epoch >= epoch
            assert not legal or number == last
            continue
        match verdict:
            case Verdict.STALE:
                assert new_epoch < epoch or number < last
            case Verdict.REPEAT:
                assert number == last
                assert positions[start:] == [number] * tokens
                epoch = new_epoch
            case Verdict.COMPUTE:
                assert legal
                assert number > last
                del positions[base:]
                positions += [number] * tokens
                epoch, last, last_epoch = new_epoch, number, new_epoch
                book.applied(message)
        assert (book.epoch, book.position, book.last_step) == (epoch, len(positions), last)
