"""docs/protocol.md says what the code does: somebody may write a second client from it alone."""

from __future__ import annotations

import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from swarm import messages, protocol
from swarm.config import ClientTimeouts, ServerLimits
from swarm.dht import records
from swarm.errors import ErrorCode
from swarm.identity import SwarmKey, opening_transcript
from swarm.messages import Credentials, Load, Message, PushTarget, Sync
from swarm.server.session import Counters
from swarm.wire import MAX_FRAME_BYTES, encode

DOC = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
MESSAGES = {cls.model_fields["kind"].default: cls for cls in typing.get_args(Message)}
PARTS = {"target": PushTarget, "credentials": Credentials, "load": Load}


def section(heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", DOC, re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without their headings and rules."""
    lines = [line.strip("|\n ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    rules = [index for index, cells in enumerate(lines) if set("".join(cells)) <= set("-:|")]
    skipped = {index - step for index in rules for step in (0, 1)}
    return [cells for index, cells in enumerate(lines) if index not in skipped]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def check_fields(text: str, cls: type[typing.Any]) -> None:
    documented = [
        (name, cells[2] == "required") for cells in rows(text) for name in names(cells[0])
    ]
    actual = [(n, f.is_required()) for n, f in cls.model_fields.items() if n != "kind"]
    assert sorted(documented) == sorted(actual)


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_is_described_with_all_its_fields(kind: str) -> None:
    check_fields(section(f"`{kind}`"), MESSAGES[kind])


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_messages_are_described(part: str) -> None:
    after = section("Parts of messages").split(f"**{part}**")[1]
    check_fields(after.split("**")[0], PARTS[part])


def test_every_error_code_has_its_row() -> None:
    assert [names(cells[0])[0] for cells in rows(section("10. Errors"))] == list(ErrorCode)


def test_the_table_of_states_is_the_code_s() -> None:
    tables = {
        "session, client to server": protocol.SESSION,
        "session, server to client": protocol.REPLIES,
        "push, server to server": protocol.PUSH,
        "training, client to server": protocol.TRAINING,
        "training, server to client": protocol.TRAINED,
        "lending, client to server": protocol.LENDING,
        "lending, server to client": protocol.LOANS,
    }
    actual = {
        (direction, phase.value, cls.model_fields["kind"].default, after.value)
        for direction, table in tables.items()
        for phase, legal in table.items()
        for cls, after in legal.items()
    }
    assert {
        (direction, phase, kind, after)
        for direction, phase, kinds, after in rows(section("6. States"))
        for kind in names(kinds)
    } == actual


def test_examples_can_be_reproduced() -> None:
    hexes = [bytes.fromhex(text) for text in re.findall(r"```\n([0-9a-f \n]+)```", DOC)]
    key = SwarmKey(bytes(range(32)))
    transcript = opening_transcript("QmServer", b"\xaa" * 32, b"\xbb" * 16, b"\xcc" * 256)
    assert hexes == [encode(Sync(epoch=3)), key.prove(transcript)]


def test_what_travels_beside_hidden_states_is_named() -> None:
    cell = next(cells for cells in rows(section("`step`")) if cells[0] == "`inputs`")[3]
    assert {(name, cell.split(f"`{name}`: ")[1].split()[0]) for name in names(cell)} == set(
        protocol.INPUTS.items()
    )


def test_records_are_described_field_by_field() -> None:
    table = rows(section("3. Finding servers"))
    numbers = [int(number) for cells in table for number in cells[0].split(",")]
    assert numbers == list(range(len(numbers)))
    documented = [name for cells in table for name in names(cells[1])]
    assert documented == list(records._PLAIN_FIELDS)
    identity = records.Identity.ephemeral()
    digest = bytes(32)
    record = records.ServerRecord(
        peer_id=identity.peer_id,
        model=records.ModelId("m", "0" * 64),
        blocks=records.BlockRange(0, 1),
        num_blocks=1,
        host="h",
        port=1,
        certificate_digest=digest,
    )
    assert len(records._to_list(record)) == len(numbers)


def test_numbers_in_the_text_are_the_code_s() -> None:
    limits = [cells[1] for cells in rows(section("11. Limits and waits"))]
    server, client = ServerLimits(), ClientTimeouts()
    actual = [
        *(server.window, server.max_step_tokens, server.kv_wait, server.max_sessions),
        *(server.open_timeout, server.idle_timeout, server.send_timeout),
        *(client.connect, client.sync, client.step, client.recovery),
    ]
    assert limits == [f"{value:,.0f}" for value in actual]
    assert f"{MAX_FRAME_BYTES:,} bytes" in DOC
    assert f"kept until\n`announced_at` + {records.RETENTION:,.0f} s" in DOC
    assert f"at most {records.MAX_RECORD_BYTES:,}\nbytes" in DOC
    assert f"seconds until it expires, at most {records.MAX_LIFETIME}" in DOC
    assert f"Version {messages.PROTOCOL_VERSION} is the only one" in DOC


def test_all_counters_are_named() -> None:
    cell = next(cells for cells in rows(section("`info`")) if cells[0] == "`counters`")[3]
    assert {field.name for field in fields(Counters)} <= set(names(cell))
