"""An OpenTelemetry span for every inference, if its API is installed and the program has set up a tracer provider.

The span is named ``torchsurgeon.inference``, begins and ends when the inference did, and is a child of the span that is
current in the thread that ends it. It is of kind client when a server's answer was used, else internal. Its attributes
start with ``torchsurgeon.``: the model's name, the fields of ``Inference`` (times in seconds, sizes in bytes), the
partition's name and index, the reason and cost of the decision. An error that reaches the caller ends the span with
that error as its status (OpenTelemetry's specification of recording exceptions).

The span does not exist yet when a server is asked. So the server's own span, which ``traceparent`` joins to the trace,
stands beside it: both are children of the caller's.
"""

from __future__ import annotations

import contextvars
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torchsurgeon.runtime.inference import Inference

T = TypeVar("T")

if TYPE_CHECKING:
    from opentelemetry.trace import Span

try:
    from opentelemetry import trace
except ImportError:
    _tracer = None
else:
    _tracer = trace.get_tracer("torchsurgeon")

_NAME = "torchsurgeon.inference"
_MEASURED = (
    "total_s",
    "decide_s",
    "head_s",
    "encode_s",
    "uplink_s",
    "queue_s",
    "tail_s",
    "downlink_s",
    "decode_s",
    "wait_s",
    "local_s",
    "sent_bytes",
    "received_bytes",
)


def below_current(ask: Callable[[], T]) -> Callable[[], T]:
    """Return what asks a server in any thread, and tells it of the span that is current in this one."""
    if _tracer is None or not trace.get_current_span().get_span_context().is_valid:
        return ask
    return functools.partial(contextvars.copy_context().run, ask)


def record(model: str, total_s: float, inference: Callable[[], Inference], *, by_server: bool) -> None:
    """Make the span of an inference that has just ended, if the program has set up a tracer provider.

    Args:
        model: the model's name.
        total_s: how long it took.
        inference: returns its account, which is asked for where the span goes anywhere.
        by_server: whether the answer is a server's.
    """
    if _tracer is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return
    end_ns = time.time_ns()
    kind = trace.SpanKind.CLIENT if by_server else trace.SpanKind.INTERNAL
    span = _tracer.start_span(_NAME, kind=kind, start_time=end_ns - round(total_s * 1e9))
    if span.is_recording():
        _describe(span, model, inference())
    span.end(end_ns)


def record_error(model: str, seconds: float, error: BaseException) -> None:
    """Make the span of an inference that has just raised an error; without OpenTelemetry, do nothing.

    Args:
        model: the model's name.
        seconds: how long ago the call began.
        error: what it raised.
    """
    if _tracer is None:
        return
    end_ns = time.time_ns()
    span = _tracer.start_span(_NAME, start_time=end_ns - round(seconds * 1e9))
    if span.is_recording():
        span.set_attribute("torchsurgeon.model", model)
        span.record_exception(error, timestamp=end_ns)
        span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
    span.end(end_ns)


def _describe(span: Span, model: str, inference: Inference) -> None:
    attributes: dict[str, str | float | tuple[str, ...]] = {
        f"torchsurgeon.{name}": getattr(inference, name) for name in _MEASURED
    }
    attributes["torchsurgeon.model"] = model
    attributes["torchsurgeon.partition"] = inference.partition.name
    attributes["torchsurgeon.partition_index"] = inference.partition.index
    attributes["torchsurgeon.bits"] = inference.bits
    if inference.server is not None:
        attributes["torchsurgeon.server"] = inference.server
    if inference.inexact_because:
        attributes["torchsurgeon.inexact_because"] = inference.inexact_because
    if inference.degraded is not None:
        attributes["torchsurgeon.degraded"] = inference.degraded
    if inference.decision is not None:
        attributes["torchsurgeon.decision"] = inference.decision.reason
        attributes["torchsurgeon.predicted_cost"] = inference.decision.cost
    span.set_attributes(attributes)
