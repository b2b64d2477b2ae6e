"""The API on a real port, over a model that says what a test wants, or over a swarm in here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import openai
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from swarm.api.app import Api, ApiConfig
from swarm.api.engine import Engine
from swarm.api.keys import Grant, Keyring
from swarm.client.sampling import Token
from swarm.errors import SessionClosed
from swarm.listening import running
from swarm.models.demo import DEMO_MODEL
from swarm.types import BlockRange
from tests.client.pairs import shell_of
from tests.inprocess import InProcessSwarm, Server, span_of

KEY = "sk-of-the-tests-0123456789"


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


class FakeStream:
    """Gives its tokens when `gate` lets it, and then raises `failure` if there is one."""

    def __init__(self, script: Script, ids: Sequence[int]) -> None:
        self._script, self._ids = script, list(ids)
        self.hops: list[Any] = script.hops
        self.recoveries = 0
        self.given = 0
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens()

    async def _tokens(self) -> AsyncIterator[Token]:
        for token in self._ids:
            while self.given >= self._script.allowed and not self.cancelled.is_set():
                self._wake.clear()
                await self._wake.wait()
            if self.cancelled.is_set():
                raise SessionClosed("the stream was cancelled")
            self.given += 1
            yield Token(token, -0.5, ((token, -0.5), (3, -1.5)))
        if self._script.failure is not None:
            raise self._script.failure

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self._wake.set)

    def cancel(self) -> None:
        self.cancelled.set()
        self._wake.set()


@dataclass
class Script:
    """What every stream says, and how far it may go."""

    text: str = " of the world"
    allowed: int = 1 << 30  # tokens of each stream
    failure: Exception | None = None
    ends: bool = False  # with the token that ends texts
    hops: list[Any] = field(default_factory=list[Any])
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    streams: list[FakeStream] = field(default_factory=list[FakeStream])
    missing: list[str] = field(default_factory=list[str])

    def allow(self, tokens: int) -> None:
        self.allowed = tokens
        for stream in self.streams:
            stream.go_on()


class FakeModel:
    """As much of a distributed model as the API sees."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.config = AutoConfig.from_pretrained(DEMO_MODEL)
        self.generation_config = GenerationConfig.from_pretrained(DEMO_MODEL)
        view = SimpleNamespace(missing_blocks=lambda: script.missing)
        router = SimpleNamespace(view=view)
        self.remote_blocks = SimpleNamespace(connection=SimpleNamespace(router=router))

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=self.config.vocab_size)

    def stream(self, ids: torch.Tensor, **options: Any) -> FakeStream:
        self.script.asked.append({"ids": ids[0].tolist(), **options})
        words = tokenizer()(self.script.text, add_special_tokens=False).input_ids
        words = words[: options["max_new_tokens"]]
        ending = [tokenizer().eos_token_id] if self.script.ends else []
        stream = FakeStream(self.script, words + ending)
        self.script.streams.append(stream)
        return stream


def fake_api(script: Script, *grants: Grant, **config: Any) -> Api:
    engine = Engine("fake", FakeModel(script), tokenizer(), 1024)
    return Api({"fake": engine}, Keyring(grants), ApiConfig(**config))


@contextmanager
def serving(make: Callable[[], Api]) -> Generator[str]:
    """The address of the API, which runs in a thread of its own."""
    address: list[str] = []
    begun = threading.Event()
    stop: list[Callable[[], object]] = []

    async def run() -> None:
        api, ended, loop = make(), asyncio.Event(), asyncio.get_running_loop()
        async with running(api.app, "127.0.0.1", 0) as url:
            stop.append(lambda: loop.call_soon_threadsafe(ended.set))
            address.append(url)
            begun.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="api")
    thread.start()
    assert begun.wait(20)
    try:
        yield address[0]
    finally:
        stop[0]()
        thread.join(20)
        assert not thread.is_alive()


def client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


class DemoSwarm:
    """The bundled model on servers in this process; two hold the middle."""

    SPANS = ((0, 8), (8, 16), (8, 16), (16, 24))

    def __init__(self) -> None:
        self.local: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
        self.swarm = InProcessSwarm()
        spans = [span_of(self.local, *ends) for ends in self.SPANS]
        for span in spans:
            self.swarm.add(span)
        router: Any = self.swarm.router
        router.view = SimpleNamespace(missing_blocks=tuple)
        self.blocks = self.swarm.blocks(spans[0], BlockRange(0, 24))
        self.model = shell_of(self.local, self.blocks)

    def api(self, **config: Any) -> Api:
        engine = Engine("swarm-demo", self.model, tokenizer(), 1024)
        return Api({"swarm-demo": engine}, Keyring(), ApiConfig(**config))

    def busy_middle(self) -> Server:
        """Who computes blocks 8:16 of the text that is being written."""
        [server] = [one for one in self.swarm.servers[1:3] if one.handler.sessions]
        return server

    def reference(self, text: str, seed: int | None = None, **options: Any) -> str:
        """What transformers makes of a prompt on one machine."""
        ids = tokenizer()(text, return_tensors="pt").input_ids
        if seed is not None:
            torch.manual_seed(seed)
        whole = self.local.generate(ids, do_sample=seed is not None, top_k=0, **options)
        return tokenizer().decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
