"""What a server shows of its work is what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarm.errors import NoRoute
from swarm.metrics import render
from swarm.server.exposition import families
from tests.client.twins import House
from tests.inprocess import STEADY, Server

Numbers = Mapping[tuple[str, ...], float]


def numbers(server: Server) -> Numbers:
    """By name and values of labels."""
    traffic = {"others": (1, 2), "us": (3, 4)}
    found = families(server.executor.meters, server.handler, server.record.record, traffic)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(render(found).decode())
        for sample in family.samples
    }


def test_steps_passes_and_sessions_are_counted() -> None:
    with House() as house:
        with house.twin() as twin:
            twin.step(9)
            for _ in range(4):
                twin.step()
            first, second = numbers(twin.serving(0)), numbers(twin.serving(1))
            assert first["swarm_sessions_open",] == 1
            assert first["swarm_kv_pages", "used"] >= 1
            assert first["swarm_kv_bytes", "used"] > 0
        for kind, count in (("prefill", 1), ("decode", 4)):
            for phase in ("queue", "compute", "send"):
                assert first["swarm_step_seconds_count", kind, phase] == count
        assert first["swarm_step_seconds_sum", "decode", "compute"] > 0
        assert first["swarm_passes_total",] == first["swarm_pass_steps_count",] == 5
        assert first["swarm_device_tokens_total",] == first["swarm_pass_tokens_sum",] == 13
        assert first["swarm_device_busy_seconds_total",] > 0
        assert first["swarm_pushes_total",] == 5
        for number, sender, other in ((first, "client", "server"), (second, "server", "client")):
            assert number["swarm_steps_total", sender] == 5
            assert number["swarm_steps_total", other] == 0
        assert first["swarm_received_bytes_total", "others"] == 1
        assert first["swarm_sent_bytes_total", "us"] == 4


def test_a_replay_and_a_hand_over_are_recoveries() -> None:
    with House() as house, house.twin() as twin:
        twin.step(9)
        twin.kill(1)
        twin.step()
        assert numbers(twin.serving(1))["swarm_recoveries_total", "replayed"] == 1
        assert numbers(twin.serving(0))["swarm_recoveries_total", "replayed"] == 0
        leaving = twin.serving(2)
        house.swarm.loop.call(leaving.handler.leave())
        house.swarm.wait_until(lambda: twin.session.moves == 1)
        assert numbers(leaving)["swarm_recoveries_total", "handed_over"] == 1
        assert numbers(twin.serving(2))["swarm_recoveries_total", "inherited"] == 1
        twin.step()


def test_refusals_are_told_by_code() -> None:
    with House(spans=[(0, 6)]) as house:
        [server] = house.servers
        server.handler.draining = True
        hasty = replace(STEADY, recovery=0.05)
        with house.twin(timeouts=hasty) as twin, pytest.raises(NoRoute):
            twin.step(3)
        assert numbers(server)["swarm_refusals_total", "draining"] >= 1


def test_what_a_span_did_counts_after_it_was_given_up() -> None:
    with House() as house, house.twin() as twin:
        twin.step(5)
        server = twin.serving(0)
        meters, counts = server.executor.meters, server.handler.counts()
        meters.past.update(counts)
        meters.moves += 1
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(
                render(families(meters, None, server.record.record, {})).decode()
            )
            for sample in family.samples
        }
        assert found["swarm_sessions_total",] == 1
        assert found["swarm_moves_total",] == 1
        assert ("swarm_sessions_open",) not in found, "nobody is served while it moves"
