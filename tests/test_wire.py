"""Every message survives its journey, and no frame, however hostile, does more than get refused."""

import contextlib
import math
import struct
import tracemalloc
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import messages
from swarm.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
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
from swarm.messages_training import BundleSpec, TensorSpec
from swarm.types import DTYPE_BYTES, mxint8_bytes
from swarm.wire import MAX_FRAME_BYTES, decode, encode, pack, unpack

ids = st.binary(min_size=16, max_size=16)
counts = st.integers(0, 1 << 31)
positions = st.integers(0, messages.MAX_TOKENS)
blocks = st.integers(0, messages.MAX_BLOCKS)
texts = st.text(max_size=200)
codes = st.text("abcdef0123456789", min_size=64, max_size=64)
durations = st.floats(0, 1e9)
records = st.binary(min_size=1, max_size=1024)
words = st.tuples() | st.lists(texts, max_size=32).map(tuple)
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
codecs: st.SearchStrategy[Any] = st.sampled_from(["none", "mxint8"])


@st.composite
def tensors(draw: st.DrawFn) -> TensorFrame:
    dtype: Any = draw(st.sampled_from(["float32", "bfloat16", "float16", "int64", "bool"]))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    codec = draw(codecs) if dtype in ("float32", "bfloat16", "float16") else "none"
    size = mxint8_bytes(shape) if codec == "mxint8" else math.prod(shape) * DTYPE_BYTES[dtype]
    data = draw(st.binary(min_size=size, max_size=size))
    return TensorFrame(dtype=dtype, shape=shape, data=data, codec=codec)


def spec(tensor: TensorFrame) -> TensorSpec:
    return TensorSpec(dtype=tensor.dtype, shape=tensor.shape)


digests = st.binary(min_size=32, max_size=32)
bundles = st.builds(BundleSpec, block=blocks, digest=digests, size=st.integers(1, 1 << 30))
targets = st.builds(PushTarget, record=records, session_id=ids, ticket=ids)
credentials = st.builds(
    Credentials,
    public_key=st.binary(max_size=600),
    signature=st.binary(max_size=600),
    proof=st.binary(max_size=64),
)
loads = st.builds(Load, queue=counts, step_ms=durations, free_tokens=counts)
identity: dict[str, st.SearchStrategy[Any]] = {
    "protocol_min": counts,
    "protocol_max": counts,
    "model": texts,
    "fingerprint": codes,
    "dtype": dtypes,
    "quantization": texts,
    "session_id": ids,
    "capabilities": words,
    "start": blocks,
    "end": blocks,
    "trace_id": st.text(max_size=64),
    "credentials": credentials,
}
EVERY: dict[type[Message], st.SearchStrategy[Message]] = {
    Open: st.builds(
        Open,
        codec=codecs,
        ticket=ids,
        batch_size=st.integers(1, messages.MAX_BATCH),
        max_length=st.integers(1, messages.MAX_TOKENS),
        next=st.none() | targets,
        adapter=st.none() | digests,
        priority=st.integers(0, 9),
        **identity,
    ),
    Opened: st.builds(
        Opened,
        protocol=counts,
        capabilities=words,
        window=st.integers(1, 1 << 10),
        max_step_tokens=st.integers(1, messages.MAX_TOKENS),
        load=loads,
    ),
    Step: st.builds(
        Step,
        epoch=counts,
        step=counts,
        start=positions,
        hidden=tensors(),
        inputs=st.dictionaries(texts, tensors(), max_size=8),
        crop_to=st.none() | positions,
        reorder=st.none()
        | st.lists(st.integers(0, messages.MAX_BATCH - 1), min_size=1, max_size=99).map(tuple),
        push=st.booleans(),
        quiet=st.booleans(),
        keep=st.none() | positions,
        trace=st.just("") | st.from_regex(r"\A00-[0-9a-f]{32}-[0-9a-f]{16}-01\Z"),
        deadline_ms=st.integers(1, 86_400_000),
    ),
    Output: st.builds(
        Output,
        epoch=counts,
        step=counts,
        start=positions,
        hidden=tensors(),
        pushed=st.booleans(),
        compute_ms=durations,
        load=loads,
    ),
    Sync: st.builds(Sync, epoch=counts),
    Synced: st.builds(Synced, epoch=counts, position=positions, last_step=st.integers(-1, 1 << 31)),
    Redirect: st.builds(Redirect, next=st.none() | targets),
    PushFailed: st.builds(PushFailed, epoch=counts, step=counts, message=texts),
    Leaving: st.builds(Leaving),
    HandOver: st.builds(HandOver, next=targets, stage=st.sampled_from(["dial", "ahead", "rest"])),
    HandedOver: st.builds(HandedOver, position=st.none() | positions, message=texts),
    Inherit: st.builds(
        Inherit,
        start=st.integers(0, 9),
        length=st.integers(1, messages.MAX_TOKENS),
        padding=st.none() | tensors(),
    ),
    Heritage: st.builds(Heritage, layer=blocks, start=positions, keys=tensors(), values=tensors()),
    Close: st.builds(Close),
    Attach: st.builds(Attach, session_id=ids, ticket=ids),
    Refused: st.builds(
        Refused,
        code=st.sampled_from(ErrorCode),
        message=texts,
        position=st.none() | positions,
        retry_after=st.none() | st.floats(0, 3600),
    ),
    Train: st.builds(
        Train,
        codec=codecs,
        backward=st.booleans(),
        tensors=st.dictionaries(texts, tensors().map(spec), max_size=8),
        adapter=st.none() | digests,
        deadline_ms=st.integers(1, 86_400_000),
        **identity,
    ),
    Lend: st.builds(
        Lend,
        bundles=st.lists(bundles, min_size=1, max_size=9).map(tuple),
        **identity,
    ),
    Lent: st.builds(Lent, missing=st.lists(blocks, max_size=9).map(tuple)),
    Bundle: st.builds(Bundle, block=blocks, start=counts, data=st.binary(min_size=1, max_size=99)),
    Piece: st.builds(Piece, name=texts, start=counts, rows=tensors()),
    Trained: st.builds(Trained, compute_ms=durations, load=loads),
    Back: st.builds(Back, deadline_ms=st.integers(1, 86_400_000)),
    InfoRequest: st.builds(
        InfoRequest, nonce=ids, credentials=credentials, padding=st.binary(max_size=64)
    ),
    Info: st.builds(
        Info,
        record=records,
        load=loads,
        counters=st.dictionaries(texts, st.integers(0, 1 << 63), max_size=64),
        adapters=st.dictionaries(texts, digests, max_size=16),
    ),
}

ID = bytes(16)
TENSOR = TensorFrame(dtype="float32", shape=(1, 2, 3), data=bytes(24))
STEP = Step(epoch=1, step=2, start=3, hidden=TENSOR, inputs={"padding": TENSOR}, reorder=(0, 1))
OPEN = Open(
    model="m",
    fingerprint="0" * 64,
    dtype="float32",
    session_id=ID,
    ticket=ID,
    start=0,
    end=8,
    batch_size=1,
    max_length=64,
    next=PushTarget(record=b"r", session_id=ID, ticket=ID),
    credentials=Credentials(public_key=b"k", signature=b"s"),
)


def refusal(frame: bytes) -> ErrorCode:
    """The code with which a frame is refused; anything but a refusal fails the test."""
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frame)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    return caught.value.code


def test_the_strategies_below_make_every_kind_of_message() -> None:
    assert set(EVERY) == set(typing.get_args(Message))


@given(st.one_of(*EVERY.values()))
def test_every_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", [STEP, OPEN], ids=lambda message: message.kind)
def test_a_frame_cut_anywhere_is_refused(message: Message) -> None:
    frame = encode(message)
    for end in range(len(frame)):
        assert refusal(frame[:end]) is ErrorCode.BAD_FRAME
    assert refusal(frame + b"\0") is ErrorCode.BAD_FRAME


@given(st.one_of(*EVERY.values()), st.data())
def test_a_frame_with_a_wrong_byte_is_another_message_or_refused(
    message: Message, data: st.DataObject
) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RemoteProtocolError):
        assert type(decode(bytes(frame))) in EVERY


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    assert refusal(noise) is ErrorCode.BAD_FRAME


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner),
)


@settings(max_examples=50)
@given(json)
def test_whatever_is_msgpack_but_no_message_is_refused(value: Any) -> None:
    assert refusal(pack(value)) is ErrorCode.BAD_FRAME


NOT_A_COUNT = [math.nan, math.inf, 1.0, -1, True, None, "1", b"1", [1], {}, 1 << 63]


@pytest.mark.parametrize("value", NOT_A_COUNT, ids=repr)
@pytest.mark.parametrize(
    ("message", "field"),
    [
        (STEP, "epoch"),
        (STEP, "step"),
        (STEP, "start"),
        (STEP, "deadline_ms"),
        (OPEN, "start"),
        (OPEN, "batch_size"),
        (OPEN, "max_length"),
        (OPEN, "protocol_min"),
        (Sync(epoch=1), "epoch"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_what_is_not_a_count_is_refused(message: Message, field: str, value: object) -> None:
    assert refusal(altered(message, **{field: value})) is ErrorCode.BAD_FRAME


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": {"dtype": "float32", "shape": [1, 2, 4], "data": bytes(24)}},
        {"hidden": {"dtype": "float64", "shape": [1, 1, 3], "data": bytes(24)}},
        {"hidden": {"dtype": "float32", "shape": [-1, -2, 3], "data": bytes(24)}},
        {"hidden": {"dtype": "float32", "shape": [True, 2, 3], "data": bytes(24)}},
        {"hidden": {"dtype": "float32", "shape": [], "data": bytes(4)}},
        {"hidden": {"dtype": "float32", "shape": [1] * 6, "data": bytes(4)}},
        {"hidden": {"dtype": "float32", "shape": [1 << 24] * 5, "data": b""}},
        {"hidden": {"dtype": "float32", "shape": [1, 2, 3], "data": "x" * 24}},
        {"hidden": {"dtype": "float32", "shape": [1, 2, 3], "data": [0] * 24}},
        {"hidden": None},
        {"inputs": {f"{i}": TENSOR.model_dump() for i in range(9)}},
        {"reorder": []},
        {"reorder": [0.0]},
        {"reorder": [messages.MAX_BATCH]},
        {"crop_to": -1},
        {"push": 1},
        {"trace": "00-" + "a" * 32 + "-" + "b" * 16 + "-00"},
        {"trace": "x" * 10_000},
        {"kind": "opened"},
        {"kind": "unheard of"},
        {"kind": None},
        {"surplus": 1},
        {b"epoch": 1},
    ],
    ids=repr,
)
def test_a_step_with_a_wrong_field_is_refused(change: dict[Any, object]) -> None:
    frame = pack(typing.cast(dict[Any, object], unpack(encode(STEP))) | change)
    assert refusal(frame) is ErrorCode.BAD_FRAME


@pytest.mark.parametrize("wrong", [b"", bytes(15), bytes(17), "0" * 16, 0], ids=repr)
@pytest.mark.parametrize("field", ["session_id", "ticket"])
def test_an_id_of_another_length_or_type_is_refused(field: str, wrong: object) -> None:
    assert refusal(altered(OPEN, **{field: wrong})) is ErrorCode.BAD_FRAME
    attach = Attach(session_id=ID, ticket=ID)
    assert refusal(altered(attach, **{field: wrong})) is ErrorCode.BAD_FRAME


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", 3601.0], ids=repr)
def test_a_wait_that_is_no_duration_is_refused(value: object) -> None:
    message = Refused(code=ErrorCode.BUSY, message="later")
    assert refusal(altered(message, retry_after=value)) is ErrorCode.BAD_FRAME


HUGE_HEADERS = {
    "bin32": b"\xc6\xff\xff\xff\xff",
    "str32": b"\xdb\xff\xff\xff\xff",
    "array32": b"\xdd\xff\xff\xff\xff",
    "map32": b"\xdf\xff\xff\xff\xff",
    "ext32": b"\xc9\xff\xff\xff\xff\x01",
    "array32 in the frame's size": b"\xdd" + struct.pack(">I", 1 << 20) + bytes(1 << 20),
    "lists of lists": b"\xdc\x0f\xff" + (b"\xdc\x0f\xff" + b"\x90" * 4095) * 256,
    "empty lists": b"\xdd" + struct.pack(">I", 1 << 20) + b"\x90" * (1 << 20),
    "lists in lists": b"\x91" * (1 << 20),
    "maps in maps": b"\x81\xa1a" * (1 << 19) + b"\xc0",
    "wide lists in wide lists": (b"\xdc\x0f\xff" + b"\xc0" * 4094) * 255,
    "long text": b"\xdb" + struct.pack(">I", 1 << 20) + b"a" * (1 << 20),
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "lists as keys": b"\x81\x91\x01\x01",
    "numbers as keys": b"\x81\x01\x01",
    "text that is not text": b"\xa2\xff\xfe",
    "reserved": b"\xc1",
}


@pytest.mark.parametrize("name", HUGE_HEADERS)
def test_announced_sizes_and_tricks_cost_no_memory(name: str) -> None:
    frame = HUGE_HEADERS[name]
    tracemalloc.start()
    try:
        assert refusal(frame) is ErrorCode.BAD_FRAME
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_larger_than_allowed_is_neither_sent_nor_read() -> None:
    hidden = TensorFrame(dtype="bool", shape=(MAX_FRAME_BYTES,), data=bytes(MAX_FRAME_BYTES))
    with pytest.raises(LocalProtocolError):
        encode(Output(epoch=0, step=0, start=0, hidden=hidden))
    assert refusal(b"\xc0" * (MAX_FRAME_BYTES + 1)) is ErrorCode.OVERSIZE


def test_the_largest_reordering_fits() -> None:
    rows = tuple(range(messages.MAX_BATCH))
    step = STEP.model_copy(update={"reorder": rows})
    assert decode(encode(step)) == step


@settings(max_examples=20)
@given(st.text(max_size=50))
def test_a_strangers_words_stay_on_one_line_of_the_log(name: str) -> None:
    assert refusal(altered(Close(), **{f"{name}\n{name}": 1})) is ErrorCode.BAD_FRAME


def altered(message: Message, **changes: object) -> bytes:
    fields = msgpack.unpackb(encode(message))
    return pack(fields | changes)
