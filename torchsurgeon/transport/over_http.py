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
        ssl_context: how the inference path checks certificates; by default as ``verify`` and ``cert`` say.
        verify: how certificates are checked: True for as the system does, or as REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE in
            the environment says; a file or folder with those that are trusted; or False for not at all. With
            ``ssl_context`` it holds for the control plane only, and so does ``cert``.
        token: sent with every request as ``Authorization: Bearer``, without spaces and line breaks around it; None for
            none.
        cert: this side's certificate, for servers that ask for one: a file that holds its key too, or both files.

    Raises:
        ServerUnavailableError: ``url`` is not the URL of a server, or a certificate's file cannot be used.
        ProtocolError: ``token`` or a header holds a line break.

    Attributes:
        url: the URL, without a slash at its end.
    """
