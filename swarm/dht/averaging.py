"""hivemind's averaging over a DHT node of ours: with its neighbours the door to hivemind.

Its DecentralizedAverager is a process that must be forked (its futures live in shared memory), gets
pickles through pipes, makes whoever starts it deaf to Ctrl-C, changes tensors while parts arrive,
and hands them to anybody who asks. What works inside it are coroutines: its matchmaking and its
butterfly all-reduce (Ryabinin et al., https://arxiv.org/abs/2103.03239). They run here, in our
event loop, as its DHT does in node.py, and all that comes from others is looked at first.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, AsyncIterator, cast  # noqa: UP035  # hivemind reads them

from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.p2p import P2PContext, P2PDaemonError, P2PHandlerError, PeerID, ServicerBase
from hivemind.proto import averaging_pb2 as generated
from hivemind.utils.asyncio import achain, as_aiter
from hivemind.utils.multiaddr import Multiaddr
from torch import Tensor

from swarm.dht.allreduce import Runner
from swarm.dht.bounded import Bounded, bounded_calls
from swarm.dht.daemon import inbox_of
from swarm.dht.meeting import Meeting, Member
from swarm.dht.node import DhtNode
from swarm.errors import InvalidRecord, PeerUnavailable, ProtocolError
from swarm.wire import pack, unpack

logger = logging.getLogger(__name__)

messages: Any = generated  # without types
if TYPE_CHECKING:
    JoinRequest = MessageFromLeader = AveragingData = Any
else:  # hivemind reads the annotations of methods that others may call
    JoinRequest, MessageFromLeader = messages.JoinRequest, messages.MessageFromLeader
    AveragingData = messages.AveragingData

MAX_MEMBERS = 64  # of a group
MAX_SAMPLES = 1 << 40
_MAX_STREAMS = 2 * MAX_MEMBERS  # at a time, from all...
_MAX_STREAMS_EACH = 4  # ...and from one
_MAX_GATHERED = 2048  # bytes that somebody tells of themselves
_CONNECT_SECONDS = 3.0  # until somebody answers to an opened stream, or to a request to join
_POLL_SECONDS = 0.3  # between looks for others into the DHT
# Until a leader is asked again who refused, or did not answer: two who ask each other at a time do
# neither. Few times, since others wait while one who never answers is asked.
_AGAIN_SECONDS = (1.0, 5.0)
_LINGER_SECONDS = 0.5  # until the daemon has sent what we answered
_STALLED = 3  # times `silence` without progress, longer than anybody is waited for
_FAILURES = (P2PDaemonError, P2PHandlerError, AllreduceException, OSError, EOFError)

PeerGone = asyncio.TimeoutError  # as which hivemind takes whoever cannot be asked


@dataclass(frozen=True, slots=True)
class Rounds:
    """How long is waited for whom. All times are in seconds, and bounds: a round that cannot be
    finished within them ends without, and everybody keeps what they have."""

    size: int | None = None  # how many take part at most: when so many have come, it begins at once
    gather: float = 30.0  # for others to come
    silence: float = 10.0  # of one member, who is left out then; of one who sums up, twice this
    exchange: float = 120.0  # for all that is sent, at most


@dataclass(frozen=True, slots=True)
class Averaged:
    """What a round brought. `vector` is the weighted mean over members, [N] float32, wherever they
    all answered: `missing` of its numbers are still our own."""

    vector: Tensor
    members: tuple[Member, ...]
    lost: tuple[str, ...]  # peer ids of those who were left out of what we summed up
    missing: int


class Averager(ServicerBase):
    """One member of the groups that meet for `meeting`. For the event loop of its node."""

    def __init__(self, node: DhtNode, meeting: Meeting, rounds: Rounds, *, listens: bool) -> None:
        self._node, self._meeting, self._rounds, self._listens = node, meeting, rounds, listens
        self._p2p: Any = None
        self._matching: _Matching | None = None
        self._runner: asyncio.Future[Runner | None] | None = None
        self._alone = asyncio.Lock()
        self._streams: Counter[PeerID] = Counter()
        self._quiet = asyncio.Event()  # nobody is being answered
        self._quiet.set()
        self._answered = -math.inf  # the last of them, by the loop's clock

    async def open(self) -> None:
        """Be there for others. Raises PeerUnavailable."""
        await self._serving()

    async def average(self, vector: Tensor, samples: int) -> Averaged | None:
        """Meet others who do the same, and average with them; None if nobody came.

        `vector` is [N], float32, on the CPU, finite; it is not changed. Our part in the mean is in
        proportion to `samples`. Raises PeerUnavailable when it came to nothing.
        """
        async with self._alone:
            self._runner = turn = asyncio.get_running_loop().create_future()
            try:
                p2p = await self._serving()
                told = pack([samples, self._listens, self._meeting.introduction()])
                group = await self._match(p2p, told)
                if group is None:
                    return None
                members = [
                    self._meeting.member(peer.to_base58(), *_heard(gathered))
                    for peer, gathered in zip(group.peer_ids, group.gathered, strict=True)
                ]
                silence = self._rounds.silence
                runner = Runner(p2p, (type(self), self._name), vector, group, members, silence)
                turn.set_result(runner)
                return await self._exchange(runner, vector, members)
            except _FAILURES as error:
                raise PeerUnavailable(f"averaging failed: {error or 'connection lost'}") from error
            finally:
                self._matching = None
                if not turn.done():
                    turn.set_result(None)

    async def close(self) -> None:
        """Let others have what they wait for, and leave. Idempotent."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rounds.silence):
                await self._quiet.wait()
                since = asyncio.get_running_loop().time() - self._answered
                await asyncio.sleep(max(0.0, _LINGER_SECONDS - since))
        await self._node.close()
        if self._p2p is not None:
            await self._p2p.shutdown()

    @property
    def _name(self) -> str:
        return self._meeting.key

    async def _serving(self) -> Any:
        """hivemind's connection to the daemon, on which others reach us."""
        p2p: Any = await self._node.p2p()
        if p2p is not self._p2p:
            if self._p2p is not None:  # of a daemon that has ended
                await self._p2p.shutdown()
            self._p2p = p2p
            control = p2p._client.control
            inbox = inbox_of(Path(f"{p2p._daemon_listen_maddr}".removeprefix("/unix")))
            control.listen_maddr = p2p._client_listen_maddr = Multiaddr(f"/unix{inbox}")
            call = p2p.call_binary_stream_handler
            p2p.call_binary_stream_handler = bounded_calls(call, _CONNECT_SECONDS)
            if self._listens:
                await self.add_p2p_handlers(p2p, namespace=self._name)
                for name, handler in list(control.handlers.items()):
                    control.handlers[name] = self._bounded_handler(handler)
        return p2p

    def _bounded_handler(self, handler: Any) -> Any:
        async def handle(info: Any, reader: Any, writer: Any) -> None:
            streams, peer = self._streams, info.peer_id
            if streams.total() >= _MAX_STREAMS or streams[peer] >= _MAX_STREAMS_EACH:
                writer.close()
                return
            streams[peer] += 1
            self._quiet.clear()
            try:
                await handler(info, Bounded(reader), writer)
            finally:
                streams[peer] -= 1
                self._answered = asyncio.get_running_loop().time()
                if not +streams:
                    streams.clear()
                    self._quiet.set()

        return handle

    async def _match(self, p2p: Any, told: bytes) -> GroupInfo | None:
        rounds = self._rounds
        patience = min(_CONNECT_SECONDS, rounds.gather / 2)
        deadline = time.time() + rounds.gather + patience + _POLL_SECONDS
        self._matching = matching = _Matching(
            p2p,
            self._meeting.layout,
            cast(Any, _Noticeboard(self._node, self._meeting, p2p.peer_id)),
            servicer_type=type(self),
            prefix=self._name,
            target_group_size=rounds.size or MAX_MEMBERS,
            min_group_size=2,
            min_matchmaking_time=rounds.gather,
            request_timeout=patience,
            client_mode=not self._listens,
        )
        matching.meeting = self._meeting
        step = _Step(deadline, told)
        try:
            async with asyncio.timeout(rounds.gather + 3 * _CONNECT_SECONDS):
                return await matching.look_for_group(cast(Any, step))
        except TimeoutError:
            return None
        finally:
            matching.end()

    async def _exchange(self, runner: Runner, vector: Tensor, members: list[Member]) -> Averaged:
        average = vector
        hurrying = asyncio.create_task(self._hurry(runner))
        try:
            async with asyncio.timeout(self._rounds.exchange):
                async for change in runner:
                    average = vector + change
        except TimeoutError as error:
            raise PeerUnavailable(
                f"averaging took more than {self._rounds.exchange:.0f} s"
            ) from error
        finally:
            hurrying.cancel()
            runner.end()
        lost = sorted(peer.to_base58() for peer in runner.banned_senders)
        missing = runner.tensor_part_container.failed_size
        return Averaged(average, tuple(members), tuple(lost), missing)

    async def _hurry(self, runner: Runner) -> None:
        """Whatever a round hangs on, it ends a few times `silence` after its last progress."""
        done = -1
        while runner.parts_done > done:
            done = runner.parts_done
            await asyncio.sleep(_STALLED * self._rounds.silence)
        runner.give_up_the_rest()

    async def rpc_join_group(
        self, request: JoinRequest, context: P2PContext
    ) -> AsyncIterator[MessageFromLeader]:
        """Somebody wants to be in the group that we lead."""
        if self._matching is None:
            code = messages.NOT_LOOKING_FOR_GROUP
            yield messages.MessageFromLeader(code=code)
            return
        async for message in self._matching.rpc_join_group(request, context):
            yield message

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[AveragingData], context: P2PContext
    ) -> AsyncIterator[AveragingData]:
        """A member's numbers, of the part of the vector that we sum up; answered by the change."""
        first: AveragingData | None = None
        runner: Runner | None = None
        with suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(self._rounds.silence):
                first = await anext(stream)
                if self._runner is not None:  # the leader may have told others before us
                    runner = await asyncio.shield(self._runner)
        if first is None or runner is None or not runner.expects(first, context.remote_id):
            yield messages.AveragingData(code=messages.BAD_GROUP_ID)
            return
        whole = achain(as_aiter(first), stream)
        async for message in runner.rpc_aggregate_part(whole, context):
            yield message


class _Matching(Matchmaking):
    """Admits nobody who has not introduced themselves, and follows no leader with others."""

    meeting: Meeting

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._failed: Counter[PeerID] = Counter()

    async def _request_join_group(self, leader: PeerID) -> GroupInfo | None:
        group = await super()._request_join_group(leader)
        if group is None and self._failed[leader] < len(_AGAIN_SECONDS):
            # hivemind asks nobody again before they announce themselves anew: when all is over.
            pause = _AGAIN_SECONDS[self._failed[leader]]
            asyncio.get_running_loop().call_later(pause, self._may_ask, leader)
            self._failed[leader] += 1
        return group

    def _may_ask(self, leader: PeerID) -> None:
        search = self.potential_leaders
        tried = {attempt for attempt in search.past_attempts if attempt[0] == leader}
        search.past_attempts -= tried
        if tried:
            search.update_triggered.set()

    def _check_reasons_to_reject(self, request: Any, context: Any) -> Any:
        try:
            self.meeting.member(context.remote_id.to_base58(), *_heard(request.gather))
        except (InvalidRecord, ProtocolError) as error:
            logger.info("refused %s: %s", context.remote_id, error)
            code = messages.PROTOCOL_VIOLATION
            return messages.MessageFromLeader(code=code)
        if math.isfinite(request.expiration):  # by their clock, which may be an hour wrong
            request.expiration = max(
                request.expiration, min(self.potential_leaders.declared_expiration_time, 1e300)
            )
        return super()._check_reasons_to_reject(request, context)

    def end(self) -> None:
        """hivemind leaves tasks behind that wait for these: let them go."""
        search = self.potential_leaders
        for event in (search.running, search.update_triggered, search.update_finished):
            event.set()
        search.declared_expiration.set()
        self.was_accepted_to_group.set()

    async def follower_assemble_group(self, leader: PeerID, msg: Any) -> GroupInfo:
        peers = [PeerID(peer) for peer in msg.ordered_peer_ids]
        try:
            if not 2 <= len(peers) <= MAX_MEMBERS or len(set(peers)) != len(peers):
                raise InvalidRecord("a group of nobody, of too many, or of one twice")
            if len(msg.gathered) != len(peers) or not {leader, self.peer_id} <= set(peers):
                raise InvalidRecord("a group without its leader or us")
            if len(msg.group_id) != 20:  # a DHTID
                raise InvalidRecord("a group without a name")
            for peer, gathered in zip(peers, msg.gathered, strict=True):
                member = self.meeting.member(peer.to_base58(), *_heard(gathered))
                if peer == leader and not member.listens:
                    raise InvalidRecord("a leader who cannot be dialled")
        except (InvalidRecord, ProtocolError) as error:
            logger.info("refused the group of %s: %s", leader, error)
            raise PeerGone from error
        return await super().follower_assemble_group(leader, msg)


class _Noticeboard:
    """What hivemind's matchmaking takes for its DHT: records of ours, by the swarm's clock."""

    def __init__(self, node: DhtNode, meeting: Meeting, peer_id: PeerID) -> None:
        self.peer_id = peer_id
        self._node, self._meeting = node, meeting
        self._looked = False

    async def store(self, *, value: bool, expiration_time: float, **_: object) -> bool:
        until = expiration_time + self._node.clock_offset
        record = self._meeting.notice(until, looking=value)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                kept_until = record.record.kept_until
                return await self._node.store([self._meeting.key], record.data, kept_until)
        except (PeerUnavailable, TimeoutError) as error:
            logger.info("could not say that we are here: %s", error or "timeout")
            return False

    async def get(self, key: str, **_: object) -> Any:
        if self._looked:  # hivemind would ask again and again
            await asyncio.sleep(_POLL_SECONDS)
        self._looked = True
        try:
            found = await self._node.get_many([self._meeting.key])
        except PeerUnavailable as error:
            logger.info("could not look for others: %s", error)
            return None
        offset = self._node.clock_offset
        waiting = {
            PeerID.from_base58(peer_id).to_bytes(): _Until(True, until - offset)
            for peer_id, until in self._meeting.waiting(found[self._meeting.key])
        }
        return _Until(waiting, math.inf)


@dataclass(frozen=True, slots=True)
class _Until:
    value: object
    expiration_time: float


@dataclass(frozen=True, slots=True)
class _Step:
    """As hivemind's StepControl, which lies in shared memory."""

    deadline: float  # seconds since 1970, by our clock
    data_for_gather: bytes
    scheduled_time: float = 0.0

    def get_timeout(self) -> float:
        return max(0.0, self.deadline - time.time())


def _heard(gathered: bytes) -> tuple[int, bool, bytes]:
    """Samples, whether they listen, and their introduction. Raises ProtocolError, InvalidRecord."""
    told = unpack(gathered, _MAX_GATHERED)
    if isinstance(told, list) and [type(value) for value in told] == [int, bool, bytes]:
        samples, listens, introduction = told
        if 1 <= samples <= MAX_SAMPLES:
            return samples, listens, introduction
    raise InvalidRecord("what a member tells of themselves is not readable")
