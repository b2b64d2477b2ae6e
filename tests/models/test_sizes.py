"""Sizes read off a config are those of the model that it describes."""

from __future__ import annotations

import pytest

from swarm.models.sizes import measure_sizes
from swarm.types import BlockRange
from tests.inprocess import span_of
from tests.models.tiny import LAYERS, tiny_model


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "qwen3_moe", "bloom", "mistral", "gpt_oss"]
)
def test_they_are_those_of_a_real_span(family: str) -> None:
    model = tiny_model(family)
    sizes = measure_sizes(model.config)
    assert len(sizes.blocks) == LAYERS
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(block.weights for block in sizes.blocks) + sizes.ends == whole
    span = span_of(model, 0, LAYERS)
    store = span.store
    token = store.token_bytes // store.dtype.itemsize
    assert sum(block.kept for block in sizes.blocks) == token
    windows = {kind.window for kind in store.kinds(BlockRange(0, LAYERS))}
    assert {block.window for block in sizes.blocks} == windows


def test_a_token_meets_a_part_of_a_mixture_only() -> None:
    config = tiny_model("qwen3_moe").config
    block = measure_sizes(config).blocks[0]
    experts = sum(
        p.numel()
        for n, p in tiny_model("qwen3_moe").model.layers[0].named_parameters()
        if ".experts." in n
    )
    share = config.num_experts_per_tok / config.num_experts
    assert 0 < share < 1
    assert block.active == block.weights - experts + round(experts * share)
    dense = measure_sizes(tiny_model("llama").config).blocks[0]
    assert dense.active == dense.weights
