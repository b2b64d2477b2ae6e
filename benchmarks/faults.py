"""Steps that fail by lot: a client's transport whose streams break, and what it costs a text."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.figures import at_least
from benchmarks.lab import PROMPT_TOKENS, Lab, Stopwatch, connect, generate
from swarm import LocalSwarm
from swarm.errors import PeerUnavailable, SwarmError
from swarm.messages import Output
from swarm.transport import Endpoint, Stream, Transport
from swarm.wire import decode

TOKENS = 1024
TARGETS = {0.0: None, 1e-3: at_least(90), 1e-2: at_least(60)}


@dataclass
class Faulty:
    """A transport on which each answer to a step is lost with probability `chance`, and its stream
    with it, in both directions, as when a connection dies. The server lives."""

    transport: Transport
    dice: random.Random
    chance: float
    failures: int = 0

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        return FaultyStream(await self.transport.open_stream(endpoint, method, timeout), self)

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        return await self.transport.call(endpoint, method, request, timeout)

    async def close(self) -> None:
        await self.transport.close()


@dataclass(slots=True)
class FaultyStream:
    """One of its streams."""

    stream: Stream
    faults: Faulty

    async def send(self, frame: bytes) -> None:
        await self.stream.send(frame)

    def send_nowait(self, frame: bytes) -> bool:
        return self.stream.send_nowait(frame)

    async def receive(self) -> bytes | None:
        frame = await self.stream.receive()
        if frame is None or not isinstance(decode(frame), Output):
            return frame
        if self.faults.dice.random() >= self.faults.chance:
            return frame
        self.faults.failures += 1
        self.stream.cancel()
        raise PeerUnavailable("this failure was injected")

    async def finish(self) -> None:
        await self.stream.finish()

    def cancel(self) -> None:
        self.stream.cancel()


@contextmanager
def faulty(model: Any, dice: random.Random, chance: float) -> Generator[Faulty]:
    """Inside, what a model's new sessions are told gets lost by lot."""
    blocks = model.remote_blocks
    before = blocks.connection
    faults = Faulty(before.transport, dice, chance)
    blocks.connection = replace(before, transport=faults)
    try:
        yield faults
    finally:
        blocks.connection = before


def measure(lab: Lab, swarm: LocalSwarm) -> None:
    """With every chance by turns, on the same prompt."""
    distributed = connect(None, swarm)
    tokens = TOKENS // 8 if lab.quick else TOKENS
    dice = random.Random(lab.seed)
    rates: dict[float, list[float]] = {chance: [] for chance in TARGETS}
    failures: dict[float, list[float]] = {chance: [] for chance in TARGETS}
    pauses: dict[float, list[float]] = {chance: [] for chance in TARGETS}
    for run in range(lab.runs):
        prompt = lab.prompts("demo", 1)
        for chance in TARGETS:
            with faulty(distributed, dice, chance) as faults:
                watch = Stopwatch()
                finished = _generate(lab, distributed, prompt, tokens, watch)
            seconds = watch.times[-1] - watch.begin
            rates[chance].append(tokens / seconds if finished else 0.0)
            failures[chance].append(float(faults.failures))
            pauses[chance].append(max(watch.gaps))
            lab.say(f"{faults.failures} failures, tokens/s", run, rates[chance][-1])
    lab.note(f"{tokens} tokens, no failures", "/s", rates[0.0])
    for chance, target in TARGETS.items():
        if chance:
            kept = [100 * a / b for a, b in zip(rates[chance], rates[0.0], strict=True)]
            lab.note(f"steps/s kept, p = {chance:g}", "%", kept, target)
            lab.note("failures in it", "", failures[chance])
        lab.note("longest step in it", "ms", pauses[chance])


def _generate(lab: Lab, model: Any, prompt: Any, tokens: int, watch: Stopwatch) -> bool:
    """Whether it came to its end."""
    try:
        sequences = generate(model, prompt, tokens, watch)
    except SwarmError as error:
        lab.progress(f"after {len(watch.times)} tokens: {error}")
        return False
    lab.check("demo", sequences, PROMPT_TOKENS)
    return True
