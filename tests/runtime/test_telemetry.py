"""Spans of inferences, as OpenTelemetry's own exporter receives them."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from classifier import EXAMPLE, serve, split_of
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from waiting import wait_for

import torchsurgeon as ts
from torchsurgeon.serve import Server
from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.spans import Spans
from torchsurgeon.transport.trace_context import traceparent

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """The provider of the process can be set once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def server() -> Iterator[Server]:
    """One that a test may stop."""
    with serve() as running:
        yield running


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    spans = [span for span in exporter.get_finished_spans() if span.name == "torchsurgeon.inference"]
    assert len(spans) == 1
    return spans[0]


def test_an_inference_is_a_span_below_the_callers_with_where_the_time_went(
    exporter: InMemorySpanExporter, server: Server
) -> None:
    with split_of(server, partition=2) as split:
        split(EXAMPLE)
        exporter.clear()
        before_ns = time.time_ns()
        with trace.get_tracer("caller").start_as_current_span("caller") as caller:
            split(EXAMPLE)
        span = only(exporter)
        last = split.last
    assert last is not None
    assert span.attributes is not None
    assert span.parent is not None
    assert span.parent.span_id == caller.get_span_context().span_id
    assert span.kind is trace.SpanKind.CLIENT
    assert span.attributes["torchsurgeon.model"] == "net"
    assert span.attributes["torchsurgeon.partition_index"] == 2
    assert span.attributes["torchsurgeon.server"] == server.url
    assert span.attributes["torchsurgeon.sent_bytes"] == last.sent_bytes > 0
    assert span.attributes["torchsurgeon.tail_s"] == last.tail_s
    assert "torchsurgeon.degraded" not in span.attributes
    assert span.start_time is not None
    assert span.end_time is not None
    # The wall clock may have been set between.
    assert before_ns - 1e6 < span.start_time < span.end_time < time.time_ns()
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(last.total_s, abs=1e-6)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("fallback", ["local", "error"])
def test_the_servers_span_is_joined_to_the_callers(
    exporter: InMemorySpanExporter, direct: bool, fallback: Literal["local", "error"]
) -> None:
    """With a fallback a thread of its own asks the server, and without one the caller's."""
    with serve() as kept, Server(kept.app, direct=direct) as server:
        server.app.listeners.append(Spans())
        exporter.clear()
        with split_of(server, partition=2, fallback=fallback) as split:
            split(EXAMPLE)
            # The server makes its span when it has answered, which may be after the answer is here.
            wait_for(lambda: asked_for(exporter, "/v2/models/net/infer"))
            exporter.clear()
            with trace.get_tracer("caller").start_as_current_span("caller") as caller:
                split(EXAMPLE)
            wait_for(lambda: asked_for(exporter, "/v2/models/net/infer"))
        (span,), inference = asked_for(exporter, "/v2/models/net/infer"), only(exporter)
        context = caller.get_span_context()
        for one in (span, inference):
            assert one.parent is not None
            assert (one.parent.trace_id, one.parent.span_id) == (context.trace_id, context.span_id)
        assert span.attributes is not None
        assert span.kind is trace.SpanKind.SERVER
        assert span.attributes["torchsurgeon.model"] == "net"
        assert span.attributes["http.request.method"] == "POST"
        assert span.attributes["http.response.status_code"] == 200
        assert span.start_time is not None
        assert span.end_time is not None
        assert inference.start_time is not None
        assert inference.start_time < span.start_time < span.end_time
        # Without a span, nothing is sent, and the server's span begins a trace.
        exporter.clear()
        status = urllib.request.urlopen(f"{server.url}/v2/health/live").status
        wait_for(lambda: asked_for(exporter, "/v2/health/live"))
        (alone,) = asked_for(exporter, "/v2/health/live")
        assert (status, alone.parent) == (200, None)


def test_spans_that_are_not_sampled_are_not_told_to_the_server() -> None:
    context = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(0))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert traceparent() is None
    context = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert traceparent() == f"00-{1:032x}-{2:016x}-01"
    assert traceparent() is None


@pytest.mark.parametrize("value", ["", "nonsense", f"00-{0:032x}-{0:016x}-01", "00-" + "x" * 60_000])
def test_a_traceparent_that_names_no_span_begins_a_trace(exporter: InMemorySpanExporter, value: str) -> None:
    exporter.clear()
    Spans()(Outcome("c", "1", "GET /", "", "", 503, 0.1, 0, 0, "BusyError", value))
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert span.status.status_code is trace.StatusCode.ERROR


def asked_for(exporter: InMemorySpanExporter, path: str) -> list[ReadableSpan]:
    """The server's spans of requests for a path; a device may ask for others in the background."""
    spans = [span for span in exporter.get_finished_spans() if span.name == "torchsurgeon.request"]
    return [span for span in spans if span.attributes is not None and span.attributes["url.path"] == path]


def test_an_answer_of_the_device_says_why_the_server_gave_none(exporter: InMemorySpanExporter, server: Server) -> None:
    with split_of(server, partition=2) as split:
        split(EXAMPLE)
        server.stop()
        exporter.clear()
        split(EXAMPLE)
        span = only(exporter)
    assert span.kind is trace.SpanKind.INTERNAL
    assert span.attributes is not None
    assert str(span.attributes["torchsurgeon.degraded"]).startswith("unavailable")
    assert "torchsurgeon.server" not in span.attributes


@pytest.mark.parametrize(
    "ask",
    [
        lambda split: split(EXAMPLE),
        lambda split: split.submit(EXAMPLE).result(),
        lambda split: list(split.map([EXAMPLE])),
    ],
)
def test_an_error_that_the_caller_gets_is_the_spans(
    exporter: InMemorySpanExporter, server: Server, ask: Callable[[ts.SplitModule], object]
) -> None:
    with split_of(server, partition=2, fallback="error", timeout_s=20) as split:
        split(EXAMPLE)
        server.stop()
        exporter.clear()
        with pytest.raises(ts.ServerUnavailableError):
            ask(split)
        span = only(exporter)
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "ServerUnavailableError" in str(span.status.description)
    assert [event.name for event in span.events] == ["exception"]


def test_nothing_needs_opentelemetry() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import torch, torchsurgeon as ts\n"
        "split = ts.SplitModule(torch.nn.ReLU().eval(), torch.ones(2), partition='device')\n"
        "print(split(torch.ones(2)).tolist())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "[1.0, 1.0]", ended.stderr
