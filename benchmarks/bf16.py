"""What arithmetic in bfloat16 brings on this CPU, and what it costs: speed, memory and texts.

Where exactness is not promised, servers and clients may compute in it (`--dtype bfloat16`). It is
judged against float32, beside transformers in bfloat16 on one machine, which is not exact either.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.codec import agreeing, held_out, logits_of, perplexity
from benchmarks.figures import ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, connect, generate, timed
from benchmarks.memory import MIB, tree_bytes
from benchmarks.models import THIRDS
from benchmarks.streams import through_asyncio
from swarm import LocalSwarm

STREAMS = 16
WINDOWS = 8
HALF = ("--dtype", "bfloat16")


def measure(lab: Lab) -> None:
    for name in ("A", "B"):
        with LocalSwarm(lab.path(name), spans=THIRDS, server_args=HALF) as swarm:
            remote = connect(lab.path(name), swarm)
            generate(remote, lab.prompts(name, 1), 4)  # dials, and warms up
            _speed(lab, name, remote, 1)
            written = _speed(lab, name, remote, STREAMS)
            held = [tree_bytes(server.pid) / MIB for server in swarm.servers]
            lab.note(f"{name}, server, all its processes", "MiB", held)
            _texts(lab, name, remote, written)
        lab.clear()
    _reading(lab)


def _speed(lab: Lab, name: str, remote: Any, count: int) -> torch.Tensor:
    """By turns with servers in float32. Returns the last run's texts."""
    tokens = lab.tokens if name == "A" else lab.tokens // 2
    way = "1 stream" if count == 1 else f"{count} from asyncio"
    exact: list[float] = []
    half: list[float] = []
    written = torch.empty(0)
    for run in range(lab.runs):
        prompts = lab.prompts(name, count)
        texts, seconds = through_asyncio(lab.remote(name), prompts, tokens)
        lab.check(name, texts, PROMPT_TOKENS)
        exact.append(count * tokens / seconds)
        written, seconds = through_asyncio(remote, prompts, tokens)
        half.append(count * tokens / seconds)
        lab.say(f"{name}, {way}, tokens/s", run, half[-1])
    lab.note(f"{name}, {way}, bf16", "tok/s", half)
    lab.note(f"{name}, {way}, bf16 / float32", "x", ratios(half, exact))
    return written


def _texts(lab: Lab, name: str, remote: Any, written: torch.Tensor) -> None:
    """How many tokens float32 would not have written there, and how far logits are off."""
    exact = lab.local(name)
    local = copy.deepcopy(exact).bfloat16()
    new = written.shape[1] - PROMPT_TOKENS
    alone, seconds = timed(local, written[:1, :PROMPT_TOKENS], new)
    lab.note(f"{name}, one local stream, bf16", "tok/s", [new / seconds])
    alone = generate(local, written[:, :PROMPT_TOKENS], new)
    for who, model, texts in (("3 servers", remote, written), ("one machine", local, alone)):
        wanted = _logits(exact, texts)
        other = 100 * (wanted.argmax(-1) != texts[:, PROMPT_TOKENS:]).float().mean()
        lab.note(f"{name}, bf16, tokens that float32 would not write, {who}", "%", [float(other)])
        off = (_logits(model, texts) - wanted).abs().amax(-1) / wanted.std()
        lab.note(f"{name}, bf16, logits off by, {who}", "sd", off.flatten().tolist())


def _logits(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """[rows, new tokens, vocabulary] of the positions before every new token."""
    with torch.inference_mode():
        return model(texts, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].float()


def _reading(lab: Lab) -> None:
    """The bundled model on the text that its training did not see."""
    windows = held_out(2 if lab.quick else WINDOWS)
    exact = [logits_of(lab.local("demo"), window) for window in windows]
    lab.note("demo model, held-out perplexity, float32", "", [perplexity(exact, windows)])
    with LocalSwarm(spans=["0:8", "8:16", "16:24"], server_args=HALF) as swarm:
        remote = connect(None, swarm)
        logits = [logits_of(remote, window) for window in windows]
    lab.note("demo model, held-out perplexity, bf16", "", [perplexity(logits, windows)])
    lab.note("demo model, bf16, same best token", "%", [agreeing(logits, exact)])
