"""A load test of a tail server: many emulated devices that ask for inferences at times fixed beforehand.

``Arrivals`` says when requests are due, ``cut_requests()`` and ``whole_requests()`` make them, and ``drive()`` sends
them over one connection for each device and returns a ``LoadRun``. Latency counts from the moment at which a request
was due, whether or not it could be sent then. A server that stalls therefore delays every request that falls into the
stall, as it would delay real devices, and none of them is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

__all__ = [
    "Arrivals",
    "KindResult",
    "LoadReport",
    "LoadRequest",
    "LoadRun",
    "Target",
    "cut_requests",
    "drive",
    "try_each",
    "whole_requests",
]

# Whoever only draws a result needs none of the packages by which a server is asked.
if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "arrivals": ("Arrivals",),
            "driving": ("drive", "try_each"),
            "messages": ("LoadRequest", "cut_requests", "whole_requests"),
            "result": ("KindResult", "LoadReport", "LoadRun"),
            "target": ("Target",),
        },
    )
else:
    from torchsurgeon.loadtest.arrivals import Arrivals as Arrivals
    from torchsurgeon.loadtest.driving import drive as drive
    from torchsurgeon.loadtest.driving import try_each as try_each
    from torchsurgeon.loadtest.messages import LoadRequest as LoadRequest
    from torchsurgeon.loadtest.messages import cut_requests as cut_requests
    from torchsurgeon.loadtest.messages import whole_requests as whole_requests
    from torchsurgeon.loadtest.result import KindResult as KindResult
    from torchsurgeon.loadtest.result import LoadReport as LoadReport
    from torchsurgeon.loadtest.result import LoadRun as LoadRun
    from torchsurgeon.loadtest.target import Target as Target
