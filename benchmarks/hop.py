"""What a hop costs one stream beyond computing, and what a span costs cold and hot."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch

from benchmarks.figures import at_most, ratios
from benchmarks.lab import PROMPT_TOKENS, Lab, Stopwatch, generate
from swarm.messages import Output, Step
from swarm.transport import Endpoint, Stream, Transport
from swarm.wire import decode

HOPS = 3
TARGETS = {"A": at_most(0.7), "B": at_most(1.0)}
END_TO_END = {"A": at_most(1.5), "B": None}
PAUSES_MS = (0, 8, 30)


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame that passed; looked into only when all is over, as that takes time."""

    at: float
    peer_id: str
    frame: bytes


@dataclass
class Tap:
    """A transport that notes when which frames left the client and came back."""

    transport: Transport
    sent: list[Seen] = field(default_factory=list[Seen])
    received: list[Seen] = field(default_factory=list[Seen])

    async def open_stream(self, endpoint: Endpoint, method: str, timeout: float) -> Stream:
        stream = await self.transport.open_stream(endpoint, method, timeout)
        return TappedStream(stream, endpoint.peer_id, self)

    async def call(self, endpoint: Endpoint, method: str, request: bytes, timeout: float) -> bytes:
        return await self.transport.call(endpoint, method, request, timeout)

    async def close(self) -> None:
        await self.transport.close()

    def clear(self) -> None:
        self.sent.clear()
        self.received.clear()

    def steps(self) -> list[StepTimes]:
        """Every step of one token that was answered, in order."""
        answers: dict[int, list[tuple[Seen, Output]]] = {}
        for seen in self.received:
            message = decode(seen.frame)
            if isinstance(message, Output):
                answers.setdefault(message.step, []).append((seen, message))
        found: list[StepTimes] = []
        for seen in self.sent:
            message = decode(seen.frame)
            if not isinstance(message, Step) or message.hidden.shape[1] != 1:
                continue
            outputs = answers.get(message.step, [])
            last = [answer.at for answer, output in outputs if not output.pushed]
            if last:
                compute = sum(output.compute_ms for _, output in outputs)
                found.append(StepTimes(seen.at, last[0], compute, len(outputs)))
        return found


@dataclass(frozen=True, slots=True)
class TappedStream:
    """One of its streams."""

    stream: Stream
    peer_id: str
    tap: Tap

    async def send(self, frame: bytes) -> None:
        self.tap.sent.append(Seen(time.perf_counter(), self.peer_id, frame))
        await self.stream.send(frame)

    def send_nowait(self, frame: bytes) -> bool:
        at = time.perf_counter()
        taken = self.stream.send_nowait(frame)
        if taken:
            self.tap.sent.append(Seen(at, self.peer_id, frame))
        return taken

    async def receive(self) -> bytes | None:
        frame = await self.stream.receive()
        if frame is not None:
            self.tap.received.append(Seen(time.perf_counter(), self.peer_id, frame))
        return frame

    async def finish(self) -> None:
        await self.stream.finish()

    def cancel(self) -> None:
        self.stream.cancel()


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One token's way: seconds at which it left and came back; compute is of all its hops."""

    sent: float
    answered: float
    compute_ms: float
    hops: int


def measure(lab: Lab) -> None:
    for name in ("A", "B"):
        with tapped(lab.remote(name)) as tap:
            _overhead(lab, name, tap)
            _cold_and_hot(lab, name, tap)


@contextmanager
def tapped(model: Any) -> Generator[Tap]:
    """Inside, watch all that a model's new sessions send and receive."""
    blocks = model.remote_blocks
    before = blocks.connection
    tap = Tap(before.transport)
    blocks.connection = replace(before, transport=tap)
    try:
        yield tap
    finally:
        blocks.connection = before


def _overhead(lab: Lab, name: str, tap: Tap) -> None:
    """The median step of each run, taken apart."""
    here: list[float] = []
    parts: dict[str, list[float]] = {"step": [], "client": [], "compute": [], "hop": []}
    for run in range(lab.runs):
        prompt = lab.prompts(name, 1)
        watch = Stopwatch()
        generate(lab.local(name), prompt, lab.tokens, watch)
        here.append(median(watch.gaps))
        tap.clear()
        lab.check(name, generate(lab.remote(name), prompt, lab.tokens), PROMPT_TOKENS)
        for part, value in _parts(tap.steps()).items():
            parts[part].append(value)
        lab.say(f"{name}, overhead per hop, ms", run, parts["hop"][-1])
    lab.note(f"{name}, token, local", "ms", here)
    lab.note(f"{name}, token through {HOPS} servers", "ms", parts["step"])
    quotient = ratios(parts["step"], here)
    lab.note(f"{name}, token, {HOPS} servers / local", "x", quotient, END_TO_END[name])
    lab.note(f"{name}, of it in the client", "ms", parts["client"])
    lab.note(f"{name}, of it computing in the spans", "ms", parts["compute"])
    lab.note(f"{name}, overhead per hop", "ms", parts["hop"], TARGETS[name])


def _parts(steps: Sequence[StepTimes]) -> dict[str, float]:
    """Milliseconds of a step: all of it, the client's, computing, and the rest per hop; medians.

    Each is the median of its own, so they need not add up.
    """
    found: dict[str, list[float]] = {"step": [], "client": [], "compute": [], "hop": []}
    for step, following in pairwise(steps):
        if step.hops != HOPS:
            continue  # the end of the session cut copies for the history off
        away = 1e3 * (step.answered - step.sent)
        found["step"].append(1e3 * (following.sent - step.sent))
        found["client"].append(1e3 * (following.sent - step.answered))
        found["compute"].append(step.compute_ms)
        found["hop"].append((away - step.compute_ms) / HOPS)
    return {part: median(values) for part, values in found.items()}


def _cold_and_hot(lab: Lab, name: str, tap: Tap) -> None:
    """One span of four blocks, stepped at once or after a pause: its own word on what it took."""
    model, size = lab.remote(name), lab.local(name).config.hidden_size
    steps = 20 if lab.quick else 100
    for pause in PAUSES_MS:
        with torch.inference_mode(), model.remote_blocks[0:4].inference_session(512) as session:
            session.step(torch.randn(1, PROMPT_TOKENS, size, generator=lab.generator))
            tap.clear()
            for _ in range(steps):
                time.sleep(pause / 1e3)
                session.step(torch.randn(1, 1, size, generator=lab.generator))
            computed = [step.compute_ms for step in tap.steps()]
        how = f"after {pause} ms of idling" if pause else "at once"
        lab.note(f"{name}, span of 4 blocks, {how}", "ms", computed)
        lab.progress(f"{name}, span {how}: {mean(computed):.2f} ms")
