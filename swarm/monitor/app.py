"""The web app: pages, what programs read, and the stream of changes. Nothing can be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from swarm.metrics import CONTENT_TYPE, Family, plain, render
from swarm.monitor.feed import Json, dump
from swarm.monitor.history import contributors, thin
from swarm.monitor.picture import harmless
from swarm.monitor.watcher import MODELS, Watched, Watcher
from swarm.web import EventStream, HttpProblem, WebApp

STATIC = Path(__file__).parent / "static"
_READERS = 400  # streams at once, of the connections that there may be (`WebLimits`)
_HEALTH = ("broken", "degraded", "healthy")


def make_app(watcher: Watcher, hosts: Sequence[str] | None = None) -> WebApp:
    """Read-only for everybody, or who calls us by one of these names: whatever is not GET or HEAD
    is refused by each route."""
    monitor = _Monitor(watcher)
    return WebApp(
        [
            Route("/api/v1/state", monitor.state),
            Route("/api/v1/changes", monitor.changes),
            Route("/api/v1/models/{name:path}", monitor.model),
            Route("/api/v1/servers/{peer_id}", monitor.server),
            Route("/metrics", monitor.metrics),
            Route("/healthz", monitor.healthz),
            Route("/models/{name:path}", _page),
            Route("/servers/{peer_id}", _page),
        ],
        static=STATIC,
        hosts=hosts,
    )


async def _page(_: Request) -> Response:
    """The same for all: its script looks at the address."""
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


class _Monitor:
    """What the routes answer."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._feed = watcher.feed
        # The last answer for each model, by whether compressed, and the state's number then.
        self._made: dict[tuple[str, bool], tuple[int, bytes]] = {}

    async def state(self, request: Request) -> Response:
        tag = f'"{self._feed.run}-{self._feed.number}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        compressed = _takes_gzip(request)
        return _json(self._feed.whole(compressed=compressed), compressed, headers)

    async def changes(self, request: Request) -> Response:
        """After `?run=…&number=…`, which the state says."""
        if self._feed.readers >= _READERS:
            raise HttpProblem(503, "too many are watching; try again in a minute", retry_after=60)
        number = request.query_params.get("number", "")
        if not (number.isascii() and number.isdecimal() and len(number) < 16):
            raise HttpProblem(400, "say ?run=…&number=… as /api/v1/state does", param="number")
        return EventStream(self._feed.follow(request.query_params.get("run", ""), int(number)))

    async def model(self, request: Request) -> Response:
        """By key, by name, or by name@fingerprint, of which the first digits will do."""
        key, watched = self._find(str(request.path_params["name"]))
        compressed = _takes_gzip(request)
        number, data = self._made.get((key, compressed), (-1, b""))
        if number != self._feed.number:
            history = watched.history
            told: Json = {
                "key": key,
                **self._feed.state["models"][key],
                "history": thin(history.minutes, self._watcher.now()),
                "events": _events(watched),
                "contributors": contributors(history.served),
            }
            data = dump(told, compressed=compressed)
            if len(self._made) > 4 * MODELS:  # some of models that have gone
                self._made.clear()
            self._made[key, compressed] = self._feed.number, data
        return _json(data, compressed, {"cache-control": "no-cache"})

    async def server(self, request: Request) -> Response:
        peer_id = str(request.path_params["peer_id"])
        for key, watched in self._watcher.watched.items():
            member = watched.roster.members.get(peer_id)
            served = watched.history.served.get(peer_id)
            if member is None and served is None:
                continue
            answers = self._watcher.pulse.answers if self._watcher.pulse else {}
            answer = answers.get(peer_id)
            told: Json = {
                "peer_id": peer_id,
                "model": key,
                "model_name": harmless(watched.listing.model.name),
                "server": self._feed.state["models"].get(key, {}).get("servers", {}).get(peer_id),
                "counters": dict(answer.counters) if answer else {},
                "next_rtts": member.record.next_rtts if member else {},
                "events": _events(watched, peer_id),
            }
            if served:
                told["block_hours"] = round(served.block_seconds / 3600, 2)
                told |= {"name": served.name, "first": served.first, "last": served.last}
            return JSONResponse(told)
        raise HttpProblem(404, "this monitor has not seen that server", code="unknown_server")

    async def metrics(self, _: Request) -> Response:
        return Response(render(self._families()), media_type=CONTENT_TYPE)

    async def healthz(self, _: Request) -> Response:
        well = self._watcher.sees
        status = "ok" if well else "the DHT does not answer"
        return JSONResponse({"status": status}, 200 if well else 503)

    def _find(self, name: str) -> tuple[str, Watched]:
        models: Json = self._feed.state["models"]
        base, _, fingerprint = name.rpartition("@")
        found = [
            key
            for key, model in models.items()
            if name in (key, model["name"])
            or (
                base == model["name"]
                and fingerprint
                and model["fingerprint"].startswith(fingerprint)
            )
        ]
        if not found:
            names = ", ".join(sorted({model["name"] for model in models.values()}))
            raise HttpProblem(
                404,
                f"no such model; there are: {names}" if names else "no models",
                code="unknown_model",
            )
        key = max(found, key=lambda key: (key == name, len(models[key]["servers"])))
        return key, self._watcher.watched[key]

    def _families(self) -> Iterator[Family]:
        """By model; its key is among the labels because names need not be unique."""
        models: Json = self._feed.state["models"]
        labels = {key: {"model": model["name"], "key": key} for key, model in models.items()}

        def of_each(name: str, help_: str, value: Any) -> Family:
            samples = [(labels[key], value(model)) for key, model in models.items()]
            return Family(f"swarm_model_{name}", "gauge", help_, samples)

        yield of_each(
            "health",
            "0 broken, 1 degraded (a block has one server), 2 healthy",
            lambda model: _HEALTH.index(model["health"]),
        )
        yield of_each("blocks", "Blocks of the model", lambda model: model["num_blocks"])
        yield of_each(
            "blocks_missing", "Blocks that nobody serves", lambda model: model["replicas"].count(0)
        )
        yield of_each(
            "replicas_least", "Servers of the rarest block", lambda model: min(model["replicas"])
        )
        yield of_each("tokens_per_second", "What the swarm can give", lambda model: model["tokens"])
        yield of_each(
            "servers",
            "Servers that take requests",
            lambda model: sum(s["state"] == "online" for s in model["servers"].values()),
        )
        yield of_each(
            "servers_lost",
            "Servers that fell silent a short while ago",
            lambda model: sum(s["state"] == "lost" for s in model["servers"].values()),
        )
        yield plain(
            "swarm_monitor_sees", "gauge", "1 if the DHT answers", float(self._watcher.sees)
        )
        yield plain("swarm_monitor_readers", "gauge", "Pages that are open", self._feed.readers)


def _takes_gzip(request: Request) -> bool:
    return "gzip" in request.headers.get("accept-encoding", "")


def _json(data: bytes, compressed: bool, headers: dict[str, str]) -> Response:
    headers |= {"vary": "accept-encoding"}
    if compressed:
        headers["content-encoding"] = "gzip"
    return Response(data, headers=headers, media_type="application/json")


def _events(watched: Watched, peer_id: str | None = None) -> list[list[object]]:
    """Of the last day, newest last: when, what, who, its name, and its blocks."""
    return [
        [int(event.at), str(event.kind), event.peer_id, harmless(event.name), *event.blocks]
        for event in watched.history.events
        if peer_id in (None, event.peer_id)
    ]
