"""What a machine can carry is measured once, remembered, and never believed blindly."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import OutOfPages
from swarm.models.manifest import note_path
from swarm.models.pages import PAGE
from swarm.server import throughput
from swarm.server.backend import Backend
from swarm.server.executor import Executor
from swarm.server.serving import _Held, _measure
from swarm.server.throughput import (
    SHAPES,
    Speeds,
    measure,
    remember,
    remembered,
    speeds_key,
)
from tests.inprocess import span_of
from tests.models.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path))


def test_every_shape_of_pass_is_measured_and_gives_its_pages_back() -> None:
    span = span_of(tiny_model("llama"), 0, 2)
    speeds = Speeds(**{name: measure(span, *shape) for name, shape in SHAPES.items()})
    assert speeds.alone > 0
    assert speeds.of_16 > speeds.alone  # together they get more
    assert "tokens/s for one session" in str(speeds)
    assert span.store.used == 0


def test_what_finds_no_memory_is_not_measured() -> None:
    span = span_of(tiny_model("llama"), 0, 2)
    span.store.budget = 2 * PAGE * span.store.token_bytes
    assert measure(span, *SHAPES["alone"]) > 0
    with pytest.raises(OutOfPages):
        measure(span, *SHAPES["of_16"])
    assert span.store.used == 0


@pytest.mark.parametrize("error", [OutOfPages, torch.OutOfMemoryError])
def test_a_device_without_memory_for_a_trial_goes_on_without(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waited for ever for the figure, and never looked whether to move."""
    handler: Any = None
    span = span_of(tiny_model("llama"), 0, 2)

    def fail(*_: object) -> float:
        raise error("no memory")

    async def go() -> float:
        executor = Executor(Backend(span), 64)
        executor.start()
        try:
            async with asyncio.timeout(5):
                return await _measure(_Held(span, Speeds(), executor, handler), 16, 1)
        finally:
            await executor.stop()

    monkeypatch.setattr(throughput, "measure", fail)
    assert asyncio.run(go()) == 0.0


def test_what_was_measured_is_remembered_for_the_same_span_and_machine_only() -> None:
    key = speeds_key("ab" * 32, 8, "float32", CPU)
    assert remembered(key) == Speeds()
    speeds = Speeds(1.5, 20.0, 6.0, 400.0)
    remember(key, speeds)
    assert remembered(key) == speeds
    assert remembered(speeds_key("ab" * 32, 9, "float32", CPU)) == Speeds()
    assert remembered(speeds_key("ab" * 32, 8, "bfloat16", CPU)) == Speeds()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}x", '{"alone": -1.0}', '{"alone": "fast"}', '{"alone": NaN}', '{"x": 1.0}'],
)
def test_a_note_that_is_damaged_is_measured_again(text: str) -> None:
    path = note_path("speeds", "key")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert remembered("key") == Speeds()
