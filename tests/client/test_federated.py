"""Several people, one adapter: means by samples, who leaves, who lies, what is sent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hivemind.p2p import P2P
from torch import nn

from swarm.client.federated import FederatedAverager, Round, Rounds
from swarm.dht import averaging
from swarm.dht.allreduce import Runner
from swarm.dht.averaging import Averager
from swarm.errors import UsageError
from swarm.identity import SwarmKey

HERE = "127.0.0.1:0"
QUICK = Rounds(gather=1.0, silence=1.0, exchange=10.0)
KEY = SwarmKey.generate()
SIZE = 5000


def adapter(value: float | None = None, size: int = SIZE) -> Any:
    """Two tensors that learn and one that does not, all of one number if `value`."""
    module = nn.ModuleDict({"lora": nn.Linear(size, 2), "frozen": nn.Linear(3, 3)})
    module["frozen"].requires_grad_(False)
    if value is not None:
        for parameter in module["lora"].parameters():
            nn.init.constant_(parameter, value)
    return module


def numbers(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module["lora"].parameters()])


class Federation:
    """Clients in this process, each with a node of its own; closed at the end of the test."""

    def __init__(self) -> None:
        self.averagers: list[FederatedAverager] = []
        self.peers: list[str] = []

    def add(self, module: nn.Module, rounds: Rounds = QUICK, **options: Any) -> FederatedAverager:
        options = {"run_id": "test", "listen": HERE, "swarm_key": KEY} | options
        averager = FederatedAverager(module, self.peers, rounds=rounds, **options)
        self.averagers.append(averager)
        self.peers = self.peers or averager.addresses
        return averager

    def average(self, *samples: int) -> list[Round]:
        """All at once, each with so many samples."""
        found: dict[int, Round] = {}

        def one(index: int) -> None:
            found[index] = self.averagers[index].average(samples[index])

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        return [found[index] for index in range(len(samples))]


@pytest.fixture
def federation() -> Iterator[Federation]:
    made = Federation()
    yield made
    for averager in made.averagers:
        averager.close()


def daemons() -> set[int]:
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if child.name() == "p2pd"}


def test_the_mean_is_weighted_by_samples_and_nothing_else_is_sent(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four clients, one of whom nobody can dial, in a private swarm; every byte that they write to
    each other is looked at. No process of theirs is left at the end."""
    before = daemons()
    sent: list[Any] = []
    send = P2P.send_protobuf

    async def spy(message: Any, writer: Any) -> None:
        sent.append(message)
        await send(message, writer)

    monkeypatch.setattr(P2P, "send_protobuf", staticmethod(spy))
    modules = [adapter() for _ in range(4)]
    frozen = [module["frozen"].weight.clone() for module in modules]
    rounds = Rounds(size=4, gather=60.0, silence=5.0)
    for module in modules[:3]:
        federation.add(module, rounds)
    federation.add(modules[3], rounds, listen=None)
    samples = (1, 20, 300, 7)
    vectors = [numbers(module) for module in modules]
    stacked = torch.stack([vector.double() for vector in vectors])
    weights = torch.tensor(samples, dtype=torch.float64)
    expected = ((weights[:, None] * stacked).sum(0) / weights.sum()).float()
    done = federation.average(*samples)
    for module, result in zip(modules, done, strict=True):
        torch.testing.assert_close(numbers(module), expected, rtol=1e-5, atol=1e-7)
        assert result
        assert result.samples == sum(samples)
        assert {member.samples for member in result.members} == set(samples)
        assert result.share == 1.0
        assert not result.lost
        assert result.seconds < 10
    for module, weight in zip(modules, frozen, strict=True):
        assert torch.equal(module["frozen"].weight, weight)

    parts = [message for message in sent if type(message).__name__ == "AveragingData"]
    assert len(parts) > 8
    whole = torch.cat([*vectors, *(expected - vector for vector in vectors)]).numpy()
    known = np.sort(whole)
    for message in parts:  # our numbers, or how far the mean is from somebody's
        values = np.frombuffer(message.tensor_part.buffer, np.float32)
        near = known[np.clip(np.searchsorted(known, values), 1, len(known) - 1)]
        near_too = known[np.clip(np.searchsorted(known, values) - 1, 0, len(known) - 1)]
        assert (np.minimum(abs(near - values), abs(near_too - values)) < 1e-6).all()
        assert message.ByteSize() - len(message.tensor_part.buffer) < 200
    others = [message.ByteSize() for message in sent if message not in parts]
    assert max(others) < 5000  # introductions

    for averager in federation.averagers:
        averager.close()
    assert daemons() == before


def test_one_alone_and_strangers_keep_what_they_have(federation: Federation) -> None:
    """Another run, other shapes and another swarm are other places. All is over in time."""
    modules = [adapter(1.0), adapter(2.0), adapter(3.0, size=SIZE + 1)]
    federation.add(modules[0])
    federation.add(modules[1], run_id="another")
    federation.add(modules[2])
    began = time.monotonic()
    done = federation.average(1, 1, 1)
    assert time.monotonic() - began < QUICK.gather + 8
    for module, result, value in zip(modules, done, (1.0, 2.0, 3.0), strict=True):
        assert not result
        assert result.reason == "nobody else came"
        assert set(numbers(module).tolist()) == {value}
    for key in (None, SwarmKey.generate()):
        with pytest.raises(UsageError, match="check the swarm key"):
            FederatedAverager(
                adapter(), federation.peers, run_id="test", listen=HERE, swarm_key=key
            )


ALL = Rounds(size=4, gather=60.0, silence=1.0, exchange=10.0)
LEAVER = """
import os, signal, sys
from swarm.client.federated import FederatedAverager
from tests.client.test_federated import ALL, HERE, adapter, leaving

async def die():
    os.kill(os.getpid(), signal.SIGKILL)

leaving(die)
averager = FederatedAverager(
    adapter(4.0, 100_000), sys.argv[2:], run_id="test", listen=HERE, swarm_key=sys.argv[1],
    rounds=ALL,
)
print("there", flush=True)
averager.average(4)
"""


def leaving(how: Callable[[], Awaitable[Any]]) -> Callable[[], None]:
    """Who has 4 samples leaves after two parts of what it has to send; undone by the result."""
    send = Runner._generate_input_for_peer

    async def until(self: Runner, peer_index: int) -> AsyncIterator[Any]:
        count = 0
        async for part in send(self, peer_index):
            yield part
            count += 1
            if count == 2 and self.weight == 4:
                await how()

    Runner._generate_input_for_peer = until
    return lambda: setattr(Runner, "_generate_input_for_peer", send)


def left_by_the_fourth(federation: Federation, modules: Sequence[Any]) -> None:
    """The others are done within a few times `silence`, whatever the fourth does. Every number of
    theirs is their own, or a mean with or without it."""
    met: list[float] = []  # when each of them had met the others, which takes what it takes
    exchange = Averager._exchange

    async def noted(*arguments: Any) -> Any:
        met.append(time.monotonic())
        return await exchange(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Averager, "_exchange", noted)
        done = federation.average(1, 2, 3)
    assert time.monotonic() - max(met) < 8 * ALL.silence
    without, whole = (1 + 4 + 9) / 6, (1 + 4 + 9 + 16) / 10
    for own, module, result in zip((1.0, 2.0, 3.0), modules, done, strict=True):
        assert result
        assert 0.25 <= result.share <= 1
        for value in set(numbers(module).tolist()):
            assert min(abs(value - known) for known in (own, without, whole)) < 1e-5


def test_who_dies_amid_a_round_delays_it_a_little(federation: Federation, tmp_path: Path) -> None:
    modules = [adapter(float(value), 100_000) for value in (1, 2, 3)]
    for module in modules:
        federation.add(module, ALL)
    leaver = subprocess.Popen(
        [sys.executable, "-c", LEAVER, KEY.text(), *federation.peers],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        assert leaver.stdout is not None
        assert leaver.stdout.readline() == "there\n"
        left_by_the_fourth(federation, modules)
    finally:
        leaver.kill()
        leaver.communicate()


def test_who_falls_silent_amid_a_round_delays_it_a_little(federation: Federation) -> None:
    modules = [adapter(float(value), 100_000) for value in (1, 2, 3)]
    for module in modules:
        federation.add(module, ALL)
    silent = federation.add(adapter(4.0, 100_000), ALL)
    undo = leaving(asyncio.Event().wait)
    thread = threading.Thread(target=silent.average, args=(4,))
    try:
        thread.start()
        left_by_the_fourth(federation, modules)
    finally:
        thread.join(ALL.gather + ALL.exchange)
        undo()
    assert not thread.is_alive()


def test_numbers_that_are_none_reach_nobody(federation: Federation) -> None:
    """Neither from a member who sends them, nor from one who answers with them, nor our own."""
    modules = [adapter(1.0), adapter(2.0)]
    rounds = Rounds(size=3, gather=60.0, silence=1.0, exchange=10.0)
    liar = federation.add(adapter(0.0), rounds)
    for module in modules:
        federation.add(module, rounds)
    send = liar._averager.average

    async def lie(vector: torch.Tensor, samples: int) -> Any:
        return await send(torch.full_like(vector, float("nan")), samples)

    liar._averager.average = lie
    done = federation.average(5, 1, 1)
    for own, module, result in zip((1.0, 2.0), modules, done[1:], strict=True):
        assert result
        assert result.share < 1.0  # what the liar summed up was no number, either
        for value in set(numbers(module).tolist()):
            assert min(abs(value - known) for known in (own, 1.5)) < 1e-5
    with torch.no_grad():
        modules[0]["lora"].weight[0, 0] = float("inf")
    with pytest.raises(UsageError, match="not finite"):
        federation.averagers[1].average(1)


def test_a_leader_who_refuses_at_first_is_asked_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two ask each other at the same time, and neither can answer."""
    refused: list[str] = []
    join = averaging._Matching.rpc_join_group

    async def hesitate(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        if not refused:
            refused.append(str(context.remote_id))
            code = averaging.messages.NOT_LOOKING_FOR_GROUP
            yield averaging.messages.MessageFromLeader(code=code)
            return
        async for message in join(self, request, context):
            yield message

    monkeypatch.setattr(averaging._Matching, "rpc_join_group", hesitate)
    for value in (1.0, 3.0):
        federation.add(adapter(value), Rounds(size=2, gather=90.0, silence=5.0))
    first, second = federation.average(1, 1)
    assert refused
    assert first.share == second.share == 1.0
    assert max(first.seconds, second.seconds) < 30  # of the 90 for which they gather


@pytest.mark.parametrize("samples", [0, -3, 1 << 41])
def test_nobody_weighs_in_with_no_samples(federation: Federation, samples: int) -> None:
    federation.add(adapter())
    with pytest.raises(UsageError, match="samples"):
        federation.averagers[0].average(samples)


def test_a_round_moves_nobody_farther_than_they_allow(federation: Federation) -> None:
    modules = [adapter(0.0), adapter(1.0)]
    federation.add(modules[0], Rounds(size=2, gather=60.0), max_change=2.0)
    federation.add(modules[1], Rounds(size=2, gather=60.0))
    bounded, free = federation.average(1, 1_000_000)
    assert bounded.clipped
    assert not free.clipped
    assert float(numbers(modules[0]).norm()) == pytest.approx(2.0, rel=1e-4)
    assert bounded.change == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"listen": "nowhere"}, "listen"),
        ({"rounds": Rounds(size=1)}, "size"),
        ({"rounds": Rounds(gather=10_000.0)}, "gather"),
    ],
)
def test_settings_that_cannot_be_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        FederatedAverager(adapter(), run_id="test", **options)
    with pytest.raises(UsageError, match="requires_grad"):
        FederatedAverager(nn.Linear(2, 2).requires_grad_(False), run_id="test", listen=HERE)
