"""What a token costs more through `swarm-api`, and how 64 streams of one process share it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from benchmarks.figures import NoFigure, at_least, at_most, quartiles
from benchmarks.lab import Lab

NAME = "demo"  # also what its folder is called, and so the model
SPANS = ("0:8", "8:16", "16:24")
STREAMS = 64


@dataclass(frozen=True, slots=True)
class Heard:
    """One stream as its reader saw it: seconds from first to last token, and since it asked."""

    tokens: int
    flowing: float
    whole: float

    @property
    def ms(self) -> float:
        """Per token."""
        return 1e3 * self.flowing / (self.tokens - 1)


def measure(lab: Lab) -> None:
    model, prompts = lab.remote(NAME, SPANS), lab.prompts(NAME, STREAMS)
    with _api(lab) as url:
        asyncio.run(_through_api(url, prompts[:1], 4))  # dials, and warms up
        added, ours, theirs = list[float](), list[float](), list[float]()
        for run in range(lab.runs):
            prompt = prompts[run : run + 1]
            theirs.append(asyncio.run(_directly(model, prompt, lab.tokens))[0].ms)
            ours.append(asyncio.run(_through_api(url, prompt, lab.tokens))[0].ms)
            added.append(ours[-1] - theirs[-1])
            lab.say("added ms per token", run, added[-1])
        lab.note("a token from Python", "ms", theirs)
        lab.note("a token from swarm-api", "ms", ours)
        lab.note("what HTTP adds to a token", "ms", added, at_most(1))
        _together(lab, url, model, prompts)


def _together(lab: Lab, url: str, model: Any, prompts: torch.Tensor) -> None:
    shares, rates, direct = list[float](), list[float](), list[float]()
    for run in range(lab.runs):
        begun = time.perf_counter()
        heard = asyncio.run(_directly(model, prompts, lab.tokens))
        direct.append(sum(one.tokens for one in heard) / (time.perf_counter() - begun))
        begun = time.perf_counter()
        heard = asyncio.run(_through_api(url, prompts, lab.tokens))
        rates.append(sum(one.tokens for one in heard) / (time.perf_counter() - begun))
        speeds = [one.tokens / one.whole for one in heard]
        shares.append(min(speeds) / quartiles(speeds)[1])
        lab.say(f"slowest of {STREAMS} / median", run, shares[-1])
    lab.note(f"{STREAMS} streams from Python", "tok/s", direct)
    lab.note(f"{STREAMS} streams from swarm-api", "tok/s", rates)
    lab.note(f"slowest of {STREAMS} streams / median", "x", shares, at_least(0.5))


@contextmanager
def _api(lab: Lab) -> Generator[str]:
    """A process of its own, as people start it; its address."""
    model, peers = str(lab.path(NAME)), lab.swarm(NAME, SPANS).peers
    command = [sys.executable, "-m", "swarm", "api", model, "--port", "0", "--peers", *peers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line.startswith("listening on "):
                raise NoFigure(f"swarm-api said '{line}'")
            yield line.removeprefix("listening on ")
        finally:
            process.terminate()


async def _directly(model: Any, prompts: torch.Tensor, tokens: int) -> list[Heard]:
    async def read(prompt: torch.Tensor) -> Heard:
        asked, times = time.perf_counter(), list[float]()
        async for _ in model.stream(prompt, max_new_tokens=tokens, do_sample=False):
            times.append(time.perf_counter())
        return _heard(asked, times, tokens)

    return await asyncio.gather(*map(read, prompts.split(1)))


async def _through_api(url: str, prompts: torch.Tensor, tokens: int) -> list[Heard]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:

        async def read(prompt: torch.Tensor) -> Heard:
            body = {
                "model": NAME,
                "prompt": prompt[0].tolist(),
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "logprobs": 0,  # so that also tokens without text have an event
            }
            asked, times = time.perf_counter(), list[float]()
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
                        choice = json.loads(line[6:])["choices"][0]
                        if choice["finish_reason"]:
                            times.pop()
            return _heard(asked, times, tokens)

        return await asyncio.gather(*map(read, prompts.split(1)))


def _heard(asked: float, times: list[float], tokens: int) -> Heard:
    if len(times) < tokens // 2:  # the model may end a text, but not all that early
        raise NoFigure(f"a stream gave {len(times)} of {tokens} tokens")
    return Heard(len(times), times[-1] - times[0], times[-1] - asked)
