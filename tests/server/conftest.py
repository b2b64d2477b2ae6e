"""A town that the tests of one file share; after each test nobody is owed anything. And a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.server.choice import ServerConfig
from tests.server.stranger import Stranger, Talk, assert_same, expected_of, hidden_of
from tests.server.town import Town


@pytest.fixture(scope="module")
def shared() -> Iterator[Town]:
    with Town() as town:
        yield town


@pytest.fixture
def town(shared: Town) -> Iterator[Town]:
    """Somebody else's session goes on whatever a test does, and all memory comes back."""
    text = hidden_of(shared.local, 6, seed=7)
    bystander: Talk = shared.run(Stranger(shared.swarm, client=96).open(shared.server))
    shared.run(bystander.ask(text[:, :4]))
    yield shared
    got = shared.run(bystander.ask(text[:, 4:]))
    assert_same(got, expected_of(shared.local, text[:, :4], text[:, 4:]))
    shared.swarm.on_loop(bystander.stream.cancel)
    shared.run(shared.honest())
    shared.swarm.assert_quiet()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        vocab_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config(model: Path) -> ServerConfig:
    return ServerConfig(model=model, host="127.0.0.1", device="cpu")
