"""A client's place in the swarm: a DHT node, a transport and a memory of peers per process."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from swarm import tracing
from swarm.asking import ask, measure_rtt
from swarm.client.hop import Terms, endpoint_of
from swarm.client.pace import Pace
from swarm.client.peers import PeerBook
from swarm.client.probing import choose_probes
from swarm.client.routing import (
    Chart,
    PricedHop,
    Request,
    RouteHop,
    find_better,
    find_route,
    price_route,
)
from swarm.config import ClientConfig
from swarm.coordinates import unpack
from swarm.dht.directory import Directory, SwarmView
from swarm.dht.node import DhtNode
from swarm.dht.records import ServerState, SignedRecord
from swarm.errors import (
    ErrorCode,
    NoRoute,
    PeerUnavailable,
    RemoteProtocolError,
    SwarmError,
    UsageError,
)
from swarm.identity import Access, Identity, SwarmKey
from swarm.joining import initial_peers_of, swarm_key_of
from swarm.loop import BackgroundLoop
from swarm.messages import Info
from swarm.rpc import RpcTransport
from swarm.transport import Endpoint
from swarm.types import DTYPE_BYTES, BlockRange, DType, ModelId, Numerics, mxint8_bytes

logger = logging.getLogger(__name__)

_LOOK_EVERY = 20.0  # seconds between looks into the DHT while nothing is wrong...
_LOOK_RARELY = 32.0  # ...with many servers: a record must be seen to advance within its 90 s
_PER_SERVER = 0.05  # seconds more for each: 2 kB/s from each replica asked...
_AT_ONCE = 0.002  # ...and when something is wrong
_FIRST_PROBES = 16  # servers that are asked how far they are at the start, all at once...
_PROBES = 2  # ...and then after each look
_PROBE_SECONDS = 5.0
_MANY = 1000  # steps, by whose price one is judged


Leg = tuple[str, BlockRange]
"""A peer id, and which blocks are used there."""
Measure = Callable[[Endpoint], Awaitable[float]]
"""Seconds to a server and back. Raises SwarmError."""


class ModelRouter:
    """Routes for one model from the latest picture of who serves it. For the event loop only."""

    def __init__(
        self,
        directory: Directory,
        book: PeerBook,
        rng: random.Random,
        config: ClientConfig,
    ) -> None:
        self._directory = directory
        self._book = book
        self._rng = rng
        self._config = config
        self._chart = Chart(())
        self._looked = float("-inf")
        self._looking, self._probing = asyncio.Lock(), asyncio.Lock()

    @property
    def view(self) -> SwarmView:
        return self._directory.view

    @property
    def pace(self) -> Pace:
        """What prompts have shown, to routing as well."""
        return self._book.pace

    def route(
        self,
        blocks: BlockRange,
        terms: Terms,
        prompt: int | None = None,
        exclude: frozenset[str] = frozenset(),
    ) -> Sequence[tuple[SignedRecord, BlockRange]]:
        """For `prompt` positions (None: who knows) and whatever else a session may come to.

        Raises NoRoute, which names the blocks that are missing.
        """
        request = replace(self._request(blocks, terms, prompt), exclude=exclude)
        try:
            hops = self.choose(request)
        except NoRoute:
            if not self._book.forgive(time.monotonic()):
                raise
            hops = self.choose(request)
        return [(hop.server, hop.blocks) for hop in hops]

    def holders(self, terms: Terms) -> Sequence[SignedRecord]:
        """Servers of the model in these numerics that may be asked to train now."""
        banned, config = self._book.banned(time.monotonic()), self._config
        return [
            server
            for server in self._picture().holders(terms.model, terms.numerics).servers
            if (peer_id := server.record.peer_id) not in banned
            and peer_id not in config.blocked_servers
            and (not config.allowed_servers or peer_id in config.allowed_servers)
        ]

    def choose(self, request: Request, *, by_lot: bool = True) -> Sequence[RouteHop]:
        """The best route, or (`by_lot`) one that is about as good. Raises NoRoute."""
        chart, now = self._picture(), time.monotonic()
        lot = self._rng.random() if by_lot else None
        hops = find_route(chart, request, self._book, now, tiebreak=lot)
        if logger.isEnabledFor(logging.DEBUG):
            for priced in price_route(hops, chart, request, self._book, now):
                logger.debug("route: %s", priced)
        return hops

    def better(
        self, hops: Sequence[Leg], terms: Terms, position: int
    ) -> Sequence[tuple[SignedRecord, BlockRange]] | None:
        """Where a session should move that holds `position` positions at these hops, between two
        turns; None: it should stay."""
        route = self._known(hops)
        if route is None:
            return None
        blocks = BlockRange(route[0].blocks.start, route[-1].blocks.end)
        left = replace(terms, max_length=max(1, terms.max_length - position))
        rest, held = self._request(blocks, left, None), terms.batch_size * position
        lot, now = self._rng.random(), time.monotonic()
        try:
            found = find_better(route, self._picture(), rest, held, self._book, now, lot)
        except NoRoute:
            return None
        return None if found is None else [(hop.server, hop.blocks) for hop in found]

    def step_seconds(self, hops: Sequence[Leg], terms: Terms) -> Sequence[float] | None:
        """What each hop is expected to take of a step, from the answer of the hop before to its
        own, as they come here. None: somebody of them takes no sessions any more."""
        route = self._known(hops)
        if route is None:
            return None
        blocks = BlockRange(route[0].blocks.start, route[-1].blocks.end)
        request = self._request(blocks, terms, 0)
        request = replace(request, new_tokens=_MANY, prompt_tokens=0, adapter_bytes=0.0)
        return [hop.seconds / _MANY for hop in self.price(route, request)]

    def _known(self, hops: Sequence[Leg]) -> list[RouteHop] | None:
        """As hops of a route, if all of them still take sessions."""
        servers = {
            server.record.peer_id: server
            for server in self.view.servers
            if server.record.state is ServerState.ONLINE
        }
        if any(peer_id not in servers for peer_id, _ in hops):
            return None
        return [RouteHop(servers[peer_id], blocks) for peer_id, blocks in hops]

    def price(self, hops: Sequence[RouteHop], request: Request) -> Sequence[PricedHop]:
        """What a route is expected to take by now. Raises KeyError if a hop is not announced."""
        return price_route(hops, self._picture(), request, self._book, time.monotonic())

    def _picture(self) -> Chart:
        if self._chart.servers is not self.view.servers:
            self._chart = Chart(self.view.servers)
            for record in (server.record for server in self.view.servers):
                self._book.seen(record.peer_id, record.certificate_digest)
            self._locate()
        return self._chart

    def _request(self, blocks: BlockRange, terms: Terms, prompt: int | None) -> Request:
        prompt = terms.max_length // 2 if prompt is None else prompt
        size = terms.hidden_size * DTYPE_BYTES[terms.numerics.dtype]
        return Request(
            model=terms.model,
            blocks=blocks,
            numerics=terms.numerics,
            prompt_tokens=terms.batch_size * prompt,
            new_tokens=max(1, terms.max_length - prompt),
            rows=terms.batch_size,
            position_bytes=size if terms.codec == "none" else mxint8_bytes((terms.hidden_size,)),
            allowed=self._config.allowed_servers,
            blocked=self._config.blocked_servers,
            adapter=terms.adapter.id if terms.adapter else b"",
            adapter_bytes=terms.adapter.block_bytes if terms.adapter else 0.0,
        )

    async def refresh(self) -> None:
        """Look into the DHT again, at most every `timeouts.refresh` seconds, and more rarely the
        more there is to read: all clients may miss the same blocks at once."""
        async with self._looking:
            pause = max(self._config.timeouts.refresh, _AT_ONCE * len(self.view.servers))
            if time.monotonic() - self._looked < pause:
                return
            self._looked = time.monotonic()
            try:
                await self._directory.refresh()
            except PeerUnavailable as error:
                logger.warning("cannot see the swarm: %s", error)

    async def keep_looking(self, measure: Measure) -> None:
        """So that servers and their distances are known before they are needed."""
        probes = _FIRST_PROBES
        while True:
            await self.probe(measure, probes)
            period = max(_LOOK_EVERY, min(_LOOK_RARELY, _PER_SERVER * len(self.view.servers)))
            await asyncio.sleep(period * (0.75 + 0.5 * self._rng.random()))
            await self.refresh()
            probes = _PROBES

    async def probe(self, measure: Measure, count: int) -> None:
        """Ask some servers how far they are, as far as that is not known."""
        now = time.monotonic()

        async def one(endpoint: Endpoint) -> None:
            self._book.asked(endpoint.peer_id, now)
            try:
                self._book.measured(endpoint.peer_id, await measure(endpoint))
            except SwarmError as error:
                self.failed(endpoint, error)

        async with self._probing:
            chosen = choose_probes(self.view.servers, self._book, now, count, self._rng)
            await asyncio.gather(*map(one, map(endpoint_of, chosen)))
            self._locate()

    def _locate(self) -> None:
        records = (server.record for server in self.view.servers)
        self._book.locate(
            (record.peer_id, unpack(record.coordinates))
            for record in records
            if record.coordinates is not None
        )

    def failed(self, endpoint: Endpoint, error: SwarmError) -> None:
        logger.info("%s failed: %s", endpoint.peer_id, error)
        now = time.monotonic()
        innocent = (ErrorCode.BUSY, ErrorCode.DRAINING)  # it works, but not for us now
        if isinstance(error, RemoteProtocolError) and error.code in innocent:
            self._book.busy(endpoint.peer_id, now, error.retry_after)
        else:
            self._book.failed(endpoint.peer_id, now, endpoint.certificate_digest)

    def rtt(self, peer_id: str) -> float | None:
        return self._book.rtt(peer_id)

    def worked(
        self, peer_id: str, tokens: int, seconds: float, blocks: int, elapsed: float = 0.0
    ) -> None:
        now = time.monotonic()
        self._book.worked(peer_id, tokens, seconds, blocks, elapsed=elapsed, now=now)

    def measured(self, peer_id: str, rtt: float) -> None:
        """An opening was answered, perhaps after waiting for memory: better than nothing."""
        if self._book.rtt(peer_id) is None:
            self._book.measured(peer_id, rtt)


class SwarmNetwork:
    """Shared by all models of this process that join by the same peers with the same key."""

    _shared: ClassVar[dict[tuple[tuple[str, ...], str], SwarmNetwork]] = {}
    _lock = threading.Lock()

    def __init__(self, dht: DhtNode, access: Access) -> None:
        self.loop = BackgroundLoop.shared()
        self.access = access
        self.transport = RpcTransport()
        self.dht = dht
        self._book = PeerBook(random.Random(access.identity.peer_id))
        self._routers: dict[tuple[ModelId, ClientConfig], ModelRouter] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def connect(
        cls, initial_peers: Sequence[str] | None, swarm_key: SwarmKey | str | None
    ) -> SwarmNetwork:
        """Join, unless this process has already. Raises UsageError if nobody is reachable."""
        peers = initial_peers_of(initial_peers)
        if not peers:
            raise UsageError(
                "no peers to join by: pass initial_peers=[...] or set SWARM_PEERS to what "
                "swarm-server or swarm-dht printed behind 'peers='"
            )
        key = swarm_key_of(swarm_key)
        tracing.start("swarm-client")
        with cls._lock:
            shared = (peers, key.text() if key else "")
            if shared not in cls._shared or not cls._shared[shared].loop.alive:
                cls._shared[shared] = cls._join(peers, key)
            return cls._shared[shared]

    @classmethod
    def _join(cls, peers: Sequence[str], key: SwarmKey | None) -> SwarmNetwork:
        identity = Identity.ephemeral()

        async def join() -> SwarmNetwork:
            dht = await DhtNode.create(identity, peers, key=key, client_mode=True)
            network = cls(dht, Access(identity, key))
            # Cancelled when the background loop ends, with the process.
            network._tasks.append(asyncio.create_task(network._stay()))
            return network

        return BackgroundLoop.shared().call(join())

    @classmethod
    def leave_all(cls) -> None:
        """Leave every swarm this process has joined; otherwise that happens when it ends."""
        with cls._lock:
            networks = list(cls._shared.values())
            cls._shared.clear()
        for network in networks:
            if network.loop.alive:
                network.loop.call(network._leave())

    async def _leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _stay(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await self.transport.close()
            await self.dht.close()

    def router(self, model: ModelId, num_blocks: int, config: ClientConfig) -> ModelRouter:
        """The model's router, after its first look into the DHT."""

        async def make() -> ModelRouter:
            key = model, config
            if key not in self._routers:
                directory = Directory(self.dht, model, num_blocks)
                rng = random.Random(self.access.identity.peer_id)
                self._routers[key] = router = ModelRouter(directory, self._book, rng, config)
                await router.refresh()
                self._tasks.append(asyncio.create_task(router.keep_looking(self.measure)))
            await self._routers[key].refresh()
            return self._routers[key]

        return self.loop.call(make())

    async def measure(self, endpoint: Endpoint) -> float:
        """Seconds to a server and back. Raises SwarmError."""
        return await measure_rtt(self.transport, self.access, endpoint, _PROBE_SECONDS)

    def ask(self, server: SignedRecord, timeout: float = 5.0) -> Info:
        """What a server says of itself. Raises PeerUnavailable, RemoteProtocolError."""
        endpoint = endpoint_of(server.record)
        return self.loop.call(ask(self.transport, self.access, endpoint, timeout))

    def numerics(self, router: ModelRouter, dtype: DType | None) -> Numerics:
        """What to compute in: `dtype`, or whatever covers most blocks of the model; if several do,
        what most servers compute in, since any one may claim to have all blocks."""
        if dtype is not None:
            return Numerics(dtype=dtype)
        view = router.view
        covered: dict[Numerics, set[int]] = {}
        servers = Counter[Numerics]()
        for record in (server.record for server in view.servers):
            if record.state is ServerState.ONLINE:
                blocks = covered.setdefault(record.numerics, set())
                blocks.update(range(record.blocks.start, record.blocks.end))
                servers[record.numerics] += 1
        if not covered:
            raise NoRoute(
                f"nobody serves {view.model} in this swarm; check that you have the same "
                f"files as its servers, or start one: swarm-server {view.model.name} "
                f"--blocks 0:{view.num_blocks}"
            )
        return max(covered, key=lambda n: (len(covered[n]), servers[n], n.dtype))
