"""What a step took at each hop is seen by the client, whatever servers say."""

from __future__ import annotations

import asyncio

import pytest

from swarm.client import steps
from swarm.client.peers import PeerBook
from swarm.client.steps import Sent
from swarm.fakes import Fate
from swarm.messages import Message, Output, Step, TensorFrame
from swarm.wire import decode
from tests.client.market import book
from tests.client.twins import THIRDS, House

SLOW = 0.05  # seconds


def test_times_lie_between_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now)
    hidden = TensorFrame(dtype="float32", shape=(1, 1, 1), data=bytes(4))
    sent = Sent(Step(epoch=0, step=0, start=0, hidden=hidden), set(), 1)
    now = 101.0
    assert sent.elapsed(0) == 1.0
    now = 103.0
    assert sent.elapsed(1) == 2.0
    now = 104.0
    assert sent.elapsed(3) == 0.0  # it overtook the one before it
    now = 106.0
    assert sent.elapsed(2) == 3.0  # which pays for that


def test_a_server_that_lies_about_its_speed_is_measured_by_its_answers() -> None:
    with House(spans=THIRDS) as house:
        peers: PeerBook = book(**{server.peer_id: 0.0 for server in house.servers})
        liar = house.servers[1].peer_id
        seen: list[float] = []

        def worked(name: str, tokens: int, seconds: float, blocks: int, elapsed: float) -> None:
            peers.worked(name, tokens, 0.0, blocks, elapsed=elapsed)
            seen.append(elapsed)

        async def dawdle(source: str, target: str, method: str, frame: bytes) -> Fate:
            message: Message = decode(frame)
            if source == liar and isinstance(message, Output | Step):
                await asyncio.sleep(SLOW)
            return Fate.DELIVER

        house.swarm.router.worked = worked  # type: ignore[method-assign]
        with house.twin() as twin:
            twin.step(3)
            house.swarm.network.before_frame = dawdle
            for _ in range(5):
                twin.step()
        assert all(elapsed >= 0 for elapsed in seen)
        took = {server.peer_id: peers.block_seconds(server.peer_id) for server in house.servers}
        assert (took[liar] or 0) > SLOW / 2 / 4  # two blocks, and the first step was quick
        assert (took[house.servers[0].peer_id] or 0) < (took[liar] or 0)
