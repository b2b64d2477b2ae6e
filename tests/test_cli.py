"""Commands teach, start at once, and say what is wrong in one sentence."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from rich.console import Console

from swarm.cli import dht_main, main, server_main
from swarm.cli.common import memory
from swarm.cli.demo import _Show
from swarm.cli.status import health
from swarm.dht.directory import SwarmView
from swarm.dht.records import ServerRecord, SignedRecord
from swarm.identity import Identity, SwarmKey
from swarm.types import BlockRange, ModelId
from tests.hub import serve
from tests.nursery import Program

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/QmeL3fLd2dbKVM8wVZUdbHAugA6Co1NJf7nNMZ1AXidP5g"
LOCAL = ["--host", "127.0.0.1"]


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set logging up, with this test's stderr in it."""
    root = logging.getLogger()
    before, level = list(root.handlers), logging.getLogger("swarm").level
    yield
    root.handlers[:] = before
    logging.getLogger("swarm").setLevel(level)


def complaint(capsys: pytest.CaptureFixture[str], status: int) -> str:
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    [line] = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--blocks 5:2", "swarm-server: blocks 5:2 are not a range; write START:END with"),
        ("--blocks five", "'five' are not START:END, for example 0:20"),
        ("--blocks 0:99", "choose --blocks within 0:24"),
        ("--blocks 0:2 --num-blocks 3", "not allowed with argument --blocks; see `swarm-server"),
        ("--num-blocks 0", "'0' is no whole number from 1 to"),
        ("--num-blocks 30", "has 24 blocks, not 30: choose --num-blocks up to 24"),
        ("--balance-quality 75", "'75' is no number from 0 to 1, such as 0.75"),
        ("--throughput fast", "'fast' is neither auto nor eval nor a number of tokens/s"),
        ("--throughput=-1", "'-1' is neither auto nor eval nor a number"),
        ("--port 70000", "--port: '70000' is no whole number from 0 to 65535; see `swarm-server"),
        ("--speed", "unrecognized arguments: --speed; see `swarm-server --help`"),
        ("--dtype int3", "choose from"),
        ("--device abacus", "torch finds no device 'abacus'"),
        ("--device meta", "torch finds no device 'meta'"),
        ("./no-such-folder", "there is no folder ./no-such-folder: check the path"),
        ("nobody/no-such-model", "cannot be reached and"),
        ("a b c", "unrecognized arguments"),
        ("--swarm-key swarm-key-1:abc", "not a swarm key"),
        ("--swarm-key /no/such/file", "make one with `swarm key new`"),
        (f"--peers {NOBODY}", "no peers reachable at"),
        ("--peers 10.0.0.5:4001", "is not the address of a peer"),
        ("--peers=", "--peers is empty: give the address"),
        ("--swarm-key=", "the swarm key is empty"),
        ("--host example.org", "host 'example.org' is not an IP address"),
        ("--announce-host=no/where", "'no/where' is neither an IP address nor a name"),
        ("--name " + "x" * 31, "choose another --name"),
    ],
)
def test_a_server_says_what_is_wrong(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = line.split() if "--host" in line else [*line.split(), *LOCAL]
    assert sentence in complaint(capsys, server_main(arguments))


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "choose another --port" in complaint(capsys, server_main([*LOCAL, "--port", port]))
        dht = ["--port", port, "--identity", str(Path("/dev/null/x"))]
        assert "choose another" in complaint(capsys, dht_main([*LOCAL, *dht]))


def test_a_gated_repo_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "repo").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "repo" / name).write_text("{}")
    with serve({"org/gated": tmp_path / "repo"}) as hub:
        hub.gated.add("org/gated")
        hub.use(monkeypatch, tmp_path)
        sentence = complaint(capsys, server_main(["org/gated", *LOCAL]))
    assert "is gated: accept its licence at" in sentence
    assert "HF_TOKEN" in sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("dance", "there is no command 'dance'; see `swarm --help`"),
        ("status", "give --peers or set SWARM_PEERS"),
        ("chat", "give --peers or set SWARM_PEERS"),
        (f"status --peers {NOBODY}", "no peers reachable at"),
        ("demo --tokens 2", "'2' is no whole number from 4 to 1500"),
        ("demo --prompt " + "x" * 501, "--prompt is too long for the small model"),
        ("key old", "choose from"),
        ("key new --out /no/such/folder/key", "choose another --out"),
        ("dht --identity /dev/null/x --host 127.0.0.1", "choose another"),
    ],
)
def test_swarm_says_what_is_wrong(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in complaint(capsys, main(line.split()))


@pytest.mark.parametrize(
    "line",
    ["", "server", "dht", "monitor", "api", "demo", "chat", "status", "route", "plan", "key"],
)
def test_help_teaches_by_examples_and_names_the_environment(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*line.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text or not line
    assert "SWARM_PEERS" in text or line in ("demo", "plan", "key")


def test_help_and_usage_errors_do_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from swarm.cli import main, server_main\n"
        "from swarm import LocalSwarm\n"
        "assert server_main(['--blocks', '5:2']) == 2\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'hivemind', 'grpc'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_start_that_fails_early_ends_in_good_order() -> None:
    """Torch aborts a process that ends while one of our threads is in there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"--dht-port={taken.getsockname()[1]}"
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        with Program(["swarm", "server", *LOCAL, port], **pipes) as process:
            out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch("swarm: the DHT does not start: fail.* in use.*; check .*\n", err)


def test_a_new_key_is_for_its_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "secret.key"
    assert main(["key", "new", "--out", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert SwarmKey.load(path).text() == path.read_text().strip()
    assert "exists; choose another --out" in complaint(
        capsys, main(["key", "new", "--out", str(path)])
    )
    assert main(["key", "new"]) == 0
    assert SwarmKey.parse(capsys.readouterr().out).text() != path.read_text().strip()


def test_a_bootstrap_node_has_a_lasting_identity_and_leaves_politely(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "dht.identity"
    process = subprocess.Popen(
        [sys.executable, "-m", "swarm", "dht", *LOCAL, "--port", "0", "--identity", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith("ready peers=/ip4/127.0.0.1/tcp/")
    assert line.endswith(f"/p2p/{Identity.load_or_create(path).peer_id}")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@contextmanager
def demo(*arguments: str, **environment: str) -> Generator[subprocess.Popen[str]]:
    """`swarm demo`, whose output is a pipe: lines without colours."""
    command = [sys.executable, "-m", "swarm", "demo", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_demo_survives_is_exact_and_stays_if_asked() -> None:
    """Also with the key of a private swarm in the environment, and while somebody watches."""
    key = SwarmKey.generate().text()
    with demo("--tokens", "24", "--seed", "3", "--keep", "--monitor", SWARM_KEY=key) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1].strip() != "swarm chat":
            lines.append(process.stdout.readline().rstrip("\n"))
            assert lines[-1], process.communicate()
        link = next(line.split()[-1] for line in lines if line.startswith("watch it at "))
        with urlopen(f"{link}/healthz", timeout=60) as answer:  # noqa: S310  # it is http
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (0, "", "")
    *lines, keeps, peers, _, _ = lines
    assert keeps.startswith("the swarm stays up until Ctrl-C")
    assert peers.strip().startswith("export SWARM_PEERS=/ip4/127.0.0.1/")
    assert "\x1b" not in "".join(lines)
    before = [line for line in lines if line.startswith("route: ")]
    after = [line for line in lines if line.startswith("route after: ")]
    assert len(before) == len(after) == 3
    assert before[1].partition(": ")[2] != after[1].partition(": ")[2]
    assert any(line.endswith("is killed") for line in lines)
    assert lines[-1] == "identical: yes (24 tokens, against the model in one piece)"


def test_a_demo_that_cannot_begin_says_why() -> None:
    with demo(SWARM_KEY="/no/such/file") as process:
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch("swarm: swarm key file .*; make one with `swarm key new`\n", errors)


def test_ctrl_c_ends_the_demo_quietly() -> None:
    """Nothing is left behind, either: conftest.py looks."""
    with demo("--tokens", "1500") as process:
        assert process.stdout is not None
        assert any(line.startswith("route: ") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")


def test_a_demo_that_is_not_identical_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swarm:
        closed = 0

        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            Swarm.closed += 1

    monkeypatch.setattr("swarm.cli.demo.LocalSwarm", Swarm)
    monkeypatch.setattr("swarm.cli.demo._import", lambda: None)
    monkeypatch.setattr("swarm.cli.demo._perform", lambda *_: {"identical": False})
    assert main(["demo"]) == 1
    assert Swarm.closed == 1


def view(*spans: str, model: str = "0" * 64, silent: bool = False) -> SwarmView:
    """One server for each span, of a model with four blocks."""
    records = [
        ServerRecord(
            peer_id=NOBODY.rpartition("/")[2],
            model=ModelId("m", model),
            blocks=BlockRange.parse(span),
            num_blocks=4,
            host="127.0.0.1",
            port=1,
            certificate_digest=bytes(32),
        )
        for span in spans
    ]
    return SwarmView(
        records[0].model,
        4,
        tuple(SignedRecord(record, b"") for record in records),
        frozenset({records[0].peer_id} if silent else ()),
    )


def test_health_says_when_blocks_are_missing() -> None:
    assert health(view("0:2", "2:4", "0:4")) == "healthy"
    assert health(view("0:2", "1:4")) == "degraded"
    assert health(view("0:2", "3:4")) == "broken"


def test_status_names_what_is_missing_silent_or_of_other_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    views = [view("0:2", "3:4", silent=True), view("0:4", model="1" * 64)]
    monkeypatch.setattr("swarm.cli.status.survey", lambda *_: views)
    assert main(["status", "--peers", NOBODY]) == 0
    broken, whole = capsys.readouterr().out.split(str(views[1].model))
    assert str(views[0].model) in broken
    assert "broken: nobody serves 2:3" in broken
    assert "silent" in broken
    assert "degraded" in whole
    assert "silent" not in whole
    assert main(["status", "--json", "--peers", NOBODY]) == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert first["name"] == second["name"]
    assert first["fingerprint"] != second["fingerprint"]
    assert (first["missing"], first["replicas"]) == (["2:3"], [1, 1, 0, 1])
    assert first["servers"][0]["silent"]
    assert set(first) == {
        *("name", "fingerprint", "num_blocks", "health", "missing", "replicas", "servers")
    }
    assert set(first["servers"][0]) == {
        *("blocks", "state", "silent", "address", "peer_id", "public_name", "dtype"),
        *("throughput", "queue", "free_tokens", "version", "adapters"),
    }


def test_a_text_breaks_between_words_on_a_terminal() -> None:
    screen = io.StringIO()
    show = _Show(Console(file=screen, force_terminal=True, width=12, highlight=False))
    for piece in ("In the", " beginning", " was", " the", " word"):
        show.text(piece)
    show.line("end")
    assert screen.getvalue() == "In the\nbeginning\nwas the\nword\nend\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("4096", 4096), ("3k", 3000)],
)
def test_amounts_of_memory_are_read_as_people_write_them(text: str, size: int) -> None:
    assert memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "much", "-2GB", "2GiBs", "9999TB", "1e9", "²GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="2GB or 512MiB"):
        memory(text)
