"""The span below which a server puts its own, as W3C's header ``traceparent`` names it."""

from __future__ import annotations

TRACEPARENT = "traceparent"

try:
    from opentelemetry import trace
except ImportError:

    def traceparent() -> str | None:
        """Return None: without OpenTelemetry there is no span."""
        return None

else:

    def traceparent() -> str | None:
        """Return the header's value for the span that is current in this thread; None where none is sampled."""
        context = trace.get_current_span().get_span_context()
        if not context.is_valid or not context.trace_flags.sampled:
            return None
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
