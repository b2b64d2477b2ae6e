"""The app: who asks, whose turn it is, and what comes back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from swarm.api.answers import Usage, Writer, shape_of
from swarm.api.asked import MAX_CHOICES, Asked, ChatAsked, CompletionAsked, read
from swarm.api.engine import Engine, Engines, Prompt, engine_for
from swarm.api.keys import Caller, Keyring
from swarm.api.meters import Meters
from swarm.api.turns import Turns
from swarm.api.writing import Item, Piece, write
from swarm.errors import SwarmError, UsageError
from swarm.metrics import CONTENT_TYPE
from swarm.web import EventStream, HttpProblem, WebApp, WebLimits

logger = logging.getLogger(__name__)
T = TypeVar("T")

STATIC = Path(__file__).parent / "static"

_FIRST_SECONDS = 5.0  # for the first sign of an answer, whose failure still has a status of its own
_STOPPED = HttpProblem(503, "this server is being stopped", kind="server_error", code="stopped")


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """What one API grants."""

    streams: int = 128  # at a time, over all models
    waiting: int = 128  # requests of one caller
    patience: float = 30.0  # seconds that a request waits for its turn
    body_bytes: int = 1 << 21
    cors: Sequence[str] = ()
    hosts: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class _Order:
    """A request that may be carried out."""

    caller: Caller
    engine: Engine
    asked: Asked
    prompts: Sequence[Prompt]
    writer: Writer
    usage: Usage

    @property
    def choices(self) -> int:
        return len(self.prompts) * (self.asked.n or 1)


@dataclass
class Api:
    engines: Engines
    keyring: Keyring
    config: ApiConfig = field(default_factory=ApiConfig)

    def __post_init__(self) -> None:
        config = self.config
        self.turns = Turns(config.streams, config.waiting, config.patience)
        self.meters = Meters()
        self.app = WebApp(
            [
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/healthz", self.health),
                Route("/metrics", self.metrics),
            ],
            static=STATIC,
            limits=WebLimits(body_bytes=config.body_bytes),
            cors=config.cors,
            hosts=config.hosts,
        )

    async def models(self, request: Request) -> Response:
        self._caller(request)
        return JSONResponse(
            {"object": "list", "data": [_description(engine) for engine in self.engines.values()]}
        )

    async def model(self, request: Request) -> Response:
        self._caller(request)
        return JSONResponse(_description(engine_for(self.engines, request.path_params["name"])))

    async def health(self, _request: Request) -> Response:
        """That we are alive; whether blocks are missing is the swarm's health, told beside it."""
        missing = {name: engine.missing() for name, engine in self.engines.items()}
        status = "degraded" if any(missing.values()) else "ok"
        return JSONResponse({"status": status, "missing_blocks": missing})

    async def metrics(self, _request: Request) -> Response:
        page = self.meters.page(self.turns)
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatAsked)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionAsked)

    async def _answer(self, request: Request, kind: type[Asked]) -> Response:
        begun = time.monotonic()
        try:
            order = await self._order(request, kind)
            items = self._carried_out(order, begun)
            if not order.asked.stream:
                return JSONResponse(await _unless_gone(request, self._whole(order, items)))
            sending = _Sending(order.writer, items)
            await _unless_gone(request, sending.begin())
            return EventStream(sending.chunks(), farewell=_STOPPED.event())
        except HttpProblem as problem:
            self.meters.refusals[problem.status] += 1
            raise

    async def _order(self, request: Request, kind: type[Asked]) -> _Order:
        """Raises HttpProblem for all that can be known to be wrong before it is begun."""
        caller = self._caller(request)
        if not request.headers.get("content-type", "").startswith("application/json"):
            # Any web page can have a browser send other types here, without asking us first.
            raise HttpProblem(415, "send JSON, with 'Content-Type: application/json'")
        asked = read(kind, await request.body())
        engine = engine_for(self.engines, asked.model)
        caller.check(asked.n or 1, time.monotonic())
        texts: Sequence[str] = [""]
        if isinstance(asked, ChatAsked):
            prompts: Sequence[Prompt] = [await engine.read_chat(asked.messages, asked)]
        else:
            assert isinstance(asked, CompletionAsked)
            prompts, texts = await _completion_prompts(engine, asked)
        usage = Usage(sum(len(prompt.ids) for prompt in prompts))
        writer = Writer(shape_of(engine, asked), asked, usage, texts)
        return _Order(caller, engine, asked, prompts, writer, usage)

    async def _carried_out(self, order: _Order, begun: float) -> AsyncGenerator[Item | None]:
        """None when its turn has come, then what is written. Raises HttpProblem, whatever goes
        wrong."""
        caller, usage = order.caller, order.usage
        caller.check(order.choices, time.monotonic())

        def count(tokens: int) -> None:
            usage.count(tokens)
            caller.budget.take(tokens, time.monotonic())
            self.meters.completion_tokens += tokens

        async with self.turns.turn(caller, order.choices):
            caller.budget.take(usage.prompt, time.monotonic())
            self.meters.began(usage.prompt)
            yield None
            try:
                items = write(order.engine, order.prompts, order.asked, count)
                async with aclosing(items):
                    async for item in items:
                        if begun and isinstance(item, Piece):
                            self.meters.first_token.observe(time.monotonic() - begun)
                            begun = 0.0
                        yield item
            except Exception as error:
                self.meters.failures += 1
                raise _problem_of(error, order.engine) from error

    async def _whole(self, order: _Order, items: AsyncGenerator[Item | None]) -> Mapping[str, Any]:
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Piece):
                    order.writer.take(item)
        return order.writer.whole()

    def _caller(self, request: Request) -> Caller:
        address = request.client.host if request.client else ""
        return self.keyring.caller(request.headers.get("authorization", ""), address)


class _Sending:
    """An answer as events. `begin` waits for its turn and for a first sign of it, so that what
    fails at once is answered with a status that clients understand, and not with a stream."""

    def __init__(self, writer: Writer, items: AsyncGenerator[Item | None]) -> None:
        self._writer, self._items = writer, items
        self._first: asyncio.Task[Item | None] | None = None

    async def begin(self) -> None:
        await anext(self._items)
        self._first = asyncio.ensure_future(anext(self._items))
        try:
            await asyncio.wait([self._first], timeout=_FIRST_SECONDS)
        except asyncio.CancelledError:
            self._first.cancel()
            await asyncio.wait([self._first])
            raise
        if self._first.done():
            self._first.result()

    async def chunks(self) -> AsyncGenerator[bytes]:
        assert self._first is not None
        try:
            yield self._writer.openings()
            yield self._event(await self._first)
            async for item in self._items:
                yield self._event(item)
            yield self._writer.end()
        except HttpProblem as problem:
            yield problem.event()
        finally:
            self._first.cancel()
            await asyncio.wait([self._first])
            await self._items.aclose()

    def _event(self, item: Item | None) -> bytes:
        assert item is not None
        return self._writer.chunk(item) if isinstance(item, Piece) else self._writer.travel(item)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What it returns; it is cancelled when the client leaves, which raises ClientDisconnect."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait((task, gone))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _completion_prompts(
    engine: Engine, asked: CompletionAsked
) -> tuple[list[Prompt], list[str]]:
    """And their texts, if they are wanted back. Raises HttpProblem for what we do not do."""
    if asked.best_of not in (None, asked.n or 1):
        raise HttpProblem(400, "best_of is not supported here", param="best_of")
    if asked.echo and asked.logprobs is not None:
        raise HttpProblem(400, "echo with logprobs is not supported here", param="echo")
    given: Any = asked.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if len(given) * (asked.n or 1) > MAX_CHOICES:
        raise HttpProblem(400, f"at most {MAX_CHOICES} texts in one request", param="prompt")
    prompts = [await engine.read_text(prompt, asked, "prompt") for prompt in given]
    echoed = [engine.decode(prompt.ids) if asked.echo else "" for prompt in prompts]
    return prompts, echoed


def _description(engine: Engine) -> Mapping[str, Any]:
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "swarm",
        "swarm": {  # ours
            "chat_template": engine.has_template,
            "blocks": engine.blocks,
            "context": engine.context,
            "most_tokens": engine.most_tokens,
            "missing_blocks": engine.missing(),
        },
    }


def _problem_of(error: Exception, engine: Engine) -> HttpProblem:
    """What strangers may know of it: no addresses of volunteers, nothing of the inside."""
    if isinstance(error, UsageError):
        return HttpProblem(400, str(error))
    if not isinstance(error, SwarmError):
        logger.error("an answer broke", exc_info=error)
        message = "something broke here; it is in the log of this server"
        return HttpProblem(500, message, kind="server_error")
    logger.warning("an answer failed: %s", error)
    missing = ", ".join(engine.missing())
    why = f"nobody serves blocks {missing} now" if missing else "its servers do not answer"
    return HttpProblem(
        503,
        f"the swarm cannot go on with this: {why}; try again in a while",
        kind="server_error",
        code="swarm_unavailable",
        retry_after=10.0,
    )
