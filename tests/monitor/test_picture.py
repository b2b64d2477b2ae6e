"""What is told of a model is true, and harmless whatever strangers call themselves."""

import json
import shlex
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.cli.serve import server_parser
from swarm.dht.directory import SwarmView
from swarm.dht.records import Adapter, ServerRecord, ServerState, SignedRecord
from swarm.messages import Load
from swarm.monitor.picture import Joining, draw, harmless, model_key, ranges, significant
from swarm.monitor.pulse import Answer
from swarm.monitor.roster import Member, Roster, State
from swarm.server.balancer import others_in
from swarm.server.placement import believe, choose_span, swarm_throughput
from swarm.types import ModelId, Numerics
from tests.monitor.simulated import MODEL, NOW, record, records

PEERS = ("/ip4/192.0.2.1/tcp/31330/p2p/QmX",)
JOINING = Joining(PEERS)


def members(*shown: ServerRecord, lost: frozenset[str] = frozenset()) -> list[Member]:
    roster = Roster()
    roster.update(shown, silent=lost, unreachable=(), now=NOW)
    return list(roster.members.values())


def picture(*shown: ServerRecord, blocks: int = 24, **more: Any) -> dict[str, Any]:
    answers: dict[str, Answer] = more.pop("answers", {})
    return draw(MODEL, blocks, members(*shown, **more), answers, JOINING)


def test_healthy_degraded_and_broken() -> None:
    twice = [record(i, "0:24") for i in range(2)]
    assert picture(*twice)["health"] == "healthy"
    once = picture(twice[0], record(5, "0:12"))
    assert (once["health"], once["single"]) == ("degraded", ["12:24"])
    hole = picture(record(1, "0:8"), record(2, "10:24"))
    assert (hole["health"], hole["missing"], hole["tokens"]) == ("broken", ["8:10"], 0)
    assert picture()["health"] == "broken"
    assert picture()["missing"] == ["0:24"]


@pytest.mark.parametrize("state", [ServerState.JOINING, ServerState.DRAINING])
def test_who_takes_no_requests_covers_nothing(state: ServerState) -> None:
    shown = picture(record(0, "0:24"), record(1, "0:24", state=state))
    assert shown["health"] == "degraded"
    assert shown["servers"][record(1).peer_id]["state"] == state


def test_who_is_lost_covers_nothing_but_is_shown() -> None:
    gone = record(1, "12:24")
    shown = picture(record(0, "0:12"), gone, lost=frozenset({gone.peer_id}))
    assert shown["missing"] == ["12:24"]
    assert shown["servers"][gone.peer_id]["state"] == "lost"


def test_servers_that_compute_differently_make_no_route_together() -> None:
    half = record(0, "0:12", numerics=Numerics("float32"))
    other = record(1, "12:24", numerics=Numerics("bfloat16"))
    apart = picture(half, other)
    assert apart["health"] == "broken"
    both = picture(half, other, record(2, "0:24", numerics=Numerics("float32")))
    assert (both["health"], both["precision"]) == ("degraded", "float32")
    assert both["precisions"]["bfloat16"] == {"tokens": 0.0, "covered": 12}


def test_tokens_and_needs_are_placements_own() -> None:
    shown = [r for r in records(60, 32) if r.state is ServerState.ONLINE]
    drawn = picture(*shown, blocks=32)
    view = SwarmView(MODEL, 32, tuple(SignedRecord(r, b"") for r in shown))
    holders = believe(others_in(view, shown[0].numerics, ""))
    assert drawn["tokens"] == significant(swarm_throughput(32, holders))
    assert [need["count"] for need in drawn["needs"]] == [1, 4, 8, 16, 32]
    for need in drawn["needs"]:
        assert need["blocks"] == str(choose_span(32, holders, need["count"]))


def test_the_size_that_is_proposed_closes_the_largest_hole() -> None:
    drawn = picture(record(0, "0:2"), record(1, "2:13"), record(2, "15:24"))
    need = drawn["needs"][drawn["need"]]
    assert need["count"] == 3
    assert need["blocks"] in ("12:15", "13:16")


def test_what_a_server_says_when_asked_is_newer_than_its_record() -> None:
    answer = Answer(connected=True, rtt=0.01234, up=NOW - 60, load=Load(queue=5, free_tokens=7))
    told = picture(record(0), answers={record(0).peer_id: answer})["servers"][record(0).peer_id]
    assert (told["queue"], told["free"], told["rtt"], told["path"]) == (5, 7, 12, "direct")
    assert told["up"] == NOW - 60
    unasked = picture(record(0))["servers"][record(0).peer_id]
    assert unasked["free"] == 100_000
    assert not unasked.keys() & {"rtt", "path", "up", "adapters", "gone"}


def test_a_model_of_thousands_of_blocks_is_drawn_without_comparing_millions() -> None:
    shown = [record(i, "0:4096", 4096) for i in range(50)]
    drawn = picture(*shown, blocks=4096)
    assert [need["count"] for need in drawn["needs"]] == [1, 4096]
    assert drawn["needs"][drawn["need"]]["count"] == 4096
    assert drawn["health"] == "healthy"


HOSTILE = [
    "<script>alert(1)</script>",
    "\u202egnp.exe\u202c",
    "A" * 10_000,
    "\u2066\u2067\u200b\u200f",
    "Z" + "\u0310" * 500,
    "a\nb\tc\x00d",
    "$(rm -rf ~); `id` 'x' \"y\"",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text_in_bounds_and_commands_stay_one_command(name: str) -> None:
    model = ModelId(name, "ab" * 32)
    shown = record(
        0, model=model, public_name=name, adapters=(Adapter(name, bytes(8)),), version=name
    )
    drawn = draw(model, 24, members(shown), {}, Joining(PEERS, private=True))
    words = shlex.split(drawn["needs"][0]["command"])
    assert words == [
        *("swarm-server", harmless(name, 100), "--num-blocks", "1"),
        *("--swarm-key", "secret.key", "--peers", *PEERS),
    ]
    told = drawn["servers"][shown.peer_id]
    assert len(drawn["name"]) <= 100
    assert len(told.get("name", "")) <= 60
    assert len(json.dumps(drawn)) < 5000


def test_a_models_name_is_no_option_of_the_command() -> None:
    command = JOINING.command(ModelId("--verbose", "ab" * 32), 8)
    parsed = server_parser().parse_args(shlex.split(command)[1:])
    assert (parsed.model, parsed.verbose, parsed.num_blocks) == ("--verbose", False, 8)
    assert parsed.peers == list(PEERS)
    plain = server_parser().parse_args(shlex.split(JOINING.command(MODEL, 3))[1:])
    assert (plain.model, plain.num_blocks, plain.peers) == (MODEL.name, 3, list(PEERS))


@given(st.text())
def test_harmless_text_has_one_line_no_controls_and_no_towers(text: str) -> None:
    shown = harmless(text, 20)
    assert len(shown) <= 20
    assert harmless(shown, 20) == shown
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    marks = "".join("m" if unicodedata.combining(c) else "." for c in shown)
    assert "mmm" not in marks


@given(st.lists(st.integers(0, 3), min_size=1))
def test_ranges_name_exactly_the_blocks_with_that_number(replicas: list[int]) -> None:
    for number in (0, 1):
        named = [range(*map(int, text.split(":"))) for text in ranges(replicas, number)]
        blocks = [block for each in named for block in each]
        assert blocks == [b for b, here in enumerate(replicas) if here == number]


def test_models_that_look_alike_have_keys_of_their_own() -> None:
    one, other = ModelId("a", "ab" * 32), ModelId("a", "ab" * 4 + "cd" * 28)
    assert str(one) == str(other)
    assert model_key(one) != model_key(other)


def test_states_are_those_of_records() -> None:
    assert {state.value for state in State} >= {s.value for s in ServerState} - {"offline"}
