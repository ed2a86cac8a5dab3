"""An OpenTelemetry span for every request, below the device's span that the request names in ``traceparent``.

The span is named ``torchsurgeon.request``, is of kind server, and begins and ends when the request did. It has the HTTP
attributes of OpenTelemetry's semantic conventions, and torchsurgeon's own. A status from 500 on is an error.
"""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from torchsurgeon.serve.outcome import Outcome

_propagator = TraceContextTextMapPropagator()


class Spans:
    """Makes the span of each request; a listener of ``TailApp``.

    Spans go to the tracer provider that the program has set up; where it has set up none, nowhere.
    """

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("torchsurgeon")

    def __call__(self, outcome: Outcome) -> None:
        """Make the span of a request that has just ended."""
        end_ns = time.time_ns()
        context = _propagator.extract({"traceparent": outcome.traceparent})
        start_ns = end_ns - round(outcome.duration_s * 1e9)
        span = self._tracer.start_span(
            "torchsurgeon.request", context=context, kind=trace.SpanKind.SERVER, start_time=start_ns
        )
        if span.is_recording():
            method, _, path = outcome.asked.partition(" ")
            known = {
                "http.request.method": method,
                "url.path": path,
                "client.address": outcome.client,
                "error.type": outcome.error,
                "torchsurgeon.request_id": outcome.request_id,
                "torchsurgeon.model": outcome.model,
                "torchsurgeon.cut": outcome.cut,
            }
            span.set_attributes({name: value for name, value in known.items() if value})
            span.set_attribute("http.response.status_code", outcome.status)
            span.set_attribute("torchsurgeon.received_bytes", outcome.received_bytes)
            span.set_attribute("torchsurgeon.sent_bytes", outcome.sent_bytes)
            if outcome.status >= 500:
                span.set_status(trace.StatusCode.ERROR, outcome.error)
        span.end(end_ns)


def traced() -> bool:
    """Return whether the program has set up where spans go."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
