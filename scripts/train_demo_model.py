"""Train the bundled demo model from scratch on a CPU: tokenizer, weights, model card.

The schedule follows the wall clock, so a busy machine costs tokens and not the deadline. Needs
Debian's apt-get and a C++ compiler (torch.compile), or `--corpus FILE` and a C++ compiler.

    python scripts/train_demo_model.py --minutes 90     train, export, evaluate
    python scripts/train_demo_model.py --evaluate       measure the folder, write the card again
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from demo_corpus import Corpus, load_corpus
from demo_net import Net, Optimizer, Rates, Shape
from demo_report import DEFAULT_FOLDER, encode, evaluate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch._inductor import config as inductor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
MAX_POSITIONS = 2048


@dataclass(frozen=True)
class Log:
    """Where a run stands; `began` is in seconds since the epoch."""

    began: float
    steps: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The run: shares of the budget at which blocks are added, windows grow, the rate falls."""

    minutes: float
    batch_tokens: int = 4096
    depths: tuple[tuple[float, int], ...] = ((0.0, 6), (0.85, 24))
    windows: tuple[tuple[float, int], ...] = ((0.0, 256), (0.73, 1024))
    warmup: float = 0.01
    decay_from: float = 0.5
    rates: Rates = field(default_factory=Rates)
    seed: int = 2

    def rate(self, progress: float) -> float:
        """The learning rate's factor: warm up, stay, fall in a line to zero."""
        falling = (1 - progress) / (1 - self.decay_from)
        return max(0.0, min(1.0, progress / self.warmup, falling))

    @staticmethod
    def stage(stages: tuple[tuple[float, int], ...], progress: float) -> int:
        return [value for start, value in stages if progress >= start][-1]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(stream: Tensor, tokens: int, window: int, random: torch.Generator) -> Iterator[Tensor]:
    """Windows [B, window + 1] of the stream for ever; each epoch cuts and shuffles anew."""
    while True:
        start = int(torch.randint(window, (), generator=random))
        windows = stream[start:].unfold(0, window + 1, window)
        for rows in torch.randperm(len(windows), generator=random).split(tokens // window):
            if len(rows) == tokens // window:
                yield windows[rows].long()


class Threads:
    """Uses the second core only while nobody else wants it (measured every 5 s on Linux)."""

    def __init__(self) -> None:
        inductor.cpp.dynamic_threads = True
        self.last, self.since = self._ticks(), time.monotonic()

    @staticmethod
    def _ticks() -> tuple[float, float]:
        own = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        user, nice, system = Path("/proc/stat").read_text("ascii").split()[1:4]
        return int(user) + int(nice) + int(system) - own, os.sysconf("SC_CLK_TCK")

    def adapt(self) -> None:
        seconds = time.monotonic() - self.since
        if seconds < 5:
            return
        now = self._ticks()
        others = (now[0] - self.last[0]) / now[1] / seconds
        self.last, self.since = now, time.monotonic()
        torch.set_num_threads(2 if others < 0.25 else 1)


def train(
    shape: Shape, plan: Plan, corpus: Corpus, tokenizer: Tokenizer, work: Path
) -> tuple[Net, Log]:
    """Train until the plan's minutes are over; a run that was cut goes on from its checkpoint."""
    stream, held_out = (encode(tokenizer, texts) for texts in (corpus.train, corpus.held_out))
    torch.manual_seed(plan.seed)
    optimizer, log = Optimizer(Net(shape, plan.depths[0][1]), plan.rates), Log(time.time())
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        optimizer, log = restore(checkpoint, shape, plan.rates)
    net, threads = optimizer.net, Threads()
    random = torch.Generator().manual_seed(plan.seed + log.steps)
    window, source = 0, iter(())
    before = log.cpu_seconds - time.process_time()
    saved = time.time()
    while (progress := (time.time() - log.began) / (60 * plan.minutes)) < 1:
        if (blocks := plan.stage(plan.depths, progress)) != net.blocks:
            optimizer.grow(blocks)
        if (size := plan.stage(plan.windows, progress)) != window:
            window, source = size, batches(stream, plan.batch_tokens, size, random)
        rows = next(source)
        threads.adapt()
        value = net(rows[:, :-1], rows[:, 1:])
        value.backward()
        optimizer.step(plan.rate(progress))
        log = replace(
            log,
            steps=log.steps + 1,
            tokens=log.tokens + plan.batch_tokens,
            cpu_seconds=before + time.process_time(),
        )
        if log.steps % 50 == 0:
            held = (
                f" held-out {quick_loss(net, held_out, window):.3f}" if log.steps % 200 == 0 else ""
            )
            print(
                f"{progress:6.1%} step {log.steps} blocks {net.blocks} window {window} "
                f"threads {torch.get_num_threads()} {log.tokens / 1e6:.2f} M tokens "
                f"loss {value.item():.3f}{held}",
                flush=True,
            )
        if time.time() - saved > 120:
            save_checkpoint(checkpoint, optimizer, log)
            saved = time.time()
    save_checkpoint(checkpoint, optimizer, log)
    return net, log


@torch.no_grad()
def quick_loss(net: Net, held_out: Tensor, window: int) -> float:
    """Nats per token on the first 16 Ki held-out tokens, in windows of the training length."""
    rows = held_out[: 16_384 + 1].long()
    inputs, targets = rows[:-1].view(-1, window), rows[1:].view(-1, window)
    pairs = zip(inputs.split(8192 // window), targets.split(8192 // window), strict=True)
    values = [net(i, t).item() for i, t in pairs]
    return sum(values) / len(values)


def save_checkpoint(path: Path, optimizer: Optimizer, log: Log) -> None:
    state = {
        "net": optimizer.net.state_dict(),
        "momentum": optimizer.momentum,
        "adam": optimizer.adam.state_dict(),
        "log": asdict(log),
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def restore(path: Path, shape: Shape, rates: Rates) -> tuple[Optimizer, Log]:
    state: dict[str, Any] = torch.load(path)
    optimizer = Optimizer(Net(shape, len(state["net"]["norms"])), rates)
    optimizer.net.load_state_dict(state["net"])
    optimizer.momentum = state["momentum"]
    optimizer.adam.load_state_dict(state["adam"])
    return optimizer, Log(**state["log"])


def export(net: Net, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what from_pretrained reads: weights in bfloat16, loaded as float32."""
    shape = net.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = net.tensors()
    model.load_state_dict(weights | {"lm_head.weight": net.embedding}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model.bfloat16().save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    text = json.dumps(stored | {"dtype": "float32"}, indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )
    fast.save_pretrained(folder)


def write_training(folder: Path, plan: Plan, log: Log) -> None:
    """Leave in metrics.json what only the run knows; evaluate() adds the rest."""

    def stages(stages: tuple[tuple[float, int], ...]) -> str:
        return ", then ".join(f"{value} (from {start:.0%} of the time)" for start, value in stages)

    training = {
        "steps": log.steps,
        "tokens": log.tokens,
        "wall_minutes": plan.minutes,
        "cpu_minutes": round(log.cpu_seconds / 60, 1),
        "batch_tokens": plan.batch_tokens,
        "blocks": stages(plan.depths),
        "windows": stages(plan.windows),
        "seed": plan.seed,
    }
    text = json.dumps({"training": training}, indent=2) + "\n"
    (folder / "metrics.json").write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=90, help="wall-clock budget")
    parser.add_argument("--corpus", type=Path, nargs="*", default=[], help="text files to use")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("demo-model-work"), help="checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="only measure and write the card")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.corpus)
    if not arguments.evaluate:
        arguments.work.mkdir(parents=True, exist_ok=True)
        shape, plan = Shape(), Plan(arguments.minutes)
        tokenizer = train_tokenizer(list(corpus.train), shape.vocab_size)
        net, log = train(shape, plan, corpus, tokenizer, arguments.work)
        export(net, tokenizer, arguments.folder)
        write_training(arguments.folder, plan, log)
    evaluate(arguments.folder, corpus)


if __name__ == "__main__":
    main()
