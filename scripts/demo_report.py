"""Measures the demo model against an n-gram baseline, and writes metrics.json and the card."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpus import PACKAGES, SOURCES, Corpus
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "swarm" / "models" / "demo"
ORDERS = (3, 4, 5)
WINDOW = 1024  # tokens the model sees at once when its held-out loss is measured
PROMPTS = (
    "In the beginning",
    "And it came to pass in those days, that",
    "The Lord is my",
    "She had been",
    '"My dear Mr. Bennet,"',
)
LONG_PROMPTS = ("Now in the third year of the reign of",)  # 700 tokens
PENALTY = {"repetition_penalty": 1.25}
Keys = NDArray[np.int64]


def encode(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Tensor:
    """All texts as one stream of int32 token ids, a blank line between chapters."""
    ids = [i for e in tokenizer.encode_batch([t + "\n" for t in texts]) for i in e.ids]
    return torch.tensor(ids, dtype=torch.int32)


class KneserNey:
    """Interpolated Kneser-Ney (Ney, Essen & Kneser 1994), one discount per order."""

    def __init__(self, stream: Keys, order: int, bits: int) -> None:
        self.bits, self.tables = bits, []
        grams, counts = np.unique(pack(stream, order, bits), return_counts=True)
        for length in range(order, 0, -1):
            self.tables.append(table(grams, counts, bits))
            # below the top an n-gram counts once per different word before it
            grams, counts = np.unique(grams & ((1 << bits * (length - 1)) - 1), return_counts=True)
        self.tables.reverse()

    def nats(self, stream: Keys) -> float:
        """Mean nats per token of stream, from the first token with a whole context on."""
        order = len(self.tables)
        keys = pack(stream, order, self.bits)
        chance = np.full(len(keys), 1.0 / (1 << self.bits))
        for length, (grams, counts, contexts, totals, kinds, discount) in enumerate(self.tables, 1):
            gram = keys & ((1 << self.bits * length) - 1)
            count, (total, kind) = (
                look_up(grams, gram, counts)[0],
                look_up(contexts, gram >> self.bits, totals, kinds),
            )
            seen = total > 0
            total = np.maximum(total, 1)
            mixed = (np.maximum(count - discount, 0) + discount * kind * chance) / total
            chance = np.where(seen, mixed, chance)
        return float(-np.log(chance).mean())


def pack(stream: Keys, length: int, bits: int) -> Keys:
    """Every n-gram of stream as one integer, its last token in the lowest bits."""
    size = len(stream) - length + 1
    return sum(
        (stream[i : i + size] << bits * (length - 1 - i) for i in range(length)),
        np.zeros(size, np.int64),
    )


def table(grams: Keys, counts: Keys, bits: int) -> tuple[Keys, Keys, Keys, Keys, Keys, float]:
    """N-grams and counts; contexts with their totals and their number of next tokens."""
    contexts, starts, kinds = np.unique(grams >> bits, return_index=True, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / max(1, once + 2 * twice)
    return grams, counts, contexts, np.add.reduceat(counts, starts), kinds, discount


def look_up(keys: Keys, wanted: Keys, *values: Keys) -> list[Keys]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[place] == wanted
    return [np.where(found, column[place], 0) for column in values]


@torch.inference_mode()
def model_nats(model: Any, stream: Tensor) -> float:
    """Mean nats per token of stream[N], in windows that do not see each other."""
    total = 0.0
    for start in range(0, len(stream) - 1, WINDOW):
        window = stream[start : start + WINDOW + 1].long()
        logits = model(window[None, :-1]).logits[0].float()
        total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


def sample(model: Any, tokenizer: Any, prompts: tuple[str, ...], **how: Any) -> dict[str, str]:
    """What the model makes of each prompt, all in one left-padded batch."""
    torch.manual_seed(0)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    texts = tokenizer.batch_decode(model.generate(**inputs, **how), skip_special_tokens=True)
    return dict(zip(prompts, texts, strict=True))


def evaluate(folder: Path, corpus: Corpus) -> None:
    """Write metrics.json (machine-readable), held_out.txt and README.md (the card)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    train = encode(tokenizer.backend_tokenizer, corpus.train)
    held_out = encode(tokenizer.backend_tokenizer, corpus.held_out)
    bits = math.ceil(math.log2(len(tokenizer)))
    size = sum(len(text.encode()) + 1 for text in corpus.held_out)
    per_byte = len(held_out) / size / math.log(2)

    def score(nats: float) -> dict[str, float]:
        return {
            "nats_per_token": round(nats, 4),
            "bits_per_byte": round(nats * per_byte, 4),
            "perplexity": round(math.exp(nats), 2),
        }

    numbers = train.numpy().astype(np.int64), held_out.numpy().astype(np.int64)
    baselines = {n: KneserNey(numbers[0], n, bits).nats(numbers[1]) for n in ORDERS}
    path = folder / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    metrics |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train": {"chapters": len(corpus.train), "tokens": len(train)},
        "held_out": {"chapters": len(corpus.held_out), "tokens": len(held_out), "bytes": size},
        "model": score(model_nats(model, held_out)),
        "ngram": {str(n): score(nats) for n, nats in baselines.items()},
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    (folder / "held_out.txt").write_text("\n".join(corpus.held_out), "utf-8")
    plain = sample(model, tokenizer, PROMPTS, max_new_tokens=40, do_sample=False)
    greedy = sample(model, tokenizer, PROMPTS, max_new_tokens=60, do_sample=False, **PENALTY)
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    drawn = sample(model, tokenizer, PROMPTS, max_new_tokens=80, **how)
    long = sample(model, tokenizer, LONG_PROMPTS, max_new_tokens=700, **how)
    (folder / "README.md").write_text(card(folder, metrics, (plain, greedy, drawn | long)), "utf-8")
    print((folder / "README.md").read_text("utf-8"))


def card(folder: Path, metrics: dict[str, Any], samples: tuple[dict[str, str], ...]) -> str:
    """The model card, every figure from `metrics`, every sample from the model."""
    megabytes = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) / 1e6
    training, held = metrics["training"], metrics["held_out"]
    rows = [("this model", metrics["model"])]
    rows += [(f"{n}-gram, interpolated Kneser-Ney", s) for n, s in metrics["ngram"].items()]
    lines = [
        f"| {name} | {s['nats_per_token']:.3f} | {s['perplexity']:.1f} | {s['bits_per_byte']:.3f} |"
        for name, s in rows
    ]
    sources = [f"| {title} | `{package}` | {licence} |" for title, package, licence in SOURCES]

    def quote(samples: dict[str, str]) -> str:
        return "\n\n".join(
            f"**{prompt}**\n\n" + "\n".join(f"> {line}" for line in text.splitlines())
            for prompt, text in samples.items()
        )

    return CARD.format(
        megabytes=f"{megabytes:.1f}",
        parameters=f"{metrics['parameters']:,}",
        sources="\n".join(sources),
        packages=", ".join(PACKAGES),
        train_tokens=f"{metrics['train']['tokens']:,}",
        seen_tokens=f"{training['tokens']:,}",
        epochs=f"{training['tokens'] / metrics['train']['tokens']:.1f}",
        minutes=f"{training['wall_minutes']:.0f}",
        cpu_minutes=f"{training['cpu_minutes']:.0f}",
        steps=f"{training['steps']:,}",
        blocks=training["blocks"],
        windows=training["windows"],
        held_tokens=f"{held['tokens']:,}",
        held_chapters=held["chapters"],
        window=WINDOW,
        rows="\n".join(lines),
        plain=quote(samples[0]),
        greedy=quote(samples[1]),
        drawn=quote(samples[2]),
        penalty=PENALTY["repetition_penalty"],
    )


CARD = """\
---
language: en
license: cc0-1.0
library_name: transformers
pipeline_tag: text-generation
---
# swarm-demo

The model that ships with swarm, so that the demo, the tests and a bare `swarm-server` have
something to say without a download. LlamaForCausalLM, 24 blocks, {parameters} parameters (input
and output embeddings tied), a byte-level BPE tokenizer of its own, {megabytes} MB in all. It writes
sentences in the manner of its three sources; it knows nothing and follows no instructions.

Weights are stored as bfloat16, and `from_pretrained` loads them as float32 (`dtype` in
config.json). Positions go up to 2,048. Of its special tokens, `<|endoftext|>` (0) is the end, and
`<|pad|>` (1) pads on the left; training saw no end, so the text goes on for as long as one asks.

## Text and licence

| text | Debian package | licence |
|---|---|---|
{sources}

The model was trained on nothing else, from random weights, and is given to the public domain
(CC0). `scripts/demo_corpus.py` fetches the packages ({packages})
and cleans the text: verse numbers, chapter headings and Gutenberg's underscores go; a paragraph is
a line.

## Training

`python scripts/train_demo_model.py` on a shared CPU, in one thread while others were busy:
{seen_tokens} tokens in {steps} steps ({epochs} times the {train_tokens} tokens of the training
split), {minutes} minutes by the clock, {cpu_minutes} CPU minutes.

* Blocks: {blocks}. Copies start with a small share of their original's output.
* Tokens per window: {windows}.
* Matrices are trained with Muon, the rest with AdamW; the rate stays for the first half of the
  time, and then falls to zero.

## Held-out loss

{held_chapters} whole chapters ({held_tokens} tokens), one in 33, were kept out of training. The
model sees windows of {window} tokens that do not overlap; the n-grams are counted on the same
training tokens. `metrics.json` has the same figures, `held_out.txt` is that text.

| | nats per token | perplexity | bits per byte |
|---|--:|--:|--:|
{rows}

## Samples

Sampled (temperature 0.8, top-p 0.95, seed 0), 80 tokens, and the last one 700:

{drawn}

Greedy with `repetition_penalty={penalty}`, 60 tokens:

{greedy}

Plainly greedy, 40 tokens; the model is small, and falls into loops that the penalty prevents:

{plain}

Everything on this page is written by `python scripts/train_demo_model.py --evaluate`.
"""
