"""Servers are asked in turn, and who does not answer twice is unreachable."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from swarm.dht.records import ServerRecord, sign_record
from swarm.errors import ErrorCode
from swarm.fakes import FakeNetwork
from swarm.identity import Access, Identity
from swarm.messages import Info, Load, Refused
from swarm.monitor.pulse import Pulse, whose_turn
from swarm.transport import Endpoint, Service
from swarm.wire import encode
from tests.monitor.simulated import NOW, record

ME, SHE, HE = Identity.ephemeral(), Identity.ephemeral(), Identity.ephemeral()


class World:
    """A pulse whose clock is ours, and servers that say what they are told to."""

    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.time = 1000.0
        transport = self.network.transport("me")
        self.pulse = Pulse(transport, Access(ME, None), lambda: NOW, lambda: self.time)

    def serve(self, identity: Identity, answer: bytes) -> ServerRecord:
        shown = record(0, peer_id=identity.peer_id, port=4000 + (identity is HE))

        async def info(_: bytes) -> bytes:
            return answer

        async def nothing(_: object) -> None: ...

        where = Endpoint(shown.host, shown.port, shown.peer_id, shown.certificate_digest)
        self.network.serve(where, Service(nothing, nothing, info))
        return shown

    async def beat(self, *servers: ServerRecord, after: float = 10.0) -> int:
        self.time += after
        return await self.pulse.beat(servers, frozenset())


def in_world(story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await story(world)
        finally:
            await world.network.close()

    asyncio.run(main())


def test_an_answer_tells_distance_load_uptime_and_a_newer_record() -> None:
    async def story(world: World) -> None:
        newer = record(0, peer_id=SHE.peer_id, announced_at=int(NOW * 1000) + 5)
        data = sign_record(newer, SHE, None).data
        counters = {"uptime_seconds": 100}
        info = Info(record=data, load=Load(queue=3), counters=counters)
        shown = world.serve(SHE, encode(info))
        assert await world.beat(shown) == 1
        answer = world.pulse.answers[SHE.peer_id]
        assert answer.reachable is True
        assert answer.rtt is not None
        assert 0 < answer.rtt < 1
        assert answer.load == Load(queue=3)
        assert answer.up == NOW - 100
        assert answer.record == newer

    in_world(story)


@pytest.mark.parametrize("what", ["another's record", "nonsense for a record"])
def test_a_record_that_is_not_its_own_is_ignored(what: str) -> None:
    async def story(world: World) -> None:
        theirs = sign_record(record(0, peer_id=HE.peer_id), HE, None).data
        data = theirs if what == "another's record" else b"nonsense"
        shown = world.serve(SHE, encode(Info(record=data, load=Load())))
        await world.beat(shown)
        answer = world.pulse.answers[SHE.peer_id]
        assert answer.record is None
        assert answer.reachable is True

    in_world(story)


def test_two_failures_make_it_unreachable_and_one_answer_mends_that() -> None:
    async def story(world: World) -> None:
        shown = world.serve(SHE, encode(Info(record=b"r", load=Load())))
        where = Endpoint(shown.host, shown.port, shown.peer_id, shown.certificate_digest)
        world.network.cut(where)
        await world.beat(shown)
        assert world.pulse.unreachable == frozenset()
        assert world.pulse.answers[SHE.peer_id].reachable is None
        assert await world.beat(shown, after=0.5) == 0, "asked again a second later"
        await world.beat(shown, after=0.6)
        assert world.pulse.unreachable == {SHE.peer_id}
        world.network.restore(where)
        assert await world.beat(shown, after=5.0) == 0, "and then more and more rarely"
        await world.beat(shown, after=30.0)
        assert world.pulse.unreachable == frozenset()

    in_world(story)


def test_who_refuses_because_it_still_loads_is_there() -> None:
    async def story(world: World) -> None:
        shown = world.serve(SHE, encode(Refused(code=ErrorCode.BUSY, message="loading")))
        await world.beat(shown)
        assert world.pulse.answers[SHE.peer_id].reachable is True

    in_world(story)


def test_who_is_not_listed_any_more_is_forgotten() -> None:
    async def story(world: World) -> None:
        await world.beat(world.serve(SHE, encode(Info(record=b"r", load=Load()))))
        assert await world.beat() == 0
        assert world.pulse.answers == {}

    in_world(story)


def test_in_a_large_swarm_few_are_asked_at_a_time_and_everybody_in_turn() -> None:
    small = {f"p{i}": float(i) for i in range(100)}
    assert whose_turn(small, now=50.0) == {f"p{i}" for i in range(16)}
    assert whose_turn(small, now=-1.0) == frozenset()
    large = {f"p{i}": float(i) for i in range(1000)}
    assert whose_turn(large, now=2000.0) == {"p0", "p1"}
