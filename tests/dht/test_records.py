"""Records: what fits, what comes back, and that nothing else is believed."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from swarm.dht import records
from swarm.dht.pages import pages_of
from swarm.dht.records import (
    CLOCK_SLACK,
    MAX_RECORD_BYTES,
    REGISTRY,
    Adapter,
    ServerRecord,
    ServerState,
    dht_key,
    keys_of,
    open_record,
    peer_tag,
    sign_record,
)
from swarm.errors import InvalidRecord, UsageError
from swarm.identity import SwarmKey
from swarm.types import BlockRange, ModelId, Numerics
from swarm.wire import pack
from tests.dht.samples import ALICE, BOB, KEY, MODEL, NOW, OTHER_KEY, record, signed

PRINTABLE = st.characters(codec="utf-8", categories=["L", "N", "P", "S"])

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.lists(st.integers(0, 30), max_size=3)
)


def text(max_bytes: int, min_size: int = 0) -> st.SearchStrategy[str]:
    return st.text(PRINTABLE, min_size=min_size, max_size=max_bytes).filter(
        lambda value: len(value.encode()) <= max_bytes
    )


RECORDS = st.builds(
    ServerRecord,
    peer_id=st.just(ALICE.peer_id),
    model=st.builds(
        ModelId, text(72, min_size=1), st.binary(min_size=32, max_size=32).map(bytes.hex)
    ),
    blocks=st.tuples(st.integers(0, 40), st.integers(1, 40)).map(
        lambda pair: BlockRange(pair[0], sum(pair))
    ),
    num_blocks=st.integers(80, 4096),
    host=text(56, min_size=1),
    port=st.integers(1, 65_535),
    certificate_digest=st.binary(min_size=32, max_size=32),
    numerics=st.builds(Numerics, st.sampled_from(["float32", "bfloat16", "float16"])),
    state=st.sampled_from(ServerState),
    throughput=st.floats(0, 1e9),
    batch_throughput=st.floats(0, 1e9),
    next_rtts=st.dictionaries(
        st.text(string.ascii_letters, min_size=8, max_size=8), st.integers(0, 65_535), max_size=6
    ),
    queue=st.integers(0, 65_535),
    free_tokens=st.integers(0, 2**32 - 1),
    adapters=st.lists(
        st.builds(Adapter, text(11, min_size=1), st.binary(min_size=8, max_size=8)), max_size=3
    ).map(tuple),
    version=text(12),
    public_name=text(30),
    announced_at=st.just(int(NOW * 1000)),
    lifetime=st.integers(1, 600),
    page_bits=st.integers(0, 16),
    coordinates=st.none() | st.tuples(*[st.integers(-32_767, 32_767)] * 3, st.integers(0, 32_767)),
    uplink=st.integers(0, (1 << 32) - 1),
)


@given(RECORDS, st.sampled_from([None, KEY]))
def test_every_record_comes_back_as_it_was(sent: ServerRecord, key: SwarmKey | None) -> None:
    data = sign_record(sent, ALICE, key).data
    assert len(data) <= MAX_RECORD_BYTES
    assert open_record(data, key=key, now=NOW) == sent


def test_the_largest_record_fits() -> None:
    largest = record(
        ALICE,
        "4094:4096",
        model=ModelId("é" * 36, "ff" * 32),
        num_blocks=4096,
        host="h" * 56,
        port=65_535,
        numerics=Numerics("bfloat16"),
        state=ServerState.DRAINING,
        throughput=1 / 3,
        batch_throughput=1 / 3,
        next_rtts={f"{i:08}": 65_535 for i in range(6)},
        queue=65_535,
        free_tokens=2**32 - 1,
        adapters=(Adapter("a" * 11, bytes(8)),) * 3,
        version="v" * 12,
        public_name="é" * 15,
        announced_at=2**53 - 1,
        lifetime=600,
        page_bits=16,
        coordinates=(-32_767, -32_767, -32_767, 32_767),
        uplink=(1 << 32) - 1,
    )
    data = sign_record(largest, ALICE, KEY).data
    assert len(data) <= MAX_RECORD_BYTES
    assert open_record(data, key=KEY, now=largest.announced_at / 1000) == largest


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": "20:25"},
        {"num_blocks": 0},
        {"num_blocks": 4097},
        {"port": 0},
        {"port": 65_536},
        {"host": ""},
        {"host": "h" * 57},
        {"host": "a\nb"},
        {"model": ModelId("", "ab" * 32)},
        {"model": ModelId("m" * 73, "ab" * 32)},
        {"model": ModelId("m", "AB" * 32)},
        {"model": ModelId("m", "ab" * 31)},
        {"certificate_digest": b"short"},
        {"throughput": float("nan")},
        {"throughput": float("inf")},
        {"throughput": -1.0},
        {"batch_throughput": 1.1e9},
        {"queue": -1},
        {"next_rtts": {"short": 1}},
        {"next_rtts": {f"{i:08}": 1 for i in range(7)}},
        {"adapters": (Adapter("a", bytes(8)),) * 4},
        {"adapters": (Adapter("a" * 12, bytes(8)),)},
        {"adapters": (Adapter("", bytes(8)),)},
        {"adapters": (Adapter("a", bytes(9)),)},
        {"public_name": "\x1b[31mred"},
        {"lifetime": 601},
        {"page_bits": 17},
        {"coordinates": (0, 0, 0, -1)},
        {"coordinates": (0, 0, 32_768, 0)},
        {"coordinates": (0, 0, 0)},
        {"uplink": -1},
        {"surprise": 1},
    ],
)
def test_claims_out_of_bounds_are_no_records(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record(ALICE, **fields)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_changed_byte_anywhere_is_noticed(key: SwarmKey | None) -> None:
    data = signed(ALICE, key=key).data
    for place in range(0, len(data), 7):
        with pytest.raises(InvalidRecord):
            open_record(
                data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], key=key, now=NOW
            )


def _signed_bytes(payload: bytes) -> bytes:
    return ALICE.public_key + ALICE.sign(b"swarm-server-record-1" + payload) + payload


def _signed_payload(payload: object) -> bytes:
    return _signed_bytes(pack(payload))


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        [],
        [1],
        [2, "of a later schema"],
        [1] * 26,
        [1, "m", b"f" * 32, 5, 2, "float32", "none", "none", 24, "h", 1, b"d" * 32, "online"],
        [1, "m", 10**15, *[0] * 23],
    ],
)
def test_signed_nonsense_is_refused(payload: object) -> None:
    with pytest.raises(InvalidRecord):
        open_record(_signed_payload(payload), key=None, now=NOW)


@given(st.binary(max_size=1100), st.sampled_from([None, KEY]))
def test_garbage_never_breaks_us(data: bytes, key: SwarmKey | None) -> None:
    with pytest.raises(InvalidRecord):
        open_record(data, key=key, now=NOW)


@given(st.binary(max_size=512))
def test_signed_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(InvalidRecord):
        open_record(_signed_bytes(payload), key=None, now=NOW)


@given(st.data())
def test_a_signed_record_with_one_field_of_any_kind_is_refused_or_within_bounds(
    data: st.DataObject,
) -> None:
    fields = records._to_list(record(ALICE))
    fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(VALUES)
    try:
        found = open_record(_signed_payload(fields), key=None, now=NOW)
    except InvalidRecord:
        return
    assert sign_record(found, ALICE, None).data == _signed_payload(records._to_list(found))


def test_oversize_is_refused_before_anything_is_read() -> None:
    with pytest.raises(InvalidRecord, match="1025 bytes"):
        open_record(signed(ALICE).data.ljust(1025, b"\0"), key=None, now=NOW)


def test_without_the_swarm_key_records_are_neither_read_nor_written() -> None:
    for sealed_with, opened_with in [(KEY, None), (KEY, OTHER_KEY), (None, KEY)]:
        with pytest.raises(InvalidRecord):
            open_record(signed(ALICE, key=sealed_with).data, key=opened_with, now=NOW)
    private = signed(ALICE, key=KEY).data
    assert ALICE.public_key not in private
    assert b"127.0.0.1" not in private
    assert not set(keys_of(record(ALICE), KEY)) & set(keys_of(record(ALICE), None))


def test_clocks_may_be_an_hour_wrong_but_not_more() -> None:
    data, lifetime = signed(ALICE, lifetime=90).data, 90
    for now in (NOW, NOW - CLOCK_SLACK, NOW + lifetime + CLOCK_SLACK):
        assert open_record(data, key=None, now=now).peer_id == ALICE.peer_id
    with pytest.raises(InvalidRecord, match="future"):
        open_record(data, key=None, now=NOW - CLOCK_SLACK - 1)
    with pytest.raises(InvalidRecord, match="expired"):
        open_record(data, key=None, now=NOW + lifetime + CLOCK_SLACK + 1)
    with pytest.raises(InvalidRecord, match="expired"):
        open_record(data, key=None, now=NOW + lifetime + 1, clock_slack=0)


def test_nobody_signs_for_others() -> None:
    with pytest.raises(UsageError):
        sign_record(record(ALICE), BOB, None)


def test_a_server_is_found_by_its_first_block_and_by_how_finely_it_cuts() -> None:
    assert keys_of(record(ALICE, "9:24"), None) == (dht_key(MODEL, 1, "", None), REGISTRY)
    page, coarser, *_ = keys_of(record(ALICE, "9:24", page_bits=5), None)
    place = pages_of(ALICE.peer_id, 16)[0]
    assert (page, coarser) == tuple(dht_key(MODEL, 1, place[:bits], None) for bits in (5, 4))
    other_weights = ModelId(MODEL.name, "cd" * 32)
    assert dht_key(other_weights, 1, "", None) != dht_key(MODEL, 1, "", None)


def test_round_trip_times_are_told_by_peer() -> None:
    announced = record(ALICE, next_rtts={peer_tag(BOB.peer_id): 12})
    assert announced.rtt_to(BOB.peer_id) == 12
    assert announced.rtt_to(ALICE.peer_id) is None
