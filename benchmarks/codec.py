"""What compressing hidden states on the wire saves, and what it costs the bundled model's texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.hop import tapped
from benchmarks.lab import PROMPT_TOKENS, Lab, connect, generate
from swarm import LocalSwarm
from swarm.models.demo import DEMO_MODEL
from swarm.types import Codec

WINDOW = 1024  # tokens; as the model's card measures it
WINDOWS = 16
TEXTS = 32
CODECS: tuple[Codec, ...] = ("none", "mxint8")


def measure(lab: Lab) -> None:
    lab.clear()
    windows = held_out(2 if lab.quick else WINDOWS)
    local: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    exact = [logits_of(local, window) for window in windows]
    prompts = torch.cat(windows, dim=1)[:, : TEXTS * PROMPT_TOKENS].reshape(TEXTS, PROMPT_TOKENS)
    expected = generate(local, prompts, lab.tokens)
    lab.note("held-out perplexity, local", "", [perplexity(exact, windows)])
    with LocalSwarm(spans=["0:8", "8:16", "16:24"]) as swarm:
        for codec in CODECS:
            remote = connect(None, swarm, codec)
            logits = [logits_of(remote, window) for window in windows]
            lab.note(f"{codec}, held-out perplexity", "", [perplexity(logits, windows)])
            lab.note(f"{codec}, same best token, same text before", "%", [agreeing(logits, exact)])
            written = generate(remote, prompts, lab.tokens)
            lab.note(f"{codec}, tokens until a text differs", "", _until(written, expected))
            lab.note(f"{codec}, bytes per token, the client's", "B", _bytes(lab, remote, prompts))
            lab.progress(codec)
    lab.clear()


def held_out(count: int) -> list[torch.Tensor]:
    """Windows [1, WINDOW] of the text that the model was not trained on."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = (DEMO_MODEL / "held_out.txt").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return list(ids[:, : count * WINDOW].split(WINDOW, dim=1))


def logits_of(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Before every token but the first: [WINDOW - 1, vocabulary]."""
    with torch.inference_mode():
        return model(window, use_cache=False).logits[0, :-1].float()


def perplexity(logits: Sequence[torch.Tensor], windows: Sequence[torch.Tensor]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(found, window[0, 1:])
        for found, window in zip(logits, windows, strict=True)
    ]
    return math.exp(float(torch.stack(losses).mean()))


def agreeing(logits: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    same = torch.cat(list(logits)).argmax(-1) == torch.cat(list(exact)).argmax(-1)
    return 100 * float(same.float().mean())


def _until(written: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Of each row, tokens in common before the first other one; all of them if none is."""
    same = (written == expected)[:, PROMPT_TOKENS:].int()
    return same.cumprod(dim=1).sum(dim=1).float().tolist()


def _bytes(lab: Lab, model: Any, prompts: torch.Tensor) -> list[float]:
    """All frames between the client and all servers: a step out, three copies back."""
    with tapped(model) as tap:
        generate(model, prompts[:1], lab.tokens)
        frames = [seen.frame for seen in (*tap.sent, *tap.received)]
    return [sum(map(len, frames)) / (PROMPT_TOKENS + lab.tokens)]
