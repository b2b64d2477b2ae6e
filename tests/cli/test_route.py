"""`swarm route` says which way a request would go, what that takes, and what else there is."""

import json
import random

import pytest

from swarm.cli import main
from swarm.cli.route import Outlook, _look_out
from swarm.client.network import ModelRouter
from swarm.config import ClientConfig
from swarm.dht.directory import Directory, SwarmView
from swarm.dht.memory import MemoryDht
from swarm.dht.records import peer_tag
from tests.client.market import MODEL, book, request, server
from tests.nursery import QuickSwarm

PEERS = ["--peers", "/ip4/127.0.0.1/tcp/9/p2p/QmeL3fLd2dbKVM8wVZUdbHAugA6Co1NJf7nNMZ1AXidP5g"]


@pytest.fixture
def outlook() -> Outlook:
    """Two hops whose link is announced, a third that nobody measured, and a spare for the first."""
    directory, peers = Directory(MemoryDht("me"), MODEL, 24), book(aaaaaaaa=0.02, bbbbbbbb=0.03)
    servers = (
        server("aaaaaaaa", "0:8", next_rtts={peer_tag("bbbbbbbb"): 12}),
        server("spare000", "0:8", throughput=10.0),
        server("bbbbbbbb", "8:16", queue=3),
        server("cccccccc", "16:24", public_name="the third", free_tokens=1),
    )
    directory.view = SwarmView(MODEL, 24, servers)
    router = ModelRouter(directory, peers, random.Random(0), ClientConfig())
    return _look_out(router, request("0:24", new_tokens=100))


def test_for_programs(
    outlook: Outlook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("swarm.cli.route.explore", lambda *_: outlook)
    assert main(["route", "tiny", "--json", *PEERS]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["route"]
    assert [hop["blocks"] for hop in best["hops"]] == ["0:8", "8:16", "16:24"]
    assert [hop["rtt_known"] for hop in best["hops"]] == [True, True, False]
    assert [hop["link_announced"] for hop in best["hops"]] == [False, True, False]
    assert [hop["has_room"] for hop in best["hops"]] == [True, True, False]
    between = [hop["rtt_from_before"] for hop in best["hops"]]
    assert between == pytest.approx([0.02, 0.012, 0.13])
    assert best["seconds"] == pytest.approx(sum(hop["seconds"] for hop in best["hops"]))
    expected = best["first_token_seconds"] + 100 * best["token_seconds"]
    assert best["seconds"] == pytest.approx(expected)
    assert found["without"]["bbbbbbbb"] is None
    instead = found["without"]["aaaaaaaa"]
    assert instead["hops"][0]["peer_id"] == "spare000"
    assert instead["seconds"] > best["seconds"]


def test_for_people(
    outlook: Outlook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("swarm.cli.route.explore", lambda *_: outlook)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["route", "tiny", *PEERS]) == 0
    text = capsys.readouterr().out
    assert "16 tokens of prompt, 100 new ones" in text
    lines = [line.split() for line in text.splitlines()]
    first = next(line for line in lines if line[0] == "0:8")
    assert first[1:6] == ["h:1", "20.0", "ms", "20.0", "ms"]
    third = next(line for line in lines if line[0] == "16:24")
    assert third[2:6] == ["~100.0", "ms", "~130.0", "ms"]
    assert "0, full" in text
    assert "the third" in text
    assert "no route" in text


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("route", "the following arguments are required: MODEL; see `swarm route --help`"),
        ("route tiny", "give --peers or set SWARM_PEERS"),
        ("route tiny --prompt-tokens 0", "'0' is no whole number from 1 to"),
    ],
)
def test_it_says_what_is_wrong(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err


def test_a_real_swarm_is_measured_first(capsys: pytest.CaptureFixture[str]) -> None:
    with QuickSwarm(spans=["0:24"]) as swarm:
        assert main(["route", "swarm-demo", "--json", "--peers", *swarm.peers]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["route", "another", "--peers", *swarm.peers]) == 2
        assert "no 'another'; it serves: swarm-demo" in capsys.readouterr().err
    [hop] = found["route"]["hops"]
    assert (hop["blocks"], hop["rtt_known"]) == ("0:24", True)
    assert 0 < hop["rtt"] < 1
    assert hop["address"] == swarm.servers[0].address
    assert found["without"] == {hop["peer_id"]: None}
