"""The transport over HTTP and HTTPS."""

from __future__ import annotations

from torchsurgeon.transport.http_bytes import HttpBytes
from torchsurgeon.transport.tensors import Transport


class HttpTransport(HttpBytes, Transport):
    """The way to a tail server over HTTP or HTTPS.

    It leads through the proxy that the environment names for the server when the transport is made, if there is one:
    ``http_proxy``, ``https_proxy``, ``all_proxy`` and ``no_proxy`` mean what they mean to ``requests``. Handshake and
    inference take the same way.

    Args:
        url: ``http://host:port`` or ``https://host:port``; a path may follow, which precedes every path of the server.
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
        headers: sent with every request, such as a token.
        ssl_context: how the inference path checks certificates; as the system does by default.
        verify: how the control plane checks certificates, as ``requests`` takes it.

    Raises:
        ServerUnavailableError: ``url`` is not the URL of a server.
        ProtocolError: a header holds a line break.

    Attributes:
        url: the URL, without a slash at its end.
    """
