"""What a session owes its caller: exactness with slow, lying and shared servers, and clean ends."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm.errors import SessionClosed, UsageError
from swarm.fakes import Fate
from swarm.messages import (
    Opened,
    Output,
    Redirect,
    Step,
)
from swarm.wire import decode
from tests.client.twins import THIRDS, House, Twin
from tests.inprocess import STEADY


def hidden_of(house: House, tokens: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, house.whole.hidden_size)


# Shared servers ----------------------------------------------------------------------------------


def test_sessions_of_many_clients_share_passes_and_never_mix() -> None:
    with House(spans=THIRDS) as house:
        twins = [house.twin(batch=1 + index % 2, client=90 + index) for index in range(4)]
        together = threading.Barrier(len(twins))

        def use(twin: Twin, tokens: int) -> None:
            together.wait(30)
            with twin:
                twin.step(tokens)
                for _ in range(25):
                    twin.step()
                twin.step(tokens)

        # Locally each needs a span of its own: they are not thread-safe.
        for twin in twins:
            twin.span = house.local()
            twin.cache = twin.span.open_cache(twin.span.blocks, twin.batch, 128)
        with ThreadPoolExecutor(len(twins)) as threads:
            list(threads.map(use, twins, range(3, 3 + len(twins))))
        first, *others = [server.handler.counters for server in house.servers]
        assert sum(server.executor.backend.shared_passes for server in house.servers) > 0
        assert first.steps_from_clients == 4 * 27
        for counters in others:
            assert counters.steps_from_clients == 0, "an activation came by way of the client"
            assert counters.steps_from_servers == 4 * 27


def test_ending_one_session_does_not_disturb_another(house: House) -> None:
    with house.twin(client=91) as lasting:
        lasting.step(5)
        for _ in range(3):
            with house.twin(client=92) as passing:
                passing.step(4)
                lasting.step()
            with pytest.raises(SessionClosed):
                passing.session.step(hidden_of(house))
            lasting.step()
        assert lasting.session.recoveries == 0


# Late messages -----------------------------------------------------------------------------------


class Slow:
    """Outputs of one server reach the client late, but in order."""

    def __init__(self, peer_id: str, seconds: float) -> None:
        self.peer_id = peer_id
        self.seconds = seconds
        self.delayed = 0

    async def __call__(self, source: str, destination: str, method: str, frame: bytes) -> Fate:
        if (source, method) == (self.peer_id, "session") and isinstance(decode(frame), Output):
            self.delayed += 1
            await asyncio.sleep(self.seconds)
        return Fate.DELIVER


def test_nobody_waits_for_copies(house: House) -> None:
    with house.twin() as twin:
        twin.step(5)
        gate = asyncio.Event()
        slow = twin.serving(0)
        others = [twin.serving(hop) for hop in (1, 2)]
        before = [server.handler.counters.steps_from_clients for server in others]

        async def hold(source: str, destination: str, method: str, frame: bytes) -> Fate:
            if (source, method) == (slow.peer_id, "session"):
                await gate.wait()
            return Fate.DELIVER

        house.swarm.network.before_frame = hold
        for _ in range(6):
            twin.step()
        assert [server.handler.counters.steps_from_clients for server in others] == before
        house.swarm.on_loop(gate.set)
        house.swarm.no_trap()
        twin.kill(1)  # the replacement is fed with copies that came late
        twin.step()
        twin.step(3)


def test_copies_that_fall_too_far_behind_are_waited_for(house: House) -> None:
    """Else they would be forgotten, or memory would grow."""
    with house.twin() as twin:
        twin.step(5)
        house.swarm.network.before_frame = Slow(twin.serving(0).peer_id, 0.005)
        for _ in range(40):
            twin.step()
        house.swarm.no_trap()
        twin.kill(1)
        twin.step()
        assert twin.session.recoveries == 1


@pytest.mark.parametrize("hop", [0, 1])
def test_beams_and_rollbacks_do_not_overtake_copies(house: House, hop: int) -> None:
    with house.twin(batch=3) as twin:
        twin.step(6)
        slow = Slow(twin.serving(hop).peer_id, 0.01)
        house.swarm.network.before_frame = slow
        for rows in [(1, 1, 0), (2, 0, 1), (0, 0, 2)]:
            twin.reorder(*rows)
            twin.step()
        twin.step()
        twin.rollback(8)
        twin.reorder(2, 1, 0)
        twin.step()
        assert slow.delayed
        house.swarm.no_trap()
        twin.kill(hop + 1)  # fed from the border of the slow copies
        twin.step()


@pytest.mark.parametrize("hop", [0, 1])
def test_a_beam_that_dies_with_its_copies_on_the_way(house: House, hop: int) -> None:
    with house.twin(batch=3) as twin:
        twin.step(6)
        house.swarm.network.before_frame = Slow(twin.serving(hop).peer_id, 0.02)
        twin.step()
        twin.reorder(1, 2, 0)
        twin.kill(hop + 1)
        twin.step()
        house.swarm.no_trap()
        twin.reorder(0, 0, 1)
        twin.kill(hop)
        twin.step()


def test_a_copy_that_comes_too_late_is_computed_again_and_nobody_is_blamed(house: House) -> None:
    network = house.swarm.network
    with house.twin(batch=2) as twin:
        twin.step(5)
        route = [hop.peer_id for hop in twin.session.hops]
        network.before_frame = slow = Slow(route[0], 0.5)
        twin.step()
        slow.seconds = 0
        remote = twin.session._remote
        assert remote is not None
        house.swarm.on_loop(network.block, route[1], route[2])
        house.swarm.wait_until(lambda: remote._trouble is not None)
        twin.reorder(1, 0)
        twin.step()
        house.swarm.no_trap()
        house.swarm.on_loop(network.unblock, route[1], route[2])
        assert [hop.peer_id for hop in twin.session.hops] == route
        assert not house.swarm.router.failures
        twin.kill(1)
        twin.step()


def test_a_late_complaint_about_a_dead_server_does_not_end_pushing(house: House) -> None:
    """The hop before notices the death when the client has begun to tell it whom to push to now."""
    network = house.swarm.network
    with house.twin(timeouts=replace(STEADY, step=1.0, sync=1.0)) as twin:
        twin.step(5)
        before, dead = twin.serving(0), twin.serving(1)

        async def act() -> None:
            said = network.frames[before.peer_id, "client 99", "session"]
            network.cut(dead.endpoint)
            while network.frames[before.peer_id, "client 99", "session"] == said:  # noqa: ASYNC110
                await asyncio.sleep(0)

        trap = house.swarm.trap(lambda *frame: isinstance(frame[3], Redirect), act)
        house.swarm.on_loop(network.freeze, dead.endpoint)
        twin.step()
        house.swarm.on_loop(network.thaw, dead.endpoint)
        assert trap.sprung
        assert twin.session.recoveries == 1
        twin.kill(2)  # now all are told again whom to push to
        twin.step()
        relayed = twin.serving(1).handler.counters.steps_from_clients
        for _ in range(3):
            twin.step()
        assert twin.serving(1).handler.counters.steps_from_clients == relayed


@pytest.mark.parametrize(("busy", "dying"), [(0, 1), (1, 0), (2, 0), (1, 2)])
def test_a_server_that_computes_for_long_is_not_taken_for_dead(
    house: House, busy: int, dying: int
) -> None:
    """`sync` is answered while a pass runs, and what it computes counts: also a beam's reorder."""
    timeouts = replace(STEADY, sync=2.0)
    with house.twin(batch=3, timeouts=timeouts) as twin, ThreadPoolExecutor(1) as aside:
        twin.step(5)
        server, executor = twin.serving(busy), twin.serving(busy).executor
        begun, gate, submit = threading.Event(), asyncio.Event(), executor.submit

        async def held(work: Any) -> Any:
            begun.set()
            await gate.wait()
            return await submit(work)

        executor.submit = held  # type: ignore[method-assign]
        try:
            twin.reorder(1, 2, 0)
            stepping = aside.submit(twin.step)
            assert begun.wait(20)
            dead = twin.kill(dying)
            spare = next(
                server
                for server in house.servers
                if server.record.record.blocks == dead.record.record.blocks and server is not dead
            )
            house.swarm.wait_until(lambda: spare.handler.sessions > 0)
            house.swarm.on_loop(gate.set)
            stepping.result(20)
        finally:
            del executor.submit  # type: ignore[attr-defined]
        assert twin.session.recoveries == 1
        assert twin.serving(busy) is server
        twin.step()


# The caller --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "inputs", "words"),
    [
        (torch.zeros(2, 1, 48), {}, r"not \[1, T, 48\]"),
        (torch.zeros(1, 1, 47), {}, r"not \[1, T, 48\]"),
        (torch.zeros(1, 1, 48), {"padding": torch.ones(1, 2, dtype=torch.bool)}, "padding"),
        (torch.zeros(1, 1, 48), {"padding": torch.ones(1, 1)}, "padding"),
        (torch.zeros(1, 1, 48), {"what": torch.ones(1, 1)}, "what"),
        (torch.zeros(1, 1 << 20, 48), {}, "positions"),
    ],
)
def test_what_servers_would_refuse_is_refused_at_home(
    house: House, hidden: torch.Tensor, inputs: dict[str, torch.Tensor], words: str
) -> None:
    with house.twin() as twin:
        twin.step(5)
        remote = twin.session._remote
        assert remote is not None
        with pytest.raises(UsageError, match=words):
            house.swarm.loop.call(remote.step(hidden, inputs))
        with pytest.raises(ValueError, match="reorder"):
            twin.session.reorder([1])
        assert not house.swarm.router.failures
        twin.step()
        assert twin.session.recoveries == 0


def test_histories_have_a_budget(house: House) -> None:
    with house.twin() as twin:
        connection = twin.session._connection
        config = replace(connection.config, history_bytes=3 * 64 * 48 * 4)
        twin.session._connection = replace(connection, config=config)
        twin.step(60)
        twin.step(60)
        with pytest.raises(UsageError, match="history_bytes"):
            twin.session.step(hidden_of(house))


def test_a_step_that_is_cancelled_never_was(house: House) -> None:
    with house.twin(batch=2) as twin:
        twin.step(5)
        remote = twin.session._remote
        assert remote is not None
        for reorders in (False, True):
            asked = threading.Event()

            async def act(asked: threading.Event = asked) -> None:
                asked.set()

            house.swarm.trap(lambda *frame: isinstance(frame[3], Output), act)
            if reorders:
                twin.reorder(1, 0)

            async def cancelled() -> None:
                step = asyncio.create_task(remote.step(hidden_of(house, 3, rows=2)))
                while not asked.is_set():  # noqa: ASYNC110, B023
                    await asyncio.sleep(0)
                step.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await step

            house.swarm.loop.call(cancelled())
            house.swarm.no_trap()
            assert twin.session.position == 5
            twin.step(2)
            twin.rollback(5)


@pytest.mark.parametrize("moment", ["opening", "computing", "searching"])
def test_closing_ends_a_step_that_is_under_way(house: House, moment: str) -> None:
    with house.twin() as twin:
        if moment != "opening":
            twin.step(5)
        remote = twin.session._remote
        waiting = asyncio.Event()

        async def hold(source: str, destination: str, method: str, frame: bytes) -> Fate:
            message = decode(frame)
            if isinstance(message, Opened if moment == "opening" else Step):
                waiting.set()
                await asyncio.Event().wait()
            return Fate.DELIVER

        if moment == "searching":
            for server in house.servers[1::3]:
                house.swarm.cut(server)
        else:
            house.swarm.network.before_frame = hold
        if remote is None:
            remote = twin.session._connection.open(twin.session.blocks, 1, 8)

        async def close_it() -> None:
            refreshed = house.swarm.router.refreshed
            step = asyncio.create_task(remote.step(hidden_of(house)))
            while not (waiting.is_set() or house.swarm.router.refreshed > refreshed):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await remote.close()
            with pytest.raises(SessionClosed):
                await step
            with pytest.raises(SessionClosed):
                await remote.step(hidden_of(house))

        house.swarm.loop.call(close_it(), timeout=15)
        house.swarm.no_trap()


def test_redirects_are_known_before_the_next_step(house: House) -> None:
    """However slow the way to the hop in front of a gap is, it pushes to the right server."""
    with house.twin() as twin:
        twin.step(5)
        before = twin.serving(1)

        async def hook(source: str, destination: str, method: str, frame: bytes) -> Fate:
            message = decode(frame)
            if destination == before.peer_id and isinstance(message, Redirect):
                await asyncio.sleep(0.5)
            if (source, method) == (before.peer_id, "push") and twin.session.recoveries == 0:
                house.swarm.network.cut(twin.serving(2).endpoint)  # nobody need feed `before`
            return Fate.DELIVER

        house.swarm.network.before_frame = hook
        twin.step()
        refilled = twin.serving(2).handler.counters.steps_from_clients
        twin.step()
        assert twin.serving(2).handler.counters.steps_from_clients == refilled
        assert twin.session.recoveries == 1
