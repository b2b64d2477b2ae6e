"""Whole servers in this process on a fake network: to cut, freeze and watch them exactly."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from swarm.client.connection import Connection
from swarm.client.hop import Terms
from swarm.client.remote import RemoteBlocks
from swarm.client.route import Leg
from swarm.config import ClientConfig, ClientTimeouts, ServerLimits
from swarm.dht.records import ServerRecord, SignedRecord, open_record, sign_record
from swarm.errors import NoRoute, SwarmError
from swarm.fakes import FakeNetwork, Fate, deliver
from swarm.identity import Access, Identity, SwarmKey
from swarm.loop import BackgroundLoop
from swarm.messages import Message, PushTarget
from swarm.models.selftest import SplitProof, prove_split
from swarm.models.spans import Span
from swarm.models.stripping import strip
from swarm.server.backend import Backend
from swarm.server.executor import Executor
from swarm.server.handler import Handler, Served
from swarm.server.residents import announced
from swarm.tensors import DTYPE_NAMES
from swarm.transport import Endpoint, Service
from swarm.types import BlockRange, Codec, ModelId, Numerics
from swarm.wire import decode

NOW = 1_700_000_000.0
MODEL = ModelId("tiny", hashlib.sha256(b"tiny").hexdigest())
STEADY = ClientTimeouts(connect=20.0, sync=20.0, step=20.0, least=20.0, recovery=20.0, refresh=0.01)

Fits = Callable[[str, str, str, Message], bool]
"""`fits(source, destination, method, message)`"""


@cache
def identity(index: int) -> Identity:
    """RSA keys take long to make; tests share them."""
    return Identity.ephemeral()


@dataclass
class FakeRouter:
    """Takes the first living server that goes on from where the route stands, longest first."""

    servers: dict[str, SignedRecord] = field(default_factory=dict)
    banned: set[str] = field(default_factory=set)
    failures: list[tuple[str, SwarmError]] = field(default_factory=list)
    refreshed: int = 0
    best: Sequence[Leg] | None = None  # which is worth a move from any other one
    expected: float | None = None  # seconds, of each hop
    rtts: dict[str, float] = field(default_factory=dict)

    def better(
        self, hops: Sequence[tuple[str, BlockRange]], terms: Terms, position: int
    ) -> Sequence[Leg] | None:
        best = [(server.record.peer_id, blocks) for server, blocks in self.best or ()]
        return None if best == list(hops) else self.best

    def step_seconds(
        self, hops: Sequence[tuple[str, BlockRange]], terms: Terms
    ) -> Sequence[float] | None:
        return None if self.expected is None else [self.expected] * len(hops)

    def rtt(self, peer_id: str) -> float | None:
        return self.rtts.get(peer_id)

    def route(
        self,
        blocks: BlockRange,
        terms: Terms,
        prompt: int | None = None,
        exclude: frozenset[str] = frozenset(),
    ) -> Sequence[Leg]:
        route: list[Leg] = []
        at = blocks.start
        while at < blocks.end:
            able = [
                server
                for name, server in self.servers.items()
                if name not in self.banned | exclude
                and server.record.blocks.start <= at < server.record.blocks.end
            ]
            if not able:
                raise NoRoute(f"blocks {at}:{blocks.end} of {terms.model} are served by nobody")
            best = max(able, key=lambda server: server.record.blocks.end)
            end = min(blocks.end, best.record.blocks.end)
            route.append((best, BlockRange(at, end)))
            at = end
        return route

    def holders(self, terms: Terms) -> Sequence[SignedRecord]:
        return [server for name, server in self.servers.items() if name not in self.banned]

    async def refresh(self) -> None:
        self.refreshed += 1

    def failed(self, endpoint: Endpoint, error: SwarmError) -> None:
        self.failures.append((endpoint.peer_id, error))
        self.banned.add(endpoint.peer_id)

    def worked(
        self, peer_id: str, tokens: int, seconds: float, blocks: int, elapsed: float
    ) -> None:
        pass

    def measured(self, peer_id: str, rtt: float) -> None:
        pass


@dataclass
class Server:
    """One server of an InProcessSwarm."""

    endpoint: Endpoint
    record: SignedRecord
    handler: Handler
    executor: Executor

    @property
    def peer_id(self) -> str:
        return self.endpoint.peer_id


@dataclass
class Trap:
    """`act` is awaited once, before the first frame that `fits` is on its way."""

    fits: Fits
    act: Callable[[], Awaitable[Fate | None]]
    sprung: bool = False


class InProcessSwarm:
    """Spans on the background loop; everything here may be called from the test's thread."""

    def __init__(self, *, swarm_key: SwarmKey | None = None, limits: ServerLimits | None = None):
        self.network = FakeNetwork()
        self.router = FakeRouter()
        self.servers: list[Server] = []
        self.loop = BackgroundLoop.shared()
        self.key = swarm_key
        self.limits = limits or ServerLimits(send_timeout=2.0)
        self._strangers = self.loop.call(_tasks())

    def __enter__(self) -> InProcessSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call(self._stop(), timeout=30)
        assert not self.network.defects, self.network.defects

    async def _stop(self) -> None:
        await self.network.close()
        for server in self.servers:
            await server.executor.stop()

    def add(self, span: Span, *, listed: bool = True) -> Server:
        """A server that holds `span`; it takes part in routes if `listed`."""
        return self.loop.call(self._add(span, listed))

    async def _add(self, span: Span, listed: bool) -> Server:
        index = len(self.servers)
        mine = identity(index)
        endpoint = Endpoint("10.0.0.1", 1000 + index, mine.peer_id, bytes([index]) * 32)
        record = ServerRecord(
            peer_id=mine.peer_id,
            model=MODEL,
            blocks=span.blocks,
            num_blocks=64,
            host=endpoint.host,
            port=endpoint.port,
            certificate_digest=endpoint.certificate_digest,
            numerics=Numerics(dtype=DTYPE_NAMES[span.dtype]),  # type: ignore[arg-type]
            adapters=announced(span.residents),
            announced_at=int(NOW * 1000),
        )
        if self.limits.kv_bytes is not None:
            span.store.budget = self.limits.kv_bytes
        signed = sign_record(record, mine, self.key)
        executor = Executor(Backend(span), self.limits.pass_tokens)
        executor.start()
        served = Served(
            model=MODEL,
            numerics=record.numerics,
            access=Access(mine, self.key),
            certificate_digest=lambda: endpoint.certificate_digest,
            record=lambda: signed.data,
        )
        handler = Handler(
            served,
            span,
            executor,
            self.network.transport(mine.peer_id),
            self._resolve,
            self.limits,
        )
        self.network.serve(endpoint, Service(handler.session, handler.push, handler.info))
        server = Server(endpoint, signed, handler, executor)
        self.servers.append(server)
        if listed:
            self.router.servers[server.peer_id] = signed
        return server

    def _resolve(self, target: PushTarget) -> Endpoint:
        record = open_record(target.record, key=self.key, now=NOW)
        return Endpoint(record.host, record.port, record.peer_id, record.certificate_digest)

    def blocks(
        self,
        span: Span,
        blocks: BlockRange,
        *,
        timeouts: ClientTimeouts = STEADY,
        chunk_bytes: int = 1 << 20,
        key: SwarmKey | None = None,
        client: int = 99,
        codec: Codec = "none",
        standby_after: int | None = None,
    ) -> RemoteBlocks:
        """A client's view of the swarm."""
        terms = Terms(
            model=MODEL,
            numerics=Numerics(dtype=DTYPE_NAMES[span.dtype]),  # type: ignore[arg-type]
            hidden_size=span.hidden_size,
            batch_size=1,
            max_length=1,
            whole_steps=span.takes_whole_steps,
            codec=codec,
        )
        connection = Connection(
            terms,
            self.router,
            self.network.transport(f"client {client}"),
            Access(identity(client), key or self.key),
            ClientConfig(timeouts=timeouts, chunk_bytes=chunk_bytes, standby_after=standby_after),
        )
        return RemoteBlocks(connection, blocks)

    # What may happen to servers; from the test's thread.

    def on_loop(self, function: Any, *args: Any) -> Any:
        async def call() -> Any:
            return function(*args)

        return self.loop.call(call())

    def cut(self, server: Server) -> None:
        self.on_loop(self.network.cut, server.endpoint)

    def revive(self, server: Server) -> None:
        """Started again, and forgiven."""
        self.on_loop(self._revive, server)

    def _revive(self, server: Server) -> None:
        self.network.restore(server.endpoint)
        self.router.banned.discard(server.peer_id)

    def trap(self, fits: Fits, act: Callable[[], Awaitable[Fate | None]]) -> Trap:
        """Something that happens at just one point; there may be one trap at a time."""
        trap = Trap(fits, act)

        async def watch(source: str, destination: str, method: str, frame: bytes) -> Fate:
            if trap.sprung or not fits(source, destination, method, decode(frame)):
                return Fate.DELIVER
            trap.sprung = True
            return await act() or Fate.DELIVER

        self.network.before_frame = watch
        return trap

    def no_trap(self) -> None:
        self.network.before_frame = deliver

    def wait_until(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        """For what has no event of its own. Raises TimeoutError."""

        async def wait() -> None:
            async with asyncio.timeout(timeout):
                while not condition():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

        self.loop.call(wait())

    def assert_quiet(self) -> None:
        """Nobody has a session any more: all cache slots are free, and no task is left over."""
        self.wait_until(lambda: not any(server.handler.sessions for server in self.servers))
        for server in self.servers:
            store, admission = server.handler._span.store, server.handler._admission
            self.wait_until(lambda store=store: store.used == 0)
            store.check_integrity()
            admission.check_integrity()
            assert (len(admission), admission.promised) == (0, 0)
            handler = server.handler
            self.wait_until(
                lambda handler=handler: not (len(handler._loans.stock) or handler._training)
            )
            handler._loans.stock.check_integrity()
            keeping = handler._training.keeping
            self.wait_until(lambda keeping=keeping: keeping.used == 0)
            keeping.check_integrity()
            assert server.handler.load().queue == 0
        self.wait_until(lambda: asyncio.all_tasks() - self._strangers == {asyncio.current_task()})

    def serving(self, session: Any, block: int) -> Server:
        """Who serves `block` for that session now."""
        hop = next(hop for hop in session.hops if hop.blocks.start <= block < hop.blocks.end)
        return next(server for server in self.servers if server.peer_id == hop.peer_id)


async def _tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks()


def span_of(model: Any, start: int, end: int) -> Span:
    """Blocks of a local model as a span; the model itself is left alone."""
    part = copy.deepcopy(model)
    strip(part, BlockRange(start, end))
    return Span(
        part, BlockRange(start, end), _proof(type(model.config), model.config.to_json_string())
    )


@cache
def _proof(config: type[Any], fields: str) -> SplitProof:
    return prove_split(config.from_dict(json.loads(fields)))
