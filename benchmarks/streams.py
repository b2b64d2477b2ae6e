"""Many greedy streams of one process at once: from threads, and through the asyncio API."""

from __future__ import annotations

import asyncio
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
    """The same from a coroutine per row, in one thread and an event loop of our own."""

    async def read(prompt: torch.Tensor) -> list[int]:
        stream = model.stream(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return [token.id async for token in stream]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*map(read, prompts.split(1)))

    begin = time.perf_counter()
    new = asyncio.run(read_all())
    seconds = time.perf_counter() - begin
    return torch.cat([prompts, torch.tensor(new)], dim=1), seconds


def has_asyncio(model: Any) -> bool:
    return hasattr(model, "stream")
