"""A hub-like HTTP server on loopback: serves folders as model repos, and misbehaves on request.

`with serve({"org/model": folder}) as hub:` and then `hub.use(monkeypatch, cache)` for code in this
process (huggingface_hub reads its environment at import), or `hub.environment(cache)` for others.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee00" * 5


@dataclass(frozen=True)
class Request:
    """One request as it came; `sent` is the number of body bytes that went back."""

    method: str
    file: str  # name in the repo, or "" for an API call
    range: str | None
    token: str | None
    sent: int


@dataclass
class Hub:
    """The state of the server; tests change it between calls."""

    repos: dict[str, Path]
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)  # repos whose files need a token
    cut_after: dict[str, int] = field(default_factory=dict)  # file: bytes until the line is cut
    forged: dict[str, bytes] = field(default_factory=dict)  # file: what is sent in its place
    listing: dict[str, object] = field(default_factory=dict)  # overrides of the API's answer
    moved_to: Hub | None = None  # where weight files are redirected, as to a CDN
    down: bool = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Point huggingface_hub and swarm in this process here, with caches of their own."""
        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        # Written to disk chunk by chunk: a cut loses up to one, which is 10 MB outside of tests.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables for another process that shall use this hub and no other."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "SWARM_CACHE": str(cache / "swarm"),
        }

    def sent(self, file: str) -> int:
        """Bytes of this file that went out, over all requests."""
        return sum(request.sent for request in self.requests if request.file == file)

    def fetched(self) -> set[str]:
        """Files of which any byte went out."""
        return {request.file for request in self.requests if request.file and request.sent}


@contextmanager
def serve(repos: Mapping[str, Path]) -> Generator[Hub]:
    hub = Hub(dict(repos))

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="hub")
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Answers /api/models/REPO[/revision/REV] and /REPO/resolve/REV/FILE as the hub does."""

    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its base's name
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.state.down:
            self.close_connection = True
            self.connection.close()
            return
        if path.startswith("api/models/"):
            self._list(path.removeprefix("api/models/").split("/revision/")[0])
            return
        repo, _, rest = path.partition("/resolve/")
        _, _, file = rest.partition("/")
        self._file(repo, file)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _note(self, file: str, sent: int) -> None:
        request = Request(str(self.command), file, self.headers.get("Range"), self._token(), sent)
        self.state.requests.append(request)

    def _refuse(self, status: int, code: str, file: str) -> None:
        self._note(file, 0)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, repo: str) -> None:
        folder = self.state.repos.get(repo)
        if folder is None:
            self._refuse(401, "RepoNotFound", "")
            return
        siblings: list[dict[str, object]] = []
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            entry: dict[str, object] = {"rfilename": path.name, "size": len(data)}
            if path.suffix in (".safetensors", ".bin"):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
            siblings.append(entry)
        answer = {"id": repo, "sha": COMMIT, "siblings": siblings} | self.state.listing
        body = json.dumps(answer).encode()
        self._note("", len(body))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, path: Path, url: str) -> None:
        self._note(path.name, 0)
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, repo: str, file: str) -> None:
        folder = self.state.repos.get(repo)
        if folder is None:
            self._refuse(401, "RepoNotFound", file)
            return
        if repo in self.state.gated and self._token() is None:
            self._refuse(401, "GatedRepo", file)
            return
        if not (folder / file).is_file():
            self._refuse(404, "EntryNotFound", file)
            return
        if self.state.moved_to is not None and file.endswith(".safetensors"):
            self._redirect(folder / file, self.state.moved_to.endpoint + self.path)
            return
        true = (folder / file).read_bytes()
        data = self.state.forged.get(file, true)
        start, end = 0, len(data)
        wanted = self.headers.get("Range")
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(int(last) + 1, end) if last else end
        cut = self.state.cut_after.get(file)
        body = data[start:end] if cut is None else data[start : min(end, start + cut)]
        if self.command == "HEAD":
            body = b""
        self._note(file, len(body))  # before the answer, so that nobody looks too early
        self.send_response(200 if wanted is None else 206)
        self.send_header("ETag", f'"{hashlib.sha256(true).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(end - start))
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(body)
        if self.command == "GET" and len(body) < end - start:
            self.close_connection = True
