"""The server that a load test asks: how its connections are opened, and how requests to it begin."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from typing import Any

from torchsurgeon.errors import LoadTestError, ServerUnavailableError, short
from torchsurgeon.transport.http_bytes import context_for
from torchsurgeon.transport.route import route_to
from torchsurgeon.wire.header import DEADLINE, HEADER_LENGTH


@dataclass(frozen=True)
class Target:
    """A server, and how it is asked. ``Target.at()`` makes one.

    Attributes:
        url: the server's URL.
        family: the family of its address.
        address: its address, as ``socket.connect`` takes it.
        context: how connections are encrypted; None for plain HTTP.
        host: the name that the server's certificate must have.
        prefix: what precedes the path in a request's first line.
        lines: header lines of every request, each with its line break.
    """

    url: str
    family: int
    address: Any
    context: ssl.SSLContext | None
    host: str
    prefix: str
    lines: str = field(repr=False)

    @staticmethod
    def at(
        url: str,
        *,
        token: str | None = None,
        verify: bool | str = True,
        cert: str | tuple[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> Target:
        """Return the target at a URL.

        Args:
            url: the server's URL, as ``HttpTransport`` takes it.
            token: sent with every request; None for none.
            verify: how certificates are checked, as ``HttpTransport`` takes it.
            cert: this side's certificate, as ``HttpTransport`` takes it.
            deadline_s: after how many seconds answers are of no use any more, which is told to the server; None for
                never.

        Raises:
            ServerUnavailableError: the URL is no server's, the host has no address, or a certificate cannot be used.
            LoadTestError: the environment names a proxy for the server, or the token cannot be sent.
        """
        route = route_to(url)
        if route.proxy is not None:
            raise LoadTestError(
                f"the load would pass through the proxy {route.proxy}, which the environment names, and would be "
                f"limited by it; set no_proxy={route.netloc.rpartition(':')[0] or route.netloc} to ask the server "
                "itself"
            )
        try:
            family, _, _, _, address = socket.getaddrinfo(*route.connect_to, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise ServerUnavailableError(
                f"{short(route.connect_to[0])} has no address: {short(error)}; check the URL {url[:300]}"
            ) from error
        lines = f"Host: {route.netloc}\r\nContent-Type: application/octet-stream\r\n"
        if token is not None:
            if not token.isascii() or not token.isprintable():
                # The token itself is not quoted.
                raise LoadTestError("the token must consist of printable ASCII characters; it does not")
            lines += f"Authorization: Bearer {token}\r\n"
        if deadline_s is not None:
            lines += f"{DEADLINE}: {deadline_s:.6f}\r\n"
        context = route.context(context_for(verify, cert))
        return Target(route.url, family, address, context, route.connect_to[0], route.target, lines)

    def post(self, path: str, body: bytes, header_bytes: int | None) -> bytes:
        """Return a whole request, head and body.

        Args:
            path: its path.
            body: its body.
            header_bytes: the value of ``Inference-Header-Content-Length``; None to send none.
        """
        head = f"POST {self.prefix}{path} HTTP/1.1\r\n{self.lines}Content-Length: {len(body)}\r\n"
        if header_bytes is not None:
            head += f"{HEADER_LENGTH}: {header_bytes}\r\n"
        return f"{head}\r\n".encode("latin-1") + body
