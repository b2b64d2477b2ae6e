"""What our web apps grant strangers: bounded requests, safe headers, events, a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from swarm.errors import UsageError
from swarm.listening import running, serve
from swarm.web import EventStream, HttpProblem, WebApp, WebLimits, event

BRIEF = WebLimits(
    body_bytes=1000,
    request_seconds=0.2,
    body_seconds=0.2,
    unread_seconds=0.3,
    connections=8,
    stop_seconds=0.2,
)


class Site:
    """A small app, and what became of its streams."""

    def __init__(self, limits: WebLimits = BRIEF, **options: Any) -> None:
        self.ended = asyncio.Event()
        self.begun = asyncio.Event()
        routes = [
            Route("/echo", self.echo, methods=["POST"]),
            Route("/stream", self.stream),
            Route("/flood", self.flood),
            Route("/breaks", self.breaks),
            Route("/problem", self.problem),
        ]
        self.app = WebApp(routes, limits=limits, **options)

    async def echo(self, request: Request) -> Response:
        return JSONResponse({"length": len(await request.body())})

    async def stream(self, _request: Request) -> Response:
        return EventStream(self._events(b"x", asyncio.Event().wait), farewell=event("bye"))

    async def flood(self, _request: Request) -> Response:
        return EventStream(self._events(b"x" * 65536, lambda: asyncio.sleep(0), times=10_000))

    async def _events(
        self, text: bytes, pause: Callable[[], Coroutine[Any, Any, object]], times: int = 3
    ) -> AsyncGenerator[bytes]:
        try:
            for _ in range(times):
                yield event(text.decode())
                self.begun.set()
                await pause()
        finally:
            self.ended.set()

    async def breaks(self, _request: Request) -> Response:
        raise RuntimeError("secret")

    async def problem(self, _request: Request) -> Response:
        raise HttpProblem(429, "slow down", code="rate_limit_exceeded", retry_after=0.2)


def on(site: Site, test: Callable[[str, httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with (
            running(site.app, "127.0.0.1", 0) as url,
            httpx.AsyncClient(base_url=url, timeout=10) as client,
        ):
            await test(url, client)

    asyncio.run(run())


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))


def test_every_answer_keeps_browsers_strict(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>hello")

    async def check(_url: str, client: httpx.AsyncClient) -> None:
        for path in ("/", "/problem", "/breaks", "/nothing", "/../secret"):
            answer = await client.get(path)
            assert answer.headers["content-security-policy"].startswith("default-src 'self';")
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in answer.headers
            assert "server" not in answer.headers
        index = await client.get("/")
        assert (index.text, index.headers["cache-control"]) == ("<p>hello", "no-cache")
        again = await client.get("/", headers={"if-none-match": index.headers["etag"]})
        assert again.status_code == 304

    on(Site(static=tmp_path), check)


def test_errors_have_one_shape_and_say_nothing_of_the_inside() -> None:
    async def check(_url: str, client: httpx.AsyncClient) -> None:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/echo", 405),
            ("GET", "/breaks", 500),
            ("GET", "/problem", 429),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
            assert "secret" not in answer.text
        assert answer.headers["retry-after"] == "1"

    on(Site(), check)


@pytest.mark.parametrize("said", [True, False], ids=["announced", "chunked"])
def test_a_large_body_is_refused_and_the_server_stays(said: bool) -> None:
    async def check(_url: str, client: httpx.AsyncClient) -> None:
        async def pieces() -> AsyncGenerator[bytes]:
            for _ in range(20):
                yield b"x" * (1 << 19)

        body: Any = b"x" * 10_000_000 if said else pieces()
        answer = await client.post("/echo", content=body)
        assert answer.status_code == 413
        assert "1,000 bytes" in answer.json()["error"]["message"]
        assert (await client.post("/echo", content=b"x" * 1000)).json() == {"length": 1000}

    on(Site(WebLimits(body_bytes=1000)), check)


@pytest.mark.parametrize(
    ("opening", "trickle", "expected"),
    [
        (b"", b"", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n", b"x", b"408"),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n", b"x", b"404"),
    ],
    ids=["nothing at all", "headers", "a body", "a body that nobody wants"],
)
def test_who_dawdles_is_shown_out(opening: bytes, trickle: bytes, expected: bytes) -> None:
    async def check(url: str, client: httpx.AsyncClient) -> None:
        reader, writer = await connect(url)
        writer.write(opening)
        reading = asyncio.create_task(reader.read())

        async def drip() -> None:
            while not reading.done():
                writer.write(trickle)
                await asyncio.wait([reading], timeout=0.02)

        dripping = asyncio.create_task(drip())
        assert (await client.post("/echo", content=b"xx")).json() == {"length": 2}
        async with asyncio.timeout(5):
            try:
                got = await reading
            except ConnectionError:  # shut while we were still talking
                got = expected
        await dripping
        assert expected in got
        writer.close()

    on(Site(), check)


def test_a_reader_who_does_not_read_is_dropped() -> None:
    site = Site()

    async def check(url: str, _client: httpx.AsyncClient) -> None:
        _, writer = await connect(url)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            await site.ended.wait()
        writer.close()

    on(site, check)


def test_idle_connections_make_room_for_new_ones() -> None:
    async def check(url: str, client: httpx.AsyncClient) -> None:
        idle = [await connect(url) for _ in range(30)]
        assert (await client.post("/echo", content=b"x")).json() == {"length": 1}
        assert await idle[0][0].read() == b""  # long before its time
        for _, writer in idle:
            writer.close()

    on(Site(WebLimits(connections=8)), check)


def test_events_arrive_and_end_when_the_reader_leaves() -> None:
    site = Site()

    async def check(_url: str, client: httpx.AsyncClient) -> None:
        async with client.stream("GET", "/stream") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert await anext(answer.aiter_lines()) == "data: x"
            assert not site.ended.is_set()
        async with asyncio.timeout(5):
            await site.ended.wait()

    on(site, check)


def test_an_event_of_several_lines_stays_one_event() -> None:
    assert event("a\nb", "late") == b"event: late\ndata: a\ndata: b\n\n"


def test_only_names_that_are_ours_are_answered() -> None:
    """Else a web page could have its own name point here, and read what we say."""

    async def check(_url: str, client: httpx.AsyncClient) -> None:
        assert (await client.get("/problem")).status_code == 429
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert (await client.get("/problem", headers={"host": host})).status_code == 421

    on(Site(hosts=["127.0.0.1", "localhost"]), check)


def test_pages_of_other_origins_read_nothing_unless_allowed() -> None:
    preflight = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }

    async def off(_url: str, client: httpx.AsyncClient) -> None:
        answer = await client.options("/echo", headers=preflight)
        assert "access-control-allow-origin" not in answer.headers

    async def allowed(_url: str, client: httpx.AsyncClient) -> None:
        answer = await client.options("/echo", headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = await client.options(
            "/echo", headers=preflight | {"origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in other.headers

    on(Site(), off)
    on(Site(cors=["https://page.example"]), allowed)


def test_it_says_where_it_listens_and_ends_on_sigterm_though_a_stream_is_open() -> None:
    site, lines, bodies = Site(), list[str](), list[str]()

    async def run() -> None:
        async def read(url: str) -> None:
            async with httpx.AsyncClient() as client, client.stream("GET", f"{url}/stream") as got:
                bodies.append("".join([piece async for piece in got.aiter_text()]))

        async def visit() -> None:
            while not lines:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            reading = asyncio.create_task(read(lines[0].removeprefix("listening on ")))
            await site.begun.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await reading

        visitor = asyncio.create_task(visit())
        async with asyncio.timeout(10):
            await serve(site.app, "127.0.0.1", 0, lines.append)
            await visitor

    asyncio.run(run())
    assert bodies == ["data: x\n\ndata: bye\n\n"]
    assert site.ended.is_set()
    assert threading.current_thread() is threading.main_thread()


def test_a_port_that_is_taken_is_said() -> None:
    async def run(port: int) -> None:
        async with running(Site().app, "127.0.0.1", port):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            asyncio.run(run(port))


def test_no_body_is_json_by_itself() -> None:
    """Problems are JSON whatever the question was."""
    body = HttpProblem(401, "who are you?").response()
    assert json.loads(bytes(body.body))["error"]["message"] == "who are you?"
    assert body.headers["www-authenticate"] == "Bearer"
