"""The only door to OpenTelemetry: one request's trace over all hops, if somebody asked for it.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set. Then a client gives every step the id of its span
(W3C Trace Context's `traceparent`), servers that trace as well add theirs, and each sends its own
to where its own environment says: nothing but that id passes between them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swarm.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_SCOPE = "swarm"

_tracer: Tracer | None = None

Attributes = Mapping[str, str | int]


def start(service: str) -> None:
    """Trace from now on, if the environment says where to. `service` is this process's name there,
    unless OTEL_SERVICE_NAME gives another. Raises UsageError if what it needs is not installed."""
    if not os.environ.get(ENDPOINT) or _tracer is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UsageError(
            f"{ENDPOINT} is set, but tracing is not installed: "
            "`pip install 'swarm-blocks[tracing]'`, or unset it"
        ) from error
    start_with(OTLPSpanExporter(), service)


def start_with(exporter: SpanExporter, service: str = "swarm", *, at_once: bool = False) -> None:
    """Trace to `exporter`, in batches from a thread of its own unless `at_once`."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    global _tracer
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": service}
    provider = TracerProvider(resource=Resource.create(named))
    processor = SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter)
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer(_SCOPE)


def stop() -> None:
    """Trace no more."""
    global _tracer
    _tracer = None


class Trails:
    """The spans of a client's session: one for all of it, below the caller's own if that traces,
    and one for each step. None, if nothing is traced when the session is made."""

    def __init__(self, model: str, blocks: str) -> None:
        self._tracer = _tracer
        about = {"swarm.model": model, "swarm.blocks": blocks}
        self._root = _tracer.start_span("swarm.session", attributes=about) if _tracer else None

    @contextmanager
    def step(self, start: int, tokens: int) -> Generator[str]:
        """Around a step of so many tokens: what it is to carry, for those who go on with the trace
        elsewhere; "" if it is not traced, or not sampled."""
        if self._tracer is None or self._root is None:
            yield ""
            return
        from opentelemetry.trace import set_span_in_context

        about = {"swarm.start": start, "swarm.tokens": tokens}
        above = set_span_in_context(self._root)
        with self._tracer.start_as_current_span("swarm.step", above, attributes=about) as span:
            context = span.get_span_context()
            sampled = context.trace_flags.sampled
            name = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
            yield name if sampled else ""

    def end(self) -> None:
        if self._root is not None:
            self._root.end()


def record_hop(parent: str, phases: Iterable[tuple[str, float]], attributes: Attributes) -> None:
    """One hop's part of a step that ended now, with the seconds of its phases; `parent` came with
    the step. Nothing if nothing is traced."""
    if _tracer is None:
        return
    from opentelemetry.trace import get_current_span, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    told = list(phases)
    end = time.time_ns()
    at = end - sum(int(seconds * 1e9) for _, seconds in told)
    context = TraceContextTextMapPropagator().extract({"traceparent": parent})
    if not get_current_span(context).get_span_context().is_valid:
        return  # an id of zeros
    hop = _tracer.start_span("swarm.hop", context, attributes=attributes, start_time=at)
    inside = set_span_in_context(hop, context)
    for phase, seconds in told:
        span = _tracer.start_span(f"swarm.{phase}", inside, start_time=at)
        at += int(seconds * 1e9)
        span.end(at)
    hop.end(end)
