"""Tab completes our commands in a real shell."""

from __future__ import annotations

import subprocess

import pytest

from swarm.cli import main
from swarm.cli.completion import parsers


def bash(script: str, words: str) -> list[str]:
    """What bash would offer after `words`; the script is read as `eval "$(swarm completion bash)"`
    does."""
    *before, last = words.split(" ")
    ask = (
        f"{script}\n"
        f"COMP_WORDS=({' '.join(before)} '{last}'); COMP_CWORD={len(before)}\n"
        f'COMP_LINE="{words}"; COMP_POINT={len(words)}\n'
        f'"$(complete -p {before[0]} | sed "s/.*-F \\([^ ]*\\).*/\\1/")" {before[0]} "{last}" x\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", ask], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.split()


@pytest.fixture(scope="module")
def script() -> str:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        assert main(["completion", "bash"]) == 0
    return out.getvalue()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("swarm sta", {"status"}),
        ("swarm status --wa", {"--watch"}),
        ("swarm plan --gp", {"--gpu"}),
        ("swarm server --met", {"--metrics-port", "--metrics-host"}),
        ("swarm-server --dty", {"--dtype"}),
        ("swarm-server --dtype bf", {"bfloat16"}),
        ("swarm-dht --log-format j", {"json"}),
        ("swarm completion ", {"bash", "zsh"}),
    ],
)
def test_bash_offers_what_fits(script: str, words: str, offered: set[str]) -> None:
    assert offered <= set(bash(script, words))


def test_every_command_is_offered(script: str) -> None:
    assert set(parsers()) <= set(bash(script, "swarm "))


@pytest.mark.parametrize("command", ["swarm", "swarm-server", "swarm-dht"])
def test_zsh_gets_a_file_per_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh", "--command", command]) == 0
    assert capsys.readouterr().out.startswith(f"#compdef {command}\n")
