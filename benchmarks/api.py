"""What a token costs more through `swarm-api`, and how 64 streams of one process share it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from threading import Thread
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer

from benchmarks.figures import NoFigure, at_least, at_most
from benchmarks.lab import Lab
from swarm.api.app import Api
from swarm.api.engine import Engine
from swarm.api.keys import Keyring
from swarm.listening import running
from swarm.models.demo import DEMO_MODEL

NAME = "demo"  # also what its folder is called, and so the model
SPANS = ("0:8", "8:16", "16:24")
STREAMS = 64


@dataclass(frozen=True, slots=True)
class Heard:
    """One stream as its reader saw it."""

    tokens: int
    seconds: float


class _Noting:
    """A model whose streams note when the API has each token: that is what Python would have."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.times: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def stream(self, *arguments: Any, **options: Any) -> Any:
        return _NotingStream(self._model.stream(*arguments, **options), self.times)


class _NotingStream:
    def __init__(self, stream: Any, times: list[float]) -> None:
        self._stream, self._times = stream, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aiter__(self) -> AsyncGenerator[Any]:
        async for token in self._stream:
            self._times.append(time.monotonic())
            yield token


def measure(lab: Lab) -> None:
    model, prompts = lab.remote(NAME, SPANS), lab.prompts(NAME, STREAMS)
    _delay(lab, model)
    with _process(lab) as url:
        asyncio.run(_through_api(url, prompts[:1], 4))  # dials, and warms up
        _together(lab, url, model, prompts)


def _delay(lab: Lab, model: Any) -> None:
    """From where a Python program has a token to where a reader of HTTP has it, elsewhere."""
    noting, delays = _Noting(model), list[float]()
    with _thread(Engine(NAME, noting, AutoTokenizer.from_pretrained(DEMO_MODEL), 1024)) as url:
        for run in range(lab.runs):
            noting.times.clear()
            command = [sys.executable, "-m", "benchmarks.reader", url, NAME, str(lab.tokens)]
            said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            read = json.loads(said)
            pairs = zip(noting.times, read, strict=False)  # the end of a text has no event
            delays.append(median(1e3 * (there - here) for here, there in pairs))
            lab.say("ms that HTTP adds to a token", run, delays[-1])
    lab.note("what HTTP adds to a token", "ms", delays, at_most(1))


@contextmanager
def _thread(engine: Engine) -> Generator[str]:
    """The API in this process."""
    begun, ended, loop = Future[str](), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        async with running(Api({NAME: engine}, Keyring()).app, "127.0.0.1", 0) as url:
            begun.set_result(url)
            await ended.wait()

    thread = Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield begun.result(30)
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def _together(lab: Lab, url: str, model: Any, prompts: torch.Tensor) -> None:
    shares, rates, direct = list[float](), list[float](), list[float]()
    for run in range(lab.runs):
        begun = time.perf_counter()
        heard = asyncio.run(_directly(model, prompts, lab.tokens))
        direct.append(sum(one.tokens for one in heard) / (time.perf_counter() - begun))
        begun = time.perf_counter()
        heard = asyncio.run(_through_api(url, prompts, lab.tokens))
        rates.append(sum(one.tokens for one in heard) / (time.perf_counter() - begun))
        speeds = [one.tokens / one.seconds for one in heard]
        shares.append(min(speeds) / median(speeds))
        lab.say(f"slowest of {STREAMS} / median", run, shares[-1])
    lab.note(f"{STREAMS} streams from Python", "tok/s", direct)
    lab.note(f"{STREAMS} streams from swarm-api", "tok/s", rates)
    lab.note(f"slowest of {STREAMS} streams / median", "x", shares, at_least(0.5))


@contextmanager
def _process(lab: Lab) -> Generator[str]:
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
    return Heard(len(times), times[-1] - asked)
