"""One participant of the DHT, in the running event loop: the only door to hivemind."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import random
import secrets
import statistics
import time
from collections.abc import AsyncGenerator, Container, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import hivemind.hivemind_cli as hivemind_cli  # and nothing `from hivemind`: see __init__.py
from google.protobuf.message import DecodeError
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID, PeerInfo
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from swarm.dht.daemon import CLIENT, Daemon, DaemonFailed, daemon_arguments
from swarm.dht.keeping import (
    REPLICAS,
    Keepers,
    Storage,
    Validator,
    believe_places_of_peers_only,
    place_of,
)
from swarm.errors import PeerUnavailable, UsageError
from swarm.identity import Identity, SwarmKey

logger = logging.getLogger(__name__)

_RPC_SECONDS = 3.0  # for one answer of one peer
_CONNECT_SECONDS = 5.0
_GREETING_SECONDS = 8.0  # for the first answer of an initial peer, which may be busy
_STRAGGLER_SECONDS = 0.5  # for more initial peers, once one has answered
_OPERATION_SECONDS = 15.0  # for a whole store or look-up
_REJOIN_SECONDS = 15.0  # between searches for lost initial peers
_REMEMBERED = 64  # peers...
_REVISITS = 4  # ...of whom some are looked for at a time, when they are lost
_CLOCKS = 7  # how many peers are asked for the time
_FAILURES = (P2PDaemonError, P2PHandlerError, DecodeError, OSError, EOFError)

_Answer = Literal["welcome", "refused", "silent", "unreached"]

messages: Any = dht_pb2  # generated, and without types

use_hivemind_log_handler("nowhere")  # it takes hold of logging when imported: undo that
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(logging.ERROR)


class DhtNode:
    """Stores and finds signed records. Made by `create`, ended by `close`."""

    @classmethod
    async def create(
        cls,
        identity: Identity,
        initial_peers: Sequence[str] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        key: SwarmKey | None = None,
        client_mode: bool = False,
    ) -> DhtNode:
        """Start a node and join the swarm that any of `initial_peers` (multiaddrs) belongs to.

        In client mode nobody can connect to it and it stores nothing for others.
        Raises UsageError, in one sentence, if that cannot be.
        """
        peers = [peer for peer in map(_Peer, initial_peers) if peer.name != identity.peer_id]
        node = cls(identity, peers, key, daemon_arguments(host, port, client_mode))
        try:
            await node._start()
            if peers:
                await node._join()
        except BaseException:
            await node.close()
            raise
        node._keeper = asyncio.create_task(node._keep_joined())
        return node

    def __init__(
        self, identity: Identity, peers: list[_Peer], key: SwarmKey | None, arguments: list[str]
    ) -> None:
        """Use `create`."""
        self.identity, self.key = identity, key
        self.clock_offset = 0.0  # seconds that the swarm's clock is ahead of ours
        self._peers, self._arguments = peers, arguments
        self._daemon: Daemon | None = None
        self._control: Any = None  # hivemind's connection to the daemon
        self._dht: DHTNode | None = None
        self._kept: Keepers
        self._met: dict[PeerID, _Peer] = {}
        self._keeper: asyncio.Task[None] | None = None

    def now(self) -> float:
        """Seconds since 1970 by the swarm's clock, which ours may differ from by an hour."""
        return time.time() + self.clock_offset

    async def store(self, keys: Sequence[str], value: bytes, kept_until: float) -> bool:
        """Store our own record under each key; False if a node did not take it."""
        async with self._working("store a record in the DHT"):
            return await self._kept.store(keys, value, kept_until, self.identity.peer_id)

    async def get_many(
        self, keys: Sequence[str], replicas: int | None = None
    ) -> dict[str, list[bytes]]:
        """The records under each key, from so many nodes of those that should have them (None:
        all). Raises PeerUnavailable if nobody can be asked.
        """
        async with self._working("look into the DHT") as dht:
            known = dht.protocol.routing_table.uid_to_peer_id
            if self._peers and not known:
                await self._greet_all(self._peers)
                if not known:
                    raise PeerUnavailable("no peer of the swarm answers any more")
            found = await self._kept.get(keys, replicas)
            if self._peers and not known and not any(found.values()):
                await self._greet_all(self._peers)  # all whom we knew turned out to be gone
                found = await self._kept.get(keys, replicas)
            return found

    async def visible_addresses(self) -> list[str]:
        """Our own multiaddrs, as far as the daemon knows them: see `joinable_at`."""
        async with self._working("ask for our addresses") as dht:
            return [str(address) for address in await dht.get_visible_maddrs(latest=True)]

    async def p2p(self) -> P2P:
        """hivemind's connection to the daemon, for more than the DHT: another one after the daemon
        had to be started anew. Raises PeerUnavailable."""
        async with self._working("reach the DHT's daemon") as dht:
            return dht.protocol.p2p

    async def close(self) -> None:
        """Leave the swarm; returns when the daemon is gone. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._stop()

    async def _start(self) -> None:
        p2pd = Path(hivemind_cli.__path__[0]) / "p2pd"
        try:
            self._daemon = await Daemon.start(p2pd, self.identity, self._arguments)
        except DaemonFailed as error:
            raise UsageError(f"the DHT does not start: {error}; check its host and port") from error
        p2p: Any = await P2P.replicate(Multiaddr(f"/unix{self._daemon.control}"))
        self._control = control = p2p._client.control
        control._read_task.add_done_callback(lambda _: _fail(control._pending_calls.values()))
        dht = await DHTNode.create(
            p2p,
            place_of(PeerID.from_base58(self.identity.peer_id)),
            num_replicas=REPLICAS,
            wait_timeout=_RPC_SECONDS,
            cache_locally=False,  # look-ups must see what has changed
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            client_mode=CLIENT in self._arguments,
            record_validator=(validator := Validator(self.key, self.now)),
            authorizer=_Authorizer(self.key, self.identity.peer_id) if self.key else None,
        )
        protocol: Any = dht.protocol
        # Into the cache anybody may put anything, and what is there goes before what is stored.
        protocol.storage = protocol.cache = Storage()
        believe_places_of_peers_only(protocol)
        # hivemind drops a whole answer for one bad record in it, with which anybody could hide all
        protocol._validate_dictionary = validator.drop_invalid
        make_stub = protocol.get_stub

        def stub_for(peer: PeerID) -> Any:
            stub = make_stub(peer)
            stub._service_public_key = peer  # reaches _Authorizer.sign_request
            return stub

        protocol.get_stub = stub_for
        self._dht, self._kept = dht, Keepers(dht)

    def _running(self) -> DHTNode | None:
        """None when nobody reads the daemon's answers any more: then it has ended, or one came in
        the moment in which its question was given up, which hivemind's task does not survive."""
        if self._dht is None or self._control._read_task.done():
            return None
        return self._dht

    async def _stop(self) -> None:
        self._dht = None
        if self._control is not None:
            self._control.close()
            tasks = self._control._read_task, self._control._write_task
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._daemon is not None:
            await self._daemon.stop()

    async def _join(self) -> None:
        addresses = ", ".join(peer.text for peer in self._peers)
        answers = await self._greet_all(self._peers)
        if "welcome" not in answers:
            if "refused" in answers:
                raise UsageError(f"the peers at {addresses} do not let us in: check the swarm key")
            if "silent" in answers:
                raise UsageError(f"the peers at {addresses} do not answer: try again in a minute")
            raise UsageError(
                f"no peers reachable at {addresses}: check the addresses, and that they are up"
            )
        async with self._working("join the DHT") as dht:
            await dht.find_nearest_nodes([dht.node_id])
            neighbours = list(dht.protocol.routing_table.uid_to_peer_id.values())[:_CLOCKS]
            clocks = await asyncio.gather(*(self._ping(peer) for peer in neighbours))
        offsets = [offset for offset in clocks if not isinstance(offset, str)]
        if len(offsets) != 1:  # of two who disagree the other is right; among more we have a vote
            offsets.append(0.0)
        self.clock_offset = statistics.median(offsets)
        if abs(self.clock_offset) > 60:
            logger.warning("this machine's clock is %.0f s behind others'", self.clock_offset)

    async def _greet_all(self, peers: Sequence[_Peer]) -> set[_Answer]:
        """Connect to all at once; what `_greet` says of those who were quick enough."""
        greetings = [asyncio.create_task(self._greet(peer)) for peer in peers]
        answers, clock = set[_Answer](), asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as patience:
                for greeting in asyncio.as_completed(greetings):
                    answers.add(await greeting)
                    if "welcome" in answers:
                        patience.reschedule(clock() + _STRAGGLER_SECONDS)
        except TimeoutError:
            pass
        finally:
            for straggler in greetings:
                straggler.cancel()
        return answers

    async def _greet(self, peer: _Peer) -> _Answer:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._control.connect(peer.id, [peer.address])
        except _FAILURES as error:
            logger.info("no peer at %s: %s", peer.text, error or "timeout")
            return "unreached"
        answer = await self._ping(peer.id, _GREETING_SECONDS)
        return answer if isinstance(answer, str) else "welcome"

    async def _ping(
        self, peer: PeerID, seconds: float = _RPC_SECONDS
    ) -> float | Literal["refused", "silent"]:
        """Know and be known by a peer. How far its clock is ahead, if it answers."""
        if (dht := self._running()) is None:
            return "silent"
        protocol, asked = dht.protocol, time.time()
        request = messages.PingRequest(peer=protocol.node_info, validate=False)
        try:
            answer = await protocol.get_stub(peer).rpc_ping(request, timeout=seconds)
        except P2PHandlerError:  # it failed over our question: so hivemind's servers refuse
            logger.info("peer %s does not let us in: its swarm has another key", peer)
            return "refused"
        except _FAILURES as error:
            logger.info("peer %s does not answer: %s", peer, error or "timeout")
            return "silent"
        if answer is None or len(answer.peer.node_id) != DHTID.HASH_NBYTES:
            logger.info("peer %s does not hold our swarm key, or is a client", peer)
            return "refused"
        await protocol.update_routing_table(DHTID.from_bytes(answer.peer.node_id), peer)
        offset = answer.dht_time - (asked + time.time()) / 2
        return offset if math.isfinite(offset) else 0.0

    async def _keep_joined(self) -> None:
        """Bring back a daemon that died, and meet peers again after they, or we, were cut off:
        initial ones, and others whom we knew, since all initial ones may be gone for good."""
        while True:
            await asyncio.sleep(_REJOIN_SECONDS)
            try:
                if self._running() is None:
                    logger.warning("the DHT's daemon has ended: starting another one")
                    await self._stop()
                    await self._start()
                async with self._working("look for peers") as dht:
                    known = dht.protocol.routing_table.peer_id_to_uid
                    self._remember(await dht.protocol.p2p.list_peers(), known)
                lost = [peer for peer in self._peers if peer.id not in known]
                gone = [peer for name, peer in self._met.items() if name not in known]
                lost += random.sample(gone, min(_REVISITS, len(gone)))
                if "welcome" in await self._greet_all(lost):
                    async with self._working("look for their neighbours") as dht:
                        await dht.find_nearest_nodes([dht.node_id])
            except (UsageError, PeerUnavailable, *_FAILURES) as error:
                logger.warning("%s; trying again in %.0f s", error, _REJOIN_SECONDS)

    def _remember(self, connected: Sequence[PeerInfo], known: Container[PeerID]) -> None:
        """Where those are who take part and whom we talk to."""
        for info in connected:
            if info.peer_id in known and info.addrs:
                if len(self._met) >= _REMEMBERED and info.peer_id not in self._met:
                    del self._met[random.choice(list(self._met))]
                self._met[info.peer_id] = _Peer(f"{info.addrs[0]}/p2p/{info.peer_id}")

    @asynccontextmanager
    async def _working(self, what: str) -> AsyncGenerator[DHTNode, None]:
        """The running node, within a deadline, with hivemind's errors translated."""
        if (dht := self._running()) is None:
            raise PeerUnavailable(f"could not {what}: its daemon has ended")
        try:
            async with asyncio.timeout(_OPERATION_SECONDS):
                yield dht
                if self._running() is None:
                    raise P2PDaemonError("its daemon has ended")
        except TimeoutError as error:
            raise PeerUnavailable(f"could not {what} in {_OPERATION_SECONDS:.0f} s") from error
        except _FAILURES as error:
            raise PeerUnavailable(f"could not {what}: {error}") from error


class _Peer:
    """An initial peer: where it listens, and who it must turn out to be."""

    def __init__(self, text: str) -> None:
        """Raises UsageError."""
        self.text = text
        try:
            address = Multiaddr(text)
            self.name: str = address["p2p"]
            self.id = PeerID.from_base58(self.name)
            self.address = address.decapsulate("/p2p/" + self.name)
            if "tcp" not in self.address:
                raise ValueError("no TCP port")
        except (ValueError, LookupError) as error:
            raise UsageError(
                f"'{text}' is not the address of a peer, "
                "which looks like /ip4/10.0.0.5/tcp/4001/p2p/Qm...; copy it from a server's output"
            ) from error


class _Authorizer(AuthorizerBase):
    """Stamps each DHT message with the swarm key, and refuses what is not stamped for us.

    libp2p encrypts, so only its recipient could repeat a message, and it is stamped for that one.
    """

    def __init__(self, key: SwarmKey, peer_id: str) -> None:
        self._key, self._recipient = key, PeerID.from_base58(peer_id).to_bytes()

    async def sign_request(self, request: Any, service_public_key: Any) -> None:
        request.auth.service_public_key = service_public_key.to_bytes()
        request.auth.nonce = secrets.token_bytes(16)
        request.auth.signature = self._stamp(b"request", request)

    async def validate_request(self, request: Any) -> bool:
        for_us: bool = request.auth.service_public_key == self._recipient
        if not (good := for_us and self._stamped(b"request", request)):
            logger.info("refused a DHT request without the swarm key")
        return good

    async def sign_response(self, response: Any, request: Any) -> None:
        response.auth.nonce = request.auth.nonce
        response.auth.signature = self._stamp(b"response", response)

    async def validate_response(self, response: Any, request: Any) -> bool:
        return response.auth.nonce == request.auth.nonce and self._stamped(b"response", response)

    def _stamp(self, kind: bytes, message: Any) -> bytes:
        return self._key.stamp(kind + message.SerializeToString(deterministic=True))

    def _stamped(self, kind: bytes, message: Any) -> bool:
        signature: bytes = message.auth.signature
        message.auth.signature = b""
        return hmac.compare_digest(self._stamp(kind, message), signature)


def _fail(calls: Iterable[asyncio.Future[Any]]) -> None:
    """hivemind would let them wait for their time-outs."""
    for call in calls:
        if not call.done():
            call.set_exception(P2PDaemonError("the daemon has ended"))
