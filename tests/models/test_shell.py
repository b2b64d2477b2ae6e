"""A shell is the family's own class, holds no blocks, and hands on what the caller gave."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from swarm.models.shell import ShellCache, make_shell
from tests.models.splits import text
from tests.models.tiny import LAYERS, tiny_config, tiny_model


class Echo:
    """A remote stack that adds one, and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, hidden: Tensor, *, extras: Mapping[str, Tensor], **given: Any) -> Tensor:
        assert not extras
        self.calls.append({"thread": threading.get_ident(), "rows": hidden.shape[0], **given})
        return hidden + 1


def shell(family: str = "llama") -> tuple[PreTrainedModel, Echo]:
    model, echo = tiny_model(family), Echo()
    make_shell(model, echo)
    return model, echo


def test_it_is_the_familys_own_class_without_blocks() -> None:
    model, _ = shell()
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers == LAYERS
    weights = {name for name, _ in model.named_parameters()}
    assert weights == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_mask_positions_and_cache_arrive_as_they_were_given() -> None:
    model, echo = shell()
    mask, places = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[0, 0, 1], [0, 1, 2]])
    cache = ShellCache()
    model(
        text(2, 3), attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
    )
    call = echo.calls[0]
    assert call["attention_mask"] is mask
    assert call["position_ids"] is places
    assert call["past_key_values"] is cache


def test_the_models_own_forward_surrounds_the_blocks() -> None:
    model, _ = shell("granite")
    ids = text(1, 4)
    inner: Any = model.base_model
    hidden = inner.embed_tokens(ids) * inner.embedding_multiplier + 1
    expected = model.lm_head(inner.norm(hidden)) / model.config.logits_scaling
    assert torch.allclose(model(ids).logits, expected)


def test_learned_positions_count_from_the_sessions_length() -> None:
    model, _ = shell("gpt2")
    inner: Any = model.base_model
    ids, cache = text(1, 1), ShellCache()
    cache.length = 7
    got = model(ids, past_key_values=cache, use_cache=True).logits
    hidden = inner.wte(ids) + inner.wpe(torch.tensor([[7]])) + 1
    assert torch.allclose(got, model.lm_head(inner.ln_f(hidden)))


def test_threads_do_not_see_each_others_arguments() -> None:
    model, echo = shell()
    barrier = threading.Barrier(4)

    def call(rows: int) -> None:
        barrier.wait()
        for _ in range(20):
            model(text(rows, 2), attention_mask=torch.ones(rows, 2))

    threads = [threading.Thread(target=call, args=(rows,)) for rows in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(echo.calls) == 80
    assert all(call["rows"] == call["attention_mask"].shape[0] for call in echo.calls)


def test_other_heads_and_none_work_too() -> None:
    config = tiny_config("llama")
    config.num_labels = 3
    classifier: Any = AutoModelForSequenceClassification.from_config(config)
    make_shell(classifier, Echo())
    assert classifier(text(2, 5) + 3).logits.shape == (2, 3)
    bare = LlamaModel(classifier.config)  # which the shell has left as it was
    make_shell(bare, Echo())
    assert bare(text(2, 5)).last_hidden_state.shape == (2, 5, config.hidden_size)
    assert bare.config.num_hidden_layers == LAYERS


def test_the_auto_class_is_left_alone() -> None:
    shell()
    ids = text(1, 3)
    fresh = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    assert fresh(ids).logits.shape == (1, 3, fresh.config.vocab_size)
