"""Many greedy streams of one process at once: from threads, and through the asyncio API."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from benchmarks.lab import generate

Streams = Callable[[Any, torch.Tensor, int], tuple[torch.Tensor, float]]


def from_threads(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """One `generate` call and one thread per row: [rows, length + tokens], and seconds."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        begin = time.perf_counter()
        rows = list(pool.map(partial(generate, model, tokens=tokens), prompts.split(1)))
        return torch.cat(rows), time.perf_counter() - begin


def through_asyncio(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """The same from coroutines of one thread. To be filled in when the client has such an API."""
    raise NotImplementedError


def has_asyncio(model: Any) -> bool:
    return False
