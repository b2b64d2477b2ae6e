"""The bundled model is what the demo promises: small, loadable as it is, and fluent."""

import json
import re
import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from swarm.models.demo import DEMO_MODEL

CHAPTERS = (DEMO_MODEL / "held_out.txt").read_text("utf-8").split("\n\n")  # unseen in training
EXCERPTS = [chapter[:1500] for chapter in CHAPTERS[5::15]]
METRICS: dict[str, Any] = json.loads((DEMO_MODEL / "metrics.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    return model.eval()


def generate(model: LlamaForCausalLM, inputs: Any, **how: Any) -> torch.Tensor:
    generation: Any = model  # pyright does not see GenerationMixin's protocol fulfilled
    return generation.generate(**inputs, **how)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_it_is_a_llama_of_24_blocks_that_loads_as_float32_and_fits_in_25_megabytes(
    model: LlamaForCausalLM,
) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert len(model.model.layers) == 24
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings >= 2048
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(f.stat().st_size for f in DEMO_MODEL.iterdir() if f.is_file()) <= 25e6


def test_it_reads_unseen_text_far_better_than_the_best_ngram(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    best = min(scores["perplexity"] for scores in METRICS["ngram"].values())
    assert METRICS["model"]["perplexity"] < 0.75 * best
    scores: list[torch.Tensor] = []
    for text in EXCERPTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(ids[:, :-1]).logits[0]
        scores.append(functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert torch.cat(scores).mean().exp() < 0.75 * best


def test_greedy_text_is_made_of_words_and_with_a_penalty_it_does_not_loop(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    prompts = ["In the beginning", "She had been", "And he said unto them"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    how: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.25}
    new = generate(model, inputs, max_new_tokens=40, **how)[:, inputs.input_ids.shape[1] :]
    known = set(re.findall(r"[a-z]+", " ".join(CHAPTERS).lower()))
    for text in tokenizer.batch_decode(new):
        words = re.findall(r"[a-z]+", text.lower())
        assert len(words) >= 20
        assert sum(word in known for word in words) >= 0.9 * len(words)
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        assert len(set(trigrams)) >= 0.7 * len(trigrams)


def test_it_reads_as_well_far_behind_its_usual_training_window(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    ids = tokenizer("\n\n".join(CHAPTERS[-3:]), return_tensors="pt").input_ids[:, :2048]
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits[0]
    nats = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert nats[512:1024].mean() < nats[:256].mean() + 0.3
    assert nats[1024:].mean() < nats[:256].mean() + 0.3


@pytest.mark.parametrize(
    "text", [EXCERPTS[0], "naïve 日本語 \t\n  two  blanks \U0001f642", " a", ""]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_the_ones_the_config_names(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 1
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == model.config.vocab_size
