"""Which CUDA kernels each layer launched, and how long they ran on the device.

    with ts.hooks.kernel_trace() as trace:
        model(x)
    print(trace.table())
    trace.save("trace.json")        # ui.perfetto.dev opens it

While a trace runs, every module that is called is a layer, named by its path in the outermost module that was called.
In heads, tails and ``torchsurgeon.profile()``, layers (functions included) have the names they have in the graph. Code
that runs a model by other means names its layers with ``layer_range()``, or, in a loop that must stay fast, with what
``active()`` returns. Inside a range that was named in one of these ways, modules are no layers of their own. Kernels
are attributed to layers by CUPTI's external correlation ids, not by comparing times.
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
