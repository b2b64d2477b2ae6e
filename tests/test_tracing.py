"""One request's trace holds all hops, if somebody asked for it; else nothing travels."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from swarm import tracing
from swarm.messages import Message, Step
from tests.client.twins import House


@pytest.fixture
def told() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start_with(exporter, at_once=True)
    yield exporter
    tracing.stop()


def by_parent(spans: tuple[ReadableSpan, ...]) -> dict[int | None, list[ReadableSpan]]:
    children: dict[int | None, list[ReadableSpan]] = defaultdict(list)
    for span in spans:
        children[span.parent.span_id if span.parent else None].append(span)
    return children


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def test_one_trace_holds_all_hops_with_their_phases(told: InMemorySpanExporter) -> None:
    with House() as house:
        with house.twin() as twin:
            twin.step(9)
            twin.step()
            peers = [str(hop.peer_id) for hop in twin.session.hops]
        house.swarm.wait_until(lambda: len(told.get_finished_spans()) == 1 + 2 + 2 * 3 * 4)
    spans = told.get_finished_spans()
    assert len({span.context.trace_id for span in spans if span.context}) == 1
    children = by_parent(spans)
    [root] = children[None]
    assert root.name == "swarm.session"
    steps = sorted(children[id_of(root)], key=lambda span: span.start_time or 0)
    assert [dict(step.attributes or {})["swarm.tokens"] for step in steps] == [9, 1]
    for step, kind in zip(steps, ("prefill", "decode"), strict=True):
        hops = sorted(children[id_of(step)], key=lambda hop: hop.start_time or 0)
        assert [hop.name for hop in hops] == ["swarm.hop"] * 3
        assert [dict(hop.attributes or {})["swarm.peer_id"] for hop in hops] == peers
        assert all(dict(hop.attributes or {})["swarm.kind"] == kind for hop in hops)
        for hop in hops:
            phases = children[id_of(hop)]
            assert [p.name for p in phases] == ["swarm.queue", "swarm.compute", "swarm.send"]
            assert all(p.start_time and p.end_time and p.start_time <= p.end_time for p in phases)


def test_a_step_that_fails_over_stays_in_its_trace(told: InMemorySpanExporter) -> None:
    with House() as house, house.twin() as twin:
        twin.step(5)
        twin.kill(1)
        told.clear()
        twin.step()
        house.swarm.wait_until(
            lambda: sum(span.name == "swarm.hop" for span in told.get_finished_spans()) >= 3
        )
        spans = told.get_finished_spans()
        assert len({span.context.trace_id for span in spans if span.context}) == 1


def test_nothing_travels_and_nothing_is_kept_when_nobody_asked() -> None:
    seen: list[str] = []

    def look(source: str, destination: str, method: str, message: Message) -> bool:
        if isinstance(message, Step):
            seen.append(message.trace)
        return False

    async def never() -> None:
        raise AssertionError

    with House() as house:
        house.swarm.trap(look, never)
        with house.twin() as twin:
            twin.step(3)
    assert seen == ["", "", ""]


def test_a_stranger_s_id_of_zeros_makes_no_span(told: InMemorySpanExporter) -> None:
    tracing.record_hop(f"00-{'0' * 32}-{'0' * 16}-01", [("queue", 0.1)], {})
    assert told.get_finished_spans() == ()
    tracing.record_hop(f"00-{'a' * 32}-{'b' * 16}-01", [("queue", 0.1)], {})
    assert [span.name for span in told.get_finished_spans()] == ["swarm.queue", "swarm.hop"]


def test_without_the_packages_the_sentence_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from swarm.cli import dht_main, server_main\n"
        "sys.exit(server_main(['--blocks', '0:2']))\n"
    )
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'swarm-blocks[tracing]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
