"""Transports carry named tensors to a tail server and its answer back.

:class:`HttpTransport` keeps two paths apart. The control plane (handshake, metadata, profiles) goes through
``requests``, with its proxies and certificates. Inference goes through kept-alive sockets of its own, one per thread
in use: tensors are written from their own memory with ``sendmsg`` and the answer is read straight into the buffer whose
views the caller gets. Every call has one deadline for all of it, so a server that trickles cannot extend it.

:class:`InProcessTransport` calls an ASGI application directly: client and server meet in one process, without sockets.
"""

from __future__ import annotations

from torchsurgeon.transport.base import Answer, RawAnswer, Timing, Transport
from torchsurgeon.transport.in_process import InProcessTransport
from torchsurgeon.transport.over_http import HttpTransport

__all__ = ["Answer", "HttpTransport", "InProcessTransport", "RawAnswer", "Timing", "Transport"]
