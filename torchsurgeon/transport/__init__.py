"""Transports: they carry named tensors to a tail server, and its answer back.

``HttpTransport`` has two separate paths. The control plane (handshake, metadata, profiles) goes through ``requests``,
with its proxies and certificates. Inference goes through kept-alive sockets of its own, one for each call at the same
time: tensors are written from their own memory with ``sendmsg``, and the answer is read straight into the buffer that
the returned tensors are views of. One deadline bounds each call as a whole, so a server that sends its answer byte by
byte cannot extend it.

``InProcessTransport`` calls an ASGI application directly, in the same process and without sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

__all__ = ["Answer", "HttpTransport", "InProcessTransport", "RawAnswer", "Timing", "Transport"]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "base": ("RawAnswer", "Timing"),
            "tensors": ("Answer", "Transport"),
            "in_process": ("InProcessTransport",),
            "over_http": ("HttpTransport",),
        },
    )
else:
    from torchsurgeon.transport.base import RawAnswer as RawAnswer
    from torchsurgeon.transport.base import Timing as Timing
    from torchsurgeon.transport.in_process import InProcessTransport as InProcessTransport
    from torchsurgeon.transport.over_http import HttpTransport as HttpTransport
    from torchsurgeon.transport.tensors import Answer as Answer
    from torchsurgeon.transport.tensors import Transport as Transport
