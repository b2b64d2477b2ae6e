"""A server from its configuration to its last goodbye: what is started here is stopped here."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from pydantic import ValidationError

from swarm.certificates import issue_certificate, needs_rotation
from swarm.config import ServerLimits
from swarm.dht.addresses import joinable_at, own_host
from swarm.dht.announcer import Announcer
from swarm.dht.directory import Directory, SwarmView, list_models
from swarm.dht.node import DhtNode
from swarm.dht.records import ServerRecord, ServerState, open_record
from swarm.errors import InvalidRecord, OutOfPages, PeerUnavailable, UsageError
from swarm.identity import Access, Identity, SwarmKey
from swarm.loop import in_thread
from swarm.messages import PushTarget
from swarm.models.checkpoint import Checkpoint
from swarm.models.families import text_config
from swarm.models.loading import load_span
from swarm.models.selftest import prove_split
from swarm.models.spans import Span, SplitProof
from swarm.rpc import RpcServer, RpcTransport
from swarm.server import placement, throughput
from swarm.server.backend import Backend
from swarm.server.balancer import holders_in
from swarm.server.door import Door
from swarm.server.executor import Executor
from swarm.server.handler import Handler, Served
from swarm.server.placement import believe
from swarm.tensors import DTYPE_NAMES, TORCH_DTYPES
from swarm.transport import Endpoint, Service
from swarm.types import DTYPE_BYTES, BlockRange, DType, ModelId, Numerics

logger = logging.getLogger(__name__)

_STREAMS_PER_SESSION = 3  # the client's, the hop before's, and one that is being replaced
_ROTATION_LOOK_SECONDS = 3600.0
_DRAIN_LOOK_SECONDS = 0.05
_GOODBYE_SECONDS = 3.0  # for telling the DHT that we drain


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a server is asked to be. Where a choice is None or `auto`, the swarm decides."""

    model: str | Path | None = None
    model_name: str | None = None  # by which others know the model
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    blocks: BlockRange | None = None
    num_blocks: int | None = None
    peers: tuple[str, ...] = ()
    host: str = "0.0.0.0"  # noqa: S104  # volunteers serve the world
    port: int = 0
    dht_port: int = 0
    announce_host: str | None = None
    public_name: str = ""
    dtype: DType | Literal["auto"] = "auto"
    device: str = "auto"
    identity: Path | None = None  # None: a new one each time
    swarm_key: SwarmKey | None = field(default=None, repr=False)
    limits: ServerLimits = field(default_factory=ServerLimits)


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
        self._tasks: list[asyncio.Task[None]] = []
        self._state = ServerState.JOINING
        self._throughput = 0.0  # tokens/s, known once the span is loaded

    @property
    def ready_line(self) -> str:
        model, blocks, peers = self._served.model, self.blocks, ",".join(self.peers)
        address = f"{self._host}:{self._port}"
        return f"ready model={model.name} blocks={blocks} address={address} peers={peers}"

    async def wait(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises what a background task failed with: a defect."""
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait(
                {stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done - {stopping}:
                task.result()
        finally:
            stopping.cancel()

    async def drain(self) -> None:
        """Admit nobody any more, and give sessions `stop_timeout` seconds to end or move."""
        deadline = time.monotonic() + self._config.limits.stop_timeout
        self._handler.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._announce(ServerState.DRAINING)
        logger.info("leaving; %d sessions are open", self._handler.sessions)
        # Looking is enough: this happens once, for seconds, and the handler need not know of it.
        while self._handler.sessions and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        identity = Identity.load_or_create(config.identity) if config.identity else None
        access = Access(identity or Identity.ephemeral(), config.swarm_key)
        device = throughput.pick_device(config.device)
        checkpoint = studying = None
        if config.model is not None or not config.peers:
            checkpoint = await self._open(config.model)  # before others are bothered
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
        checkpoint = checkpoint or await self._open_what_is_announced()
        self._proof, block_parameters = await (studying or self._study(checkpoint, stack))
        await self._choose(checkpoint, access, device, block_parameters)
        await self._listen(stack)
        await self._introduce(stack)
        span = await in_thread(lambda: self._load(checkpoint, device))
        await self._serve(stack, span)
        await self._announce(ServerState.ONLINE)

    async def _open(self, model: str | Path | None) -> Checkpoint:
        config = self._config
        checkpoint = await in_thread(
            lambda: Checkpoint.open(
                model, name=config.model_name, revision=config.revision, token=config.token
            )
        )
        count = text_config(checkpoint.config).num_hidden_layers
        if config.blocks is not None and config.blocks.end > count:
            raise UsageError(
                f"{checkpoint.name} has blocks 0:{count}, so it cannot serve {config.blocks}: "
                f"choose --blocks within 0:{count}"
            )
        return checkpoint

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

    async def _open_what_is_announced(self) -> Checkpoint:
        models = await list_models(self._dht)
        if not models:
            raise UsageError("this swarm serves no model yet: say which MODEL to serve")
        wanted = models[0].model
        try:
            checkpoint = await self._open(wanted.name)
        except UsageError as error:
            raise UsageError(
                f"this swarm serves {wanted}, which cannot be had by its name ({error}): "
                f"give its folder as MODEL and --model-name {wanted.name}"
            ) from error
        if checkpoint.fingerprint != wanted.fingerprint:
            raise UsageError(
                f"this swarm serves {wanted}, and what is found under that name has other weights: "
                "say which MODEL (and --revision) to serve"
            )
        return checkpoint

    async def _choose(
        self, checkpoint: Checkpoint, access: Access, device: torch.device, block_parameters: int
    ) -> None:
        """Settle what is served: blocks and numerics, by what others do."""
        config, model = self._config, ModelId(checkpoint.name, checkpoint.fingerprint)
        self._num_blocks: int = text_config(checkpoint.config).num_hidden_layers
        view = SwarmView(model, self._num_blocks)
        if config.peers:
            view = await Directory(self._dht, model, self._num_blocks).refresh()
        dtype = _pick_dtype(config.dtype, checkpoint, view, device)
        self._served = Served(
            model=model,
            numerics=Numerics(dtype=dtype),
            access=access,
            certificate_digest=lambda: self._certificate.digest,
            record=self._signed_record,
        )
        block_bytes = block_parameters * DTYPE_BYTES[dtype]
        free_bytes = throughput.free_bytes(device)
        kv_bytes = config.limits.kv_bytes
        asked = len(config.blocks) if config.blocks else config.num_blocks
        if asked:
            placement.check_fit(
                min(asked, self._num_blocks), block_bytes=block_bytes, free_bytes=free_bytes
            )
        if config.blocks is not None:
            self.blocks = config.blocks
            return
        wanted = asked or placement.fitting_blocks(
            self._num_blocks,
            block_bytes=block_bytes,
            cache_bytes=0 if kv_bytes else throughput.cache_bytes(checkpoint.config, dtype),
            free_bytes=free_bytes - (kv_bytes or 0),
        )
        holders = believe(holders_in(view, self._served.numerics))
        self.blocks = placement.choose_span(self._num_blocks, holders, wanted)
        logger.info("blocks %s are those that the swarm has least of", self.blocks)

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
        for work in (self._announcer.run(), self._keep_certificate_fresh()):
            self._tasks.append(asyncio.create_task(work))

    def _load(self, checkpoint: Checkpoint, device: torch.device) -> Span:
        dtype = TORCH_DTYPES[self._served.numerics.dtype]
        logger.info("loading blocks %s of %s as %s", self.blocks, checkpoint.name, dtype)
        try:
            span = load_span(checkpoint, self.blocks, dtype=dtype, device=device, proof=self._proof)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"blocks {self.blocks} do not fit into {device}: serve fewer with --num-blocks"
            ) from error
        store = span.store
        store.budget = self._config.limits.kv_bytes or throughput.cache_budget(device)
        tokens = store.budget // store.token_bytes
        logger.info("%.2f GiB for keys and values: %d tokens", store.budget / 2**30, tokens)
        try:
            self._throughput = throughput.tokens_per_second(span)
        except OutOfPages as error:
            raise UsageError(
                f"{store.budget} bytes for keys and values hold not one short text, as each token "
                f"takes {store.token_bytes}: give more --kv-memory, or serve fewer --blocks"
            ) from error
        return span

    async def _serve(self, stack: AsyncExitStack, span: Span) -> None:
        limits = self._config.limits
        executor = Executor(Backend(span), limits.pass_tokens)
        executor.start()
        stack.push_async_callback(executor.stop)
        transport = RpcTransport()
        stack.push_async_callback(transport.close)
        self._handler = Handler(self._served, span, executor, transport, self.resolve, limits)
        self._door.handler = self._handler
        # Sessions must end before what they use does.
        stack.push_async_callback(self._rpc.stop, 0.0)

    @property
    def record(self) -> ServerRecord:
        """What this server says about itself at the moment."""
        load = self._door.handler.load() if self._door.handler else None
        return ServerRecord(
            peer_id=self._served.access.identity.peer_id,
            model=self._served.model,
            blocks=self.blocks,
            num_blocks=self._num_blocks,
            host=self._host,
            port=self._port,
            certificate_digest=self._certificate.digest,
            numerics=self._served.numerics,
            state=self._state,
            throughput=self._throughput,
            queue=min(load.queue, 65_535) if load else 0,
            free_tokens=load.free_tokens if load else 0,
            version=_version(),
            public_name=self._config.public_name,
        )

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


def _pick_dtype(
    wanted: DType | Literal["auto"], checkpoint: Checkpoint, view: SwarmView, device: torch.device
) -> DType:
    """What others compute this model in, so that routes can be made.

    Else float32 on a CPU, which is exact there and slow in half precision, and elsewhere as stored.
    """
    if wanted != "auto":
        return wanted
    if view.servers:
        common = Counter(server.record.numerics.dtype for server in view.servers)
        return cast(DType, common.most_common(1)[0][0])
    if device.type == "cpu":
        return "float32"
    own = text_config(checkpoint.config).dtype or getattr(checkpoint.config, "dtype", None)
    name = DTYPE_NAMES.get(own, "float32") if isinstance(own, torch.dtype) else "float32"
    return cast(DType, name) if name in get_args(DType) else "float32"


def _version() -> str:
    try:
        return version("swarm-blocks")[:12]
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""
