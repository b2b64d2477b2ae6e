"""Eight clients with eight different adapters on one server, against the same load without any."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import at_least, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, check_tokens, connect, generate
from swarm import LocalSwarm

CLIENTS = 8
KINDS: dict[str, dict[str, Any]] = {
    "rank 8 in q and v": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank 16 in all layers": {"r": 16, "target_modules": "all-linear"},
}
_SPREAD = 0.05  # of their factors: large enough that all eight write other tokens


def measure(lab: Lab) -> None:
    local = copy.deepcopy(lab.local("A"))
    with LocalSwarm(lab.path("A"), spans=["0:12"]) as swarm:
        models = [connect(lab.path("A"), swarm) for _ in range(CLIENTS)]
        for kind, options in KINDS.items():
            _compare(lab, kind, options, local, models)
    lab.clear()


def _compare(lab: Lab, kind: str, options: dict[str, Any], local: Any, models: list[Any]) -> None:
    names = [f"{options['r']} {client}" for client in range(CLIENTS)]
    for client, name in enumerate(names):
        folder = _write(lab, local, name, client, options)
        models[client].load_adapter(str(folder), name)
        models[client].set_adapter(name)
    plain: list[float] = []
    adapted: list[float] = []
    for run in range(lab.runs + 1):  # the first one dials, and sends the adapters
        prompts = lab.prompts("A", CLIENTS)
        for with_adapters, found in ((False, plain), (True, adapted)):
            sequences, seconds = _all_at_once(models, prompts, lab.tokens, with_adapters)
            if run:
                found.append(CLIENTS * lab.tokens / seconds)
            for name, sequence in zip(names, sequences, strict=True):
                _switch(local, with_adapters, name)
                lab.ties += check_tokens(local, sequence, PROMPT_TOKENS)
                lab.checked += lab.tokens
        if run:
            lab.say(f"A, {kind}, share of that without", run - 1, adapted[-1] / plain[-1])
    lab.note(f"A, {CLIENTS} clients without adapters", "tok/s", plain)
    lab.note(f"A, {CLIENTS} adapters of {kind}", "tok/s", adapted)
    name = f"A, {CLIENTS} adapters of {kind} / without"
    lab.note(name, "x", ratios(adapted, plain), at_least(0.6))


def _write(lab: Lab, local: Any, name: str, client: int, options: dict[str, Any]) -> Path:
    """An adapter as PEFT saves it, which stays in the local model."""
    from peft import LoraConfig  # takes seconds

    local.add_adapter(LoraConfig(**options), name)
    generator = torch.Generator().manual_seed(lab.seed + client)
    for path, parameter in local.named_parameters():
        if f".{name}." in path:
            parameter.data.normal_(0, _SPREAD, generator=generator)
    local.set_adapter(name)
    folder = lab.folder / f"adapter {name}"
    local.save_pretrained(folder)
    return folder


def _switch(model: Any, on: bool, name: str) -> None:
    if on:
        model.enable_adapters()
        model.set_adapter(name)
    else:
        model.disable_adapters()


def _all_at_once(
    models: list[Any], prompts: torch.Tensor, tokens: int, on: bool
) -> tuple[list[torch.Tensor], float]:
    for model in models:
        if on:
            model.enable_adapters()
        else:
            model.disable_adapters()
    with ThreadPoolExecutor(len(models)) as pool:
        begin = time.perf_counter()
        work = [
            pool.submit(generate, model, prompt, tokens)
            for model, prompt in zip(models, prompts.split(1), strict=True)
        ]
        sequences = [each.result() for each in work]
        return sequences, time.perf_counter() - begin
