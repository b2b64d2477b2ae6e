"""A server from its configuration to its last goodbye: what is started here is stopped here."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

from pydantic import ValidationError

from swarm.asking import measure_rtt, measure_uplink
from swarm.certificates import issue_certificate, needs_rotation
from swarm.dht.addresses import joinable_at, own_host
from swarm.dht.announcer import Announcer
from swarm.dht.directory import Directory, SwarmView
from swarm.dht.node import DhtNode
from swarm.dht.records import ServerRecord, ServerState, open_record
from swarm.errors import InvalidRecord, PeerUnavailable, UsageError
from swarm.identity import Access, Identity
from swarm.loop import in_thread
from swarm.messages import PushTarget
from swarm.metrics import Family, Page
from swarm.models.checkpoint import Checkpoint
from swarm.models.loading import fetch_span
from swarm.models.selftest import prove_split
from swarm.models.spans import Span, SplitProof
from swarm.rpc import RpcServer, RpcTransport
from swarm.server import heap, hugepages, throughput
from swarm.server.balancer import Balancer, look_again, others_in
from swarm.server.choice import (
    ServerConfig,
    count_blocks,
    open_announced_model,
    open_model,
    pick_dtype,
    size_span,
)
from swarm.server.door import Door
from swarm.server.executor import Executor
from swarm.server.exposition import families
from swarm.server.handler import Handler, Served
from swarm.server.neighbours import Measure, Neighbours
from swarm.server.placement import Holder, believe, choose_span
from swarm.server.residents import Shelf, announced
from swarm.server.serving import Serving, Source
from swarm.transport import Endpoint, Service
from swarm.types import DTYPE_BYTES, BlockRange, ModelId, Numerics

logger = logging.getLogger(__name__)

_STREAMS_PER_SESSION = 3  # the client's, the hop before's, and one that is being replaced
_ROTATION_LOOK_SECONDS = 3600.0
_HEAP_LOOK_SECONDS = 60.0
_ASK_SECONDS = 5.0  # for another server to say that it is there
_GOODBYE_SECONDS = 3.0  # for telling the DHT that we drain


class ServerNode:
    """A server that is up. `async with ServerNode.running(config) as node`: then `ready_line`."""

    @classmethod
    @asynccontextmanager
    async def running(cls, config: ServerConfig) -> AsyncGenerator[ServerNode]:
        """Starts everything, in order, until strangers can be served; stops it in reverse.

        Raises UsageError, in one sentence, for whatever cannot be.
        """
        node = cls(config)
        async with AsyncExitStack() as stack:
            await node._start(stack)
            yield node

    def __init__(self, config: ServerConfig) -> None:
        """Use `running`."""
        self._config = config
        self._door = Door()
        self._transport = RpcTransport()
        self._tasks: list[asyncio.Task[None]] = []
        self._state = ServerState.JOINING
        self._neighbours: Neighbours | None = None

    @property
    def ready_line(self) -> str:
        model, blocks, peers = self._served.model, self.blocks, ",".join(self.peers)
        address = f"{self._host}:{self._port}"
        return f"ready model={model.name} blocks={blocks} address={address} peers={peers}"

    async def wait(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises what a background task failed with: a defect."""
        stopping = asyncio.create_task(stop.wait())
        running: set[asyncio.Task[None] | asyncio.Task[bool]] = {stopping, *self._tasks}
        try:
            while not stopping.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            stopping.cancel()

    async def drain(self) -> None:
        """Admit nobody any more, and give sessions `stop_timeout` seconds to end or move."""
        self._balancing.cancel()
        await asyncio.wait({self._balancing})
        drained = asyncio.create_task(self._serving.drain())
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._announce(ServerState.DRAINING)
        logger.info("leaving; %d sessions are open", self._serving.sessions)
        await drained

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        identity = Identity.load_or_create(config.identity) if config.identity else None
        access = Access(identity or Identity.ephemeral(), config.swarm_key)
        self._device = throughput.pick_device(config.device)
        checkpoint = studying = None
        if config.model is not None or not config.peers:
            checkpoint = await open_model(config, config.model)  # before others are bothered
            studying = self._study(checkpoint, stack)
        self._host = config.announce_host or own_host(config.host, config.peers)
        self._dht = await DhtNode.create(
            access.identity,
            config.peers,
            host=config.host,
            port=config.dht_port,
            key=access.swarm_key,
        )
        stack.push_async_callback(self._dht.close)
        self.peers = joinable_at(self._host, await self._dht.visible_addresses())
        checkpoint = checkpoint or await open_announced_model(config, self._dht)
        proof, block_parameters = await (studying or self._study(checkpoint, stack))
        view = await self._choose(checkpoint, access, proof, block_parameters)
        await self._listen(stack)
        await self._introduce(stack)
        await self._show_metrics(stack)
        if config.blocks is None and config.peers:
            await self._announce(ServerState.JOINING)
            # What is left to us of them by others who chose at the same time.
            numerics = self._served.numerics
            self.blocks = await look_again(self._directory, view, numerics, self.holder)
            self._announcer.changed()
            logger.info("blocks %s are those that the swarm has least of", self.blocks)
        stack.push_async_callback(self._transport.close)
        stack.push_async_callback(self._serving.close)
        await self._serving.open(self.blocks)
        # Sessions must end before what they use does.
        stack.push_async_callback(self._rpc.stop, 0.0)
        await self._announce(ServerState.ONLINE)
        self._neighbours = Neighbours(
            self._directory,
            lambda: self.record,
            self._asker(measure_rtt),
            self._asker(measure_uplink),
            random.SystemRandom(),
        )
        self._tasks.append(asyncio.create_task(self._neighbours.run()))
        self._balancing = asyncio.create_task(self._balance())
        self._tasks.append(self._balancing)

    def _study(
        self, checkpoint: Checkpoint, stack: AsyncExitStack
    ) -> asyncio.Task[tuple[SplitProof, int]]:
        """Whether it can be cut, and its `block_parameters`, while the DHT's daemon starts."""
        config = checkpoint.config
        work = in_thread(lambda: (prove_split(config), throughput.block_parameters(config)))
        studying = asyncio.create_task(work)
        # Another error may come first, after which nobody asks for this one.
        studying.add_done_callback(lambda task: task.cancelled() or task.exception())

        async def outlive(kind: type[BaseException] | None, *_: object) -> None:
            # Torch aborts a process that ends while a thread is in there. Whoever cancels the
            # start does not wait; the process must end in another way then.
            if kind is not asyncio.CancelledError:
                await asyncio.wait({studying})
            studying.cancel()

        stack.push_async_exit(outlive)
        return studying

    async def _choose(
        self, checkpoint: Checkpoint, access: Access, proof: SplitProof, block_parameters: int
    ) -> SwarmView:
        """Settle what is served: blocks and numerics, by what others do."""
        config, model = self._config, ModelId(checkpoint.name, checkpoint.fingerprint)
        self._directory = Directory(self._dht, model, count_blocks(checkpoint), whole=True)
        view = self._directory.view
        if config.peers:
            view = await self._directory.refresh()
        dtype = pick_dtype(config.dtype, checkpoint, view, self._device)
        self._served = Served(
            model=model,
            numerics=Numerics(dtype=dtype),
            access=access,
            certificate_digest=lambda: self._certificate.digest,
            record=self._signed_record,
        )
        source = Source(
            checkpoint,
            proof,
            dtype,
            self._device,
            block_parameters * DTYPE_BYTES[dtype],
            config.limits,
            await in_thread(lambda: Shelf.find(config)),
            given=config.throughput if isinstance(config.throughput, float) else None,
            anew=config.throughput == "eval",
            compile=config.compile,
        )
        self._serving = Serving(source, self._door, self._handle)
        self._fetch = lambda blocks: fetch_span(checkpoint, blocks)
        wanted = size_span(config, checkpoint, dtype, self._device, block_parameters)
        if config.blocks is not None:
            self.blocks = config.blocks
            return view
        others = others_in(view, self._served.numerics, access.identity.peer_id)
        self.blocks = choose_span(view.num_blocks, believe(others), wanted)
        return view

    async def _listen(self, stack: AsyncExitStack) -> None:
        """Take the port, which may be in use, before time is spent on weights."""
        config, limits = self._config, self._config.limits
        self._certificate = issue_certificate(self._served.access.identity, time.time())
        service = Service(self._door.session, self._door.push, self._door.info)
        self._rpc = RpcServer(service, max_streams=_STREAMS_PER_SESSION * limits.max_sessions)
        self._port = await self._rpc.start(config.host, config.port, self._certificate)
        stack.push_async_callback(self._rpc.stop, 0.0)

    async def _introduce(self, stack: AsyncExitStack) -> None:
        """Announce that we join, so that others who choose blocks count us in."""
        try:
            _ = self.record
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "record"
            raise UsageError(
                f"this server cannot be announced ({where}: {first['msg']}): "
                "choose another --name, --model-name or --announce-host"
            ) from error
        identity = self._served.access.identity
        self._announcer = Announcer(self._dht, identity, lambda: self.record, random.SystemRandom())
        stack.push_async_callback(self._announcer.withdraw)
        stack.push_async_callback(self._cancel_tasks)
        for work in (self._announcer.run(), self._keep_certificate_fresh(), _keep_heap_small()):
            self._tasks.append(asyncio.create_task(work))

    async def _show_metrics(self, stack: AsyncExitStack) -> None:
        """Raises UsageError."""
        if (port := self._config.metrics_port) is None:
            return
        gauges = {"others": self._rpc.gauge, "us": self._transport.gauge}

        def numbers() -> Iterator[Family]:
            traffic = {who: (gauge.received, gauge.sent) for who, gauge in gauges.items()}
            return families(self._serving.meters, self._door.handler, self.record, traffic)

        page = Page(numbers, lambda: (self._state is ServerState.ONLINE, str(self._state)))
        stack.push_async_callback(page.close)
        self.metrics_port = await page.start(self._config.metrics_host, port)

    def _handle(self, span: Span, executor: Executor) -> Handler:
        return Handler(
            self._served, span, executor, self._transport, self.resolve, self._config.limits
        )

    # Staying of use --------------------------------------------------------------------------

    async def _balance(self) -> None:
        """Finish what a start need not wait for; then move when that pays."""
        config = self._config
        await self._measure()
        if config.blocks is None and config.balance_quality > 0:
            rng = random.SystemRandom()
            numerics, quality = self._served.numerics, config.balance_quality
            balancer = Balancer(self._directory, numerics, self, quality, rng)
            await balancer.run(config.limits.balance_seconds)

    async def _measure(self) -> None:
        await self._serving.measure()
        self._announcer.changed()
        await in_thread(hugepages.gather)

    @property
    def holder(self) -> Holder:
        """This server, as placement sees it."""
        record = self.record
        speed = max(record.throughput, record.batch_throughput) * len(record.blocks)
        return Holder(record.peer_id, record.blocks, speed)

    @property
    def move_seconds(self) -> float:
        return self._serving.move_seconds

    async def fetch(self, blocks: BlockRange) -> None:
        await in_thread(lambda: self._fetch(blocks))

    async def claim(self, blocks: BlockRange) -> None:
        self.blocks = blocks
        await self._announce(ServerState.JOINING)

    async def stay(self) -> None:
        assert self._serving.blocks is not None
        self.blocks = self._serving.blocks
        await self._announce(ServerState.ONLINE)

    async def move(self, blocks: BlockRange) -> None:
        """Under the same name and address. Raises UsageError."""
        logger.info("moving from blocks %s to %s", self._serving.blocks, blocks)
        try:
            await self._serving.replace(blocks)
        except UsageError:
            await self.stay()
            raise
        self._serving.meters.moves += 1
        await self._announce(ServerState.ONLINE)
        await self._measure()

    @property
    def record(self) -> ServerRecord:
        """What this server says about itself at the moment."""
        load = self._door.handler.load() if self._door.handler else None
        speeds = self._serving.speeds(self.blocks)
        return ServerRecord(
            peer_id=self._served.access.identity.peer_id,
            model=self._served.model,
            blocks=self.blocks,
            num_blocks=self._directory.view.num_blocks,
            host=self._host,
            port=self._port,
            certificate_digest=self._certificate.digest,
            numerics=self._served.numerics,
            state=self._state,
            throughput=speeds.alone,
            batch_throughput=speeds.of_16,
            next_rtts=self._neighbours.next_rtts if self._neighbours else {},
            coordinates=self._neighbours.coordinates if self._neighbours else None,
            uplink=self._neighbours.uplink if self._neighbours else 0,
            queue=min(load.queue, 65_535) if load else 0,
            free_tokens=load.free_tokens if load else 0,
            adapters=announced(self._serving.residents),
            version=_version(),
            public_name=self._config.public_name,
            lifetime=self._config.limits.record_lifetime,
        )

    def _asker(self, ask: Callable[..., Awaitable[float]]) -> Measure:
        access = self._served.access
        return lambda endpoint: ask(self._transport, access, endpoint, _ASK_SECONDS)

    def _signed_record(self) -> bytes:
        signed = self._announcer.signed
        return signed.data if signed is not None else b""

    def resolve(self, target: PushTarget) -> Endpoint:
        """Where to push, by the next hop's own word. Raises InvalidRecord."""
        record = open_record(target.record, key=self._config.swarm_key, now=self._dht.now())
        if (record.model, record.numerics) != (self._served.model, self._served.numerics):
            raise InvalidRecord(f"{record.peer_id} serves another model, or computes otherwise")
        return Endpoint(record.host, record.port, record.peer_id, record.certificate_digest)

    async def _announce(self, state: ServerState) -> None:
        """Publish a new state now; if nobody listens, the announcer tries again later."""
        self._state = state
        try:
            await self._announcer.publish()
        except PeerUnavailable as error:
            logger.warning("could not announce that this server is %s: %s", state, error)

    async def _keep_certificate_fresh(self) -> None:
        while True:
            await asyncio.sleep(_ROTATION_LOOK_SECONDS)
            if needs_rotation(self._certificate, time.time()):
                self.rotate(time.time())

    def rotate(self, now: float) -> None:
        """Connections that stand go on; whoever dials by the old record has to look again."""
        self._certificate = issue_certificate(self._served.access.identity, now)
        self._rpc.rotate(self._certificate)
        self._announcer.changed()

    async def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


async def _keep_heap_small() -> None:
    while True:
        await asyncio.sleep(_HEAP_LOOK_SECONDS)
        await in_thread(heap.give_back)


def _version() -> str:
    try:
        return version("swarm-blocks")[:12]
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""
