#!/usr/bin/env python3
"""Whether what we compute on a GPU is right, and how quick: to be run first where there is one.

    python scripts/check_gpu.py             # some minutes; without torch.compile: --quick

It needs torch, transformers, pydantic and this repository; no network, no model, none of our other
dependencies. Where the project's device tool is lent, here in the repository's root, once:

    echo /.whl/ >> .git/info/exclude
    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \\
      --implementation cp --platform manylinux2014_x86_64 -d .whl $(grep -E requirements.lock \\
      -e "^(transformers|pydantic(_core)?|annotated-types|typing-inspection)==")

and, with `.whl` in `carry` and a timeout of 600 s, there:

    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \\
      --target /tmp/site .whl/*.whl && PYTHONPATH=/tmp/site python3 scripts/check_gpu.py

First small random models of several families: sessions that join, leave, and share passes with a
prompt, plain and captured, float32 and bfloat16, against the CPU in float32. Then some blocks of a
7B-class model in bfloat16: milliseconds per pass of 1 to 32 rows, plain, captured, and compiled.
Ends with 1 if anything was wrong. `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.models.pages import PAGE
from swarm.models.replay import WIDTHS, Captured, Way
from swarm.models.spans import Span, SpanCache, SpanStep, SplitProof
from swarm.models.stripping import strip
from swarm.server.compiling import try_out, ways_of
from swarm.types import BlockRange

_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}
_WINDOW = {"sliding_window": 100}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": _WINDOW,
    "gemma2": _WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# As of Llama 3.1 8B, with few words.
_LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
}
# Of the largest number: what a float32 chain must keep to, and what bfloat16 rounds away.
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def make(model: Any, device: torch.device, dtype: torch.dtype) -> Span:
    """All blocks of a copy of it."""
    mine = copy.deepcopy(model).to(device, dtype).eval()
    blocks = BlockRange(0, mine.config.num_hidden_layers)
    strip(mine, blocks)
    return Span(mine, blocks, SplitProof(can_batch=True, can_rewind=True))


def outputs(span: Span) -> Tensor:
    """Of a little history: always the same, whoever computes it."""
    draw = torch.Generator().manual_seed(0)
    found: list[Tensor] = []

    def step(*texts: tuple[SpanCache, int]) -> None:
        steps = [
            SpanStep(cache, torch.randn(cache.batch_size, tokens, span.hidden_size, generator=draw))
            for cache, tokens in texts
        ]
        moved = [SpanStep(s.cache, s.hidden.to(span.device, span.dtype)) for s in steps]
        found.extend(output.float().cpu().flatten() for output in span.run(moved))

    def opened(rows: int, tokens: int) -> SpanCache:
        cache = span.open_cache(span.blocks, rows, 16 * PAGE)
        step((cache, tokens))
        return cache

    sessions = [opened(1, 3), opened(3, PAGE - 2), opened(1, 5 * PAGE)]
    for turn in range(24):
        step(*[(cache, 1) for cache in sessions])
        if turn == 6:
            sessions.pop(0).release()
            sessions += [opened(2, 7), opened(1, PAGE)]
        if turn == 12:
            step((sessions[0], 1), (sessions[1], 70), (sessions[2], 4))
    span.store.check_integrity()
    return torch.cat(found)


def check(family: str, device: torch.device) -> bool:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SMALL | _FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so large that every part of a block shows
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    expected = outputs(make(model, torch.device("cpu"), torch.float32))
    way = Captured(device) if device.type == "cuda" else Way()
    good = True
    for dtype, allowed in _ALLOWED.items():
        for name in ("plain", way.name):
            span = make(model, device, dtype)
            if name != "plain":
                span.replays.ways = dict.fromkeys(WIDTHS, way)
            got = outputs(span)
            wrong = float((got - expected).abs().max() / expected.abs().max())
            # An error gives them up; and what never ran would agree with anything.
            still = name == "plain" or bool(span.replays.ways and span.store.recordings)
            ok = wrong <= allowed and still
            verdict = "ok" if ok else "WRONG" if still else "FAILED"
            print(f"{family:12} {dtype!s:15} {name:9} off by {wrong:.1e}  {verdict}", flush=True)
            good = good and ok
    return good


def race(blocks: int, device: torch.device, *, quick: bool, small: bool) -> bool:
    """True if whatever could be tried was exact."""
    sizes = _LARGE | {"num_hidden_layers": blocks} if not small else _SMALL
    config = AutoConfig.for_model("llama", **sizes)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    span = make(model, device, dtype)
    span.store.budget = 4 << 30
    ways = ways_of("auto" if quick else "on", device)
    trials = try_out(span, ways)
    print(f"\n{config.num_hidden_layers} blocks of {config.hidden_size}, {dtype}: ms per pass")
    print(f"{'rows':>4} {'way':24} {'plain':>8} {'it':>8} {'times':>6}  kept")
    for trial in trials:
        way = span.replays.ways.get(trial.rows)
        kept = "yes" if way is not None and way.name == trial.name else "no"
        times = trial.plain_ms / trial.ms
        row = f"{trial.plain_ms:8.2f} {trial.ms:8.2f} {times:6.2f}  {kept}"
        print(f"{trial.rows:4} {trial.name:24} {row}{'' if trial.exact else ', WRONG'}")
    if device.type == "cuda":
        held = torch.cuda.max_memory_reserved(device) / 2**30
        print(f"{torch.cuda.get_device_name(device)}, at most {held:.1f} GiB reserved")
    return all(trial.exact for trial in trials) and bool(trials or not ways)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=8, help="of the large model")
    parser.add_argument("--quick", action="store_true", help="do not compile")
    parser.add_argument("--only", choices=_FAMILIES, help="one family")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(given.device)
    print(f"torch {torch.__version__}, {device}", flush=True)
    good = [check(family, device) for family in ([given.only] if given.only else _FAMILIES)]
    good.append(race(given.blocks, device, quick=given.quick, small=device.type == "cpu"))
    print("all is well" if all(good) else "SOMETHING IS WRONG")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
