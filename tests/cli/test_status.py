"""`swarm status` shows strangers' records: whatever they say, and again when it changes."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rich.console import Console

from swarm.cli import main
from swarm.cli.status import _place, picture
from swarm.dht.directory import SwarmView
from swarm.dht.records import ServerRecord, ServerState, SignedRecord
from swarm.errors import PeerUnavailable
from swarm.types import BlockRange, ModelId
from tests.cli.test_screen import EVIL

PEERS = ["--peers", "/ip4/127.0.0.1/tcp/9/p2p/QmeL3fLd2dbKVM8wVZUdbHAugA6Co1NJf7nNMZ1AXidP5g"]


def view(*spans: str, name: str = "m", who: str = "", blocks: int = 4) -> SwarmView:
    records = [
        ServerRecord.model_construct(  # also what records would not let through
            peer_id=f"QmServer{index:08}",
            model=ModelId(name, "0" * 64),
            blocks=BlockRange.parse(span),
            num_blocks=blocks,
            host="127.0.0.1",
            port=1,
            certificate_digest=bytes(32),
            public_name=who,
            state=ServerState.ONLINE,
        )
        for index, span in enumerate(spans)
    ]
    servers = tuple(SignedRecord(record, b"") for record in records)
    return SwarmView(ModelId(name, "0" * 64), blocks, servers)


def drawn(views: Sequence[SwarmView], width: int = 120) -> str:
    console = Console(file=io.StringIO(), force_terminal=False, width=width)
    console.print(picture(views, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("evil", [*EVIL, "[bold red]me[/]", "x" * 10_000], ids=ascii)
def test_a_hostile_name_is_only_a_name(evil: str) -> None:
    text = drawn([view("0:4", who=evil, name=evil)])
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text) < 2000


def test_square_brackets_are_part_of_a_name() -> None:
    assert "[bold]me[/]" in drawn([view("0:4", who="[bold]me[/]")])


def test_a_picture_of_each_server_where_there_is_room() -> None:
    wide, narrow = drawn([view("0:2", "1:4")]), drawn([view("0:2", "1:4")], width=80)
    assert "██··" in wide
    assert "·███" in wide
    assert "█" not in narrow
    assert "servers of each block: 1211" in narrow


@pytest.mark.parametrize(
    ("ends", "count", "drawing"),
    [((0, 4), 4, "████"), ((0, 1), 80, "█" + 23 * "·"), ((79, 80), 80, 23 * "·" + "█")],
)
def test_every_span_is_seen(ends: tuple[int, int], count: int, drawing: str) -> None:
    assert _place(*ends, count) == drawing


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the next looks will see, or raise."""
    scenes: list[Any] = []

    @asynccontextmanager
    async def looking(*_: object) -> AsyncGenerator[Callable[[], Awaitable[list[SwarmView]]]]:
        async def look() -> list[SwarmView]:
            scene = scenes.pop(0)
            if isinstance(scene, BaseException):
                raise scene
            return scene

        yield look

    async def at_once(_: float) -> None: ...

    monkeypatch.setattr("swarm.cli.status._looking", looking)
    monkeypatch.setattr("swarm.cli.status.asyncio.sleep", at_once)
    return scenes


def test_watching_goes_on_until_ctrl_c_also_when_a_look_fails(
    seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen += [[view("0:4")], PeerUnavailable("nobody answers\x1b[2J"), [view("0:2")]]
    seen += [KeyboardInterrupt()]
    assert main(["status", "--watch", "1", *PEERS]) == 0
    text = capsys.readouterr().out
    assert "broken: nobody serves 2:4" in text
    assert "\x1b[2J" not in text


def test_watching_for_programs_is_an_object_per_line(
    seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen += [[view("0:4")], PeerUnavailable("nobody answers"), [view("0:2")], KeyboardInterrupt()]
    assert main(["status", "--watch", "--json", *PEERS]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [line["models"][0]["health"] for line in lines]
    assert found == ["degraded", "degraded", "broken"]


def test_a_first_look_that_fails_says_why(
    seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen += [PeerUnavailable("no peers reachable")]
    assert main(["status", "--watch", *PEERS]) == 1
    assert "no peers reachable" in capsys.readouterr().err


@pytest.mark.parametrize("period", ["0", "-1", "often", "1e9", "nan"])
def test_a_period_is_a_number(period: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", f"--watch={period}", *PEERS]) == 2
    assert "is no number of seconds from 0.5 to 3600" in capsys.readouterr().err
