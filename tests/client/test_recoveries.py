"""A client can tell why its texts stood still, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from swarm.client.recoveries import Cause, Recoveries, Total, cause_of
from swarm.config import ClientTimeouts
from swarm.errors import (
    ErrorCode,
    PeerSilent,
    PeerUnavailable,
    RemoteProtocolError,
    SessionClosed,
    SwarmError,
)
from swarm.metrics import render
from swarm.types import BlockRange
from tests.client.twins import House

HALF = BlockRange(0, 2)


@dataclass(eq=False)
class Hop:
    failure: SwarmError | None
    blocks: BlockRange = HALF
    peer_id: str = "QmPeer"


@pytest.mark.parametrize(
    ("failure", "cause", "code"),
    [
        (PeerUnavailable("gone"), Cause.BROKE, None),
        (PeerSilent("frozen"), Cause.DEADLINE, None),
        (RemoteProtocolError(ErrorCode.BUSY, "full"), Cause.REFUSED, ErrorCode.BUSY),
        (RemoteProtocolError(ErrorCode.DRAINING, "bye"), Cause.DRAINING, ErrorCode.DRAINING),
        (SessionClosed("outgrown"), Cause.OURS, None),
        (None, Cause.BROKE, None),
    ],
)
def test_a_failure_has_a_cause(
    failure: SwarmError | None, cause: Cause, code: ErrorCode | None
) -> None:
    assert cause_of(failure) == (cause, code)


def test_time_runs_from_the_first_notice_to_the_answer() -> None:
    log, dead, busy = (
        Recoveries(),
        Hop(PeerSilent("x")),
        Hop(RemoteProtocolError(ErrorCode.BUSY, "")),
    )
    log.noticed(10.0, silence=0.5)
    log.lost([dead])
    log.lost([dead])  # no route at first: asked again
    log.noticed(11.0)
    log.lost([busy])
    recovery = log.done(12.0, position=7)
    assert recovery is not None
    assert [loss.cause for loss in recovery.losses] == [Cause.DEADLINE, Cause.REFUSED]
    assert (recovery.cause, recovery.position) == (Cause.DEADLINE, 7)
    assert (recovery.silence, recovery.seconds) == (0.5, 2.0)
    assert list(log) == [recovery]


def test_a_false_alarm_is_no_recovery_and_is_forgotten() -> None:
    log = Recoveries()
    log.noticed(1.0)
    assert log.done(2.0, 0) is None
    log.noticed(5.0)
    log.lost([Hop(PeerUnavailable("x"))])
    recovery = log.done(6.0, 3)
    assert recovery is not None
    assert recovery.seconds == 1.0


def test_no_session_grows_without_bound() -> None:
    log = Recoveries()
    for step in range(1000):
        log.noticed(step)
        log.lost([Hop(PeerUnavailable("x"))])
        log.done(step + 0.5, step)
    kept = list(log)
    assert len(kept) == 256
    assert kept[-1].position == 999


def test_sums_are_shown_by_cause() -> None:
    total, log = Total(), Recoveries()
    log.noticed(0.0, silence=1.0)
    log.lost([Hop(RemoteProtocolError(ErrorCode.BUSY, "full"))])
    recovery = log.done(0.25, 0)
    assert recovery is not None
    total.add(recovery)
    page = render(total.families()).decode()
    assert 'swarm_client_recovery_seconds_sum{cause="refused"} 1.25' in page
    assert 'swarm_client_losses_total{cause="refused",code="busy"} 1.0' in page


def test_a_session_tells_who_was_lost_and_how_long_that_took() -> None:
    with House() as house, house.twin() as twin:
        twin.step(5)
        assert twin.session.log == []
        dead = twin.serving(1)
        twin.kill(1)
        twin.step()
        [recovery] = twin.session.log
        assert (recovery.cause, recovery.position) == (Cause.BROKE, 5)
        assert [loss.peer_id for loss in recovery.losses] == [dead.peer_id]
        assert [loss.blocks for loss in recovery.losses] == [BlockRange(2, 4)]
        assert recovery.seconds > 0
        assert recovery.silence == 0
        twin.step()
        assert len(twin.session.log) == twin.session.recoveries == 1


def test_a_frozen_server_missed_a_deadline() -> None:
    """Learnt from recent steps, then asked, then given up: the silence is told apart."""
    timeouts = ClientTimeouts(connect=5.0, sync=0.2, step=0.3, least=0.2, recovery=20.0)
    with House() as house, house.twin(timeouts=timeouts) as twin:
        twin.step(5)
        frozen = twin.serving(1)
        house.swarm.on_loop(house.swarm.network.freeze, frozen.endpoint)
        twin.step()
        [recovery] = twin.session.log
        assert recovery.cause is Cause.DEADLINE
        assert recovery.silence >= 0.2
        house.swarm.on_loop(house.swarm.network.thaw, frozen.endpoint)
