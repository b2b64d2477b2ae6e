"""What people type to start the monitor, and what they are told when it cannot be."""

from pathlib import Path

import pytest

from swarm.cli import monitor_main
from swarm.cli.monitor import history_file, hosts_of, monitor_parser


def test_it_listens_to_nobody_else_and_keeps_a_history_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    plain = monitor_parser().parse_args([])
    assert (plain.host, plain.ask, plain.models) == ("127.0.0.1", True, [])
    here, there = (history_file(None, [f"/ip4/{i}/tcp/1/p2p/Qm{i}"]) for i in range(2))
    assert here is not None
    assert here != there, "two swarms have two histories"
    assert here.parent == Path("/state/swarm")
    assert history_file(None, ["/dns4/other/tcp/2/p2p/Qm0"]) == here
    assert history_file("", ["x"]) is None
    assert history_file("h", ["x"]) == Path("h")
    words = ["me/a", "me/b", "--no-ask", "--history", "", "--join-peers", "x", "y"]
    told = monitor_parser().parse_args(words)
    assert (told.models, told.ask, told.history) == (["me/a", "me/b"], False, "")
    assert told.join_peers == ["x", "y"]


def test_a_private_swarm_is_told_to_nobody_who_gives_this_machine_a_name_of_theirs() -> None:
    def hosts(*words: str, key: str | None = "swarm-key-1:x") -> tuple[str, ...] | None:
        told = monitor_parser().parse_args(words)
        told.swarm_key = key
        return hosts_of(told)

    own = {"127.0.0.1", "localhost", "::1"}
    assert set(hosts() or ()) == own
    assert set(hosts("--host", "localhost", "--allow-host", "swarm.lan") or ()) == own | {
        "swarm.lan"
    }
    assert hosts("--host", "0.0.0.0") is None  # noqa: S104  # who says so means everybody
    assert hosts(key=None) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "which swarm?"),
        (["--peers", "nonsense", "--history", ""], "not the address of a peer"),
        (["--peers", "x", "--port", "99999"], "no whole number"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert monitor_main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("swarm-monitor: ")
    assert "Traceback" not in said


def test_a_history_that_cannot_be_kept_is_said_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "h.sqlite")
    assert monitor_main(["--peers", "/ip4/127.0.0.1/tcp/9/p2p/Qm", "--history", path]) == 2
    assert "--history" in capsys.readouterr().err
