"""What people may copy from examples/ runs from top to bottom, on real processes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from swarm.client.network import SwarmNetwork

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = {  # here they need not learn
    "STEPS = 40": "STEPS = 2",
    "PASSAGES = 64": "PASSAGES = 8",
    "train_batch_size=16": "train_batch_size=4",
    '["0:8", "8:16", "16:24"]': '["0:12", "12:24"]',
}


def cells(name: str) -> list[str]:
    notebook = json.loads((EXAMPLES / name).read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names: dict[str, Any] = {}
    try:
        for source in cells("finetune.ipynb"):
            for usual, here in FEW.items():
                source = source.replace(usual, here)
            exec(compile(source, "finetune.ipynb", "exec"), names)  # noqa: S102  # it is ours
    finally:
        SwarmNetwork.leave_all()
        names["house"].close()
    assert names["STEPS"] == 2
    assert names["trainer"].state.global_step == 2
    assert names["after"]["eval_loss"] != names["before"]["eval_loss"]
    assert (tmp_path / "finetuned" / "model.safetensors").stat().st_size < 20_000


def test_the_clients_of_the_example_share_no_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example: Any = import_module("federated")

    def texts(items: list[dict[str, Any]]) -> list[tuple[int, ...]]:
        return [tuple(item["input_ids"].tolist()) for item in items]

    everything = example.passages(example.PASSAGES)
    quarters = [texts(example.share(everything, client)) for client in range(example.CLIENTS)]
    assert sorted(text for quarter in quarters for text in quarter) == sorted(texts(everything))
    assert {len(quarter) for quarter in quarters} == {example.PASSAGES // example.CLIENTS}
    places = [set(quarter) for quarter in quarters]
    held_out = set(texts(example.passages(example.HELD_OUT, skip=example.PASSAGES)))
    for index, place in enumerate([*places, held_out]):
        assert not place.intersection(*[set().union(*places[:index])])
