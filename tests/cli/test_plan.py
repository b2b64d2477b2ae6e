"""`swarm plan` reads a config and nothing else, and says all that it assumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from swarm.cli import main
from swarm.plan import GPUS, Assumptions
from swarm.server.throughput import Speeds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config without weights."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path / "eight")
    return tmp_path / "eight"


def test_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--json", "--sessions", "8", "--tokens", "4096"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["num_blocks"]) == ("eight", 32)
    assert found["block_bytes"] == 32 * 218_112_000 * 2
    assert found["cache_bytes_per_session"] == 32 * 2 * 8 * 128 * 2 * 4096
    assert [offer["machine"] for offer in found["offers"]] == [gpu.name for gpu in GPUS]
    first = found["offers"][0]
    assert first["machines"] == 2
    assert sum(first["blocks"]) == 32
    assert first["tokens_per_second_alone"] < first["tokens_per_second_together"]


def test_for_people_with_every_assumption(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", str(folder), "--gpu", "RTX 3090", "--rent", "0.5", "--rtt", "20"]) == 0
    text = capsys.readouterr().out
    assert "2 x RTX 3090" in text
    assert "RTX 4090" not in text
    assert "$730" in text
    assumed = Assumptions()
    for word in (
        *("90%", "1.5 GB", "50%", "3.3%", "0.3 ms", "2.0 ms", "4.4 ms", "20 ms", "100 for"),
        *("$0.3 a kWh", "730 hours", "not measured on these GPUs", "prompts come on top"),
    ):
        assert word in text, (word, assumed)


def test_a_machine_that_measured_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from swarm.models.demo import DEMO_MODEL

    speeds = {"": Speeds()}
    monkeypatch.setattr(
        "swarm.server.throughput.remembered",
        lambda key: speeds["" if key.split("\n")[1] != "12" else "12"],
    )
    line = ["plan", str(DEMO_MODEL), "--here", "--json", "--dtype", "float32"]
    speeds["12"] = Speeds()
    assert main(line) == 2
    assert "has not served 'demo' in float32 yet: start `swarm-server" in capsys.readouterr().err
    speeds["12"] = Speeds(alone=100.0, of_16=400.0)
    assert main(line) == 0
    here = json.loads(capsys.readouterr().out)["offers"][0]
    assert here["machine"].startswith("this machine")
    assert here["watts"] is here["rent_month"] is None
    computing = 24 / (100 * 12)
    assert here["tokens_per_second_alone"] == pytest.approx(
        1 / (computing + 0.002 + 0.0044 + 0.001), rel=1e-3
    )


def test_a_block_that_fits_nowhere_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    LlamaConfig(
        hidden_size=65536, intermediate_size=262144, num_hidden_layers=1, vocab_size=1
    ).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--gpu", "L4"]) == 0
    assert "a block does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("plan ./nothing-here", "there is no folder ./nothing-here"),
        ("plan --sessions 0", "'0' is no whole number from 1 to"),
        ("plan --rtt -1", "'-1' is no number from 0 to 10000"),
        ("plan --rtt=nan", "'nan' is no number from 0 to 10000"),
        ("plan --gpu Voodoo", "invalid choice: 'Voodoo'"),
    ],
)
def test_it_says_what_is_wrong(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err
