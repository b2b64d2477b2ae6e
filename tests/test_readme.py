"""What README.md and docs/ tell people to type exists, and their map shows the house as it is."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from swarm.cli import main
from swarm.cli.api import api_parser
from swarm.cli.monitor import monitor_parser
from swarm.cli.serve import dht_parser, server_parser
from swarm.errors import CheckpointError
from tests.client.pairs import Pair, prompt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(language: str, text: str = README) -> list[str]:
    return [code for name, code in BLOCK.findall(text) if name == language]


def commands() -> list[list[str]]:
    """Lines of blocks without a language that begin with a command of ours."""
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    ours = [line for line in lines if re.match(r"(scripts/\w+|swarm(-\w+)?)( |$)", line)]
    return [shlex.split(line, comments=True) for line in ours]


def test_every_command_is_there() -> None:
    names = {words[0] for words in commands()}
    assert {"scripts/demo", "scripts/test", "scripts/check", "swarm-server", "swarm-dht"} <= names
    for name in names:
        assert (
            name in ("swarm", "swarm-server", "swarm-dht", "swarm-monitor", "swarm-api")
            or (ROOT / name).is_file()
        )


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    match words[0]:
        case "swarm-server":
            server_parser().parse_args(words[1:])
        case "swarm-dht":
            dht_parser().parse_args(words[1:])
        case "swarm-api":
            api_parser().parse_args(words[1:])
        case "swarm-monitor":
            monitor_parser().parse_args(words[1:])
        case "swarm":
            pass  # test_subcommands_exist
        case script:
            assert (ROOT / script).stat().st_mode & 0o111


def test_subcommands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`swarm key new` and its like: their own --help answers."""
    for command in {words[1] for words in commands() if words[0] == "swarm"} | {"demo"}:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        assert f"usage: swarm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = BLOCK.sub("", (ROOT / page).read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        assert not parts.path or ((ROOT / page).parent / parts.path).exists(), link
        assert not parts.fragment or parts.path or parts.fragment in anchors, link


def test_the_map_names_every_file() -> None:
    """A newcomer finds all of the house in it, and nothing that has gone."""
    text = README.split("## The map")[1].split("\n## ")[0]
    named = re.findall(r"^(\S+\.py)\s", "".join(blocks("", text)), re.M)
    mapped = [(ROOT / name).resolve() for name in named]  # client/hop.py is swarm/client/hop.py
    files = [path for path in (ROOT / "swarm").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(mapped) == sorted(files)


def test_connecting_gets_as_far_as_the_hub() -> None:
    """The names and arguments of the first lines exist; tests have no Hub to ask for the model."""
    with pytest.raises(CheckpointError, match="Qwen/Qwen3-8B"):
        exec(blocks("python")[0], {})  # noqa: S102


def test_the_stream_for_asyncio_runs_as_it_stands() -> None:
    pair, said = Pair("llama", seed=1), list[tuple[Any, ...]]()
    with pair.swarm:
        names: dict[str, Any] = {"model": pair.model, "print": lambda *words: said.append(words)}
        exec(blocks("python")[2], names)  # noqa: S102
        ids = asyncio.run(names["tell"](prompt()))
    assert [token for token, _, _ in said] == ids[0, prompt().shape[1] :].tolist()
    assert len(said) == 100
    assert all(logprob < 0 and len(top) == 2 for _, logprob, top in said)


def test_the_quickstart_runs_as_it_stands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[1]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("In the beginning ")
    assert any(line.startswith("['0:8 at ") for line in lines)
