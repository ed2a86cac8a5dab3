"""Which CUDA kernels each layer launched, and how long they ran on the device.

::

    with ts.hooks.kernel_trace() as trace:
        model(x)
    print(trace.table())
    trace.save("trace.json")        # ui.perfetto.dev opens it

Modules called while a trace runs are layers by themselves, named by their path in the outermost module that was called.
Heads, tails and :func:`torchsurgeon.profile` name theirs as the graph does, functions included. Code that runs a model
by other means names its layers with :func:`layer_range`, or, in a loop that must stay cheap, with what :func:`active`
returns. Names given so outrank those found inside them. Kernels are attributed by CUPTI's external correlation ids, not
by their times.
"""

from __future__ import annotations

from torchsurgeon.hooks.attribution import Kernel, KernelTrace, LayerSpan
from torchsurgeon.hooks.recorder import LayerRanges, Source, SpanRecorder, active, kernel_trace, layer_range

__all__ = [
    "Kernel",
    "KernelTrace",
    "LayerRanges",
    "LayerSpan",
    "Source",
    "SpanRecorder",
    "active",
    "kernel_trace",
    "layer_range",
]
