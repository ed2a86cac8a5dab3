"""An application under uvicorn, in a thread; and what every server of ours has: its socket and its settings."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
import uvicorn

from torchsurgeon.errors import ServerError, short
from torchsurgeon.serve.app import TailApp
from torchsurgeon.serve.arriving import Entrance
from torchsurgeon.serve.certificates import Certificates, certificates_of
from torchsurgeon.serve.connections import MAX_CONNECTIONS, Connections
from torchsurgeon.serve.protocol import ServeProtocol

_KEEP_ALIVE_S = 75
_START_S = 10.0


class Server:
    """An ASGI application that is served from a thread, for tests, demos and notebooks.

    A context manager: ``with Server(app) as server: … server.url``.

    Args:
        app: the application, such as ``create_app()`` returns.
        host: the address to listen on.
        port: the port to listen on; 0 for any free one.
        ssl_certfile: the certificate, for HTTPS.
        ssl_keyfile: the certificate's key.
        direct: whether plain inference requests bypass ASGI.
        max_connections: the most connections; for another one, the one that has been idle the longest is closed.
        max_connections_per_address: the most connections from one address; by default half of ``max_connections``, and
            no limit for this machine's own.

    Raises:
        ServerError: the address is not available, or the certificate cannot be used.

    Attributes:
        app: as given.
        host: as given.
        port: the port that is listened on.
        url: the server's URL.
        connections: the open connections.
    """

    def __init__(
        self,
        app: Any,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        ssl_certfile: str | None = None,
        ssl_keyfile: str | None = None,
        direct: bool = True,
        max_connections: int = MAX_CONNECTIONS,
        max_connections_per_address: int | None = None,
    ) -> None:
        self.app = app
        self.host = host
        # Before the socket is opened, which nobody would close if a file cannot be used.
        certificates = certificates_of(ssl_certfile, ssl_keyfile, None)
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = url_of("https" if ssl_certfile else "http", host, self.port)
        connections = Connections(max_connections, max_connections_per_address)
        if certificates is not None:
            self._socket = Entrance(self._socket, connections)
        config = config_of(app, connections, direct=direct, certificates=certificates)
        self.connections = connections
        if isinstance(app, TailApp):
            app.connections = lambda: len(connections)
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def start(self) -> Server:
        """Start to serve, and return once requests are accepted.

        Raises:
            ServerError: the server did not start.
        """
        if self._thread is None:
            arguments = (self._server, self._socket)
            self._thread = threading.Thread(target=serve, args=arguments, name="torchsurgeon-serve", daemon=True)
            self._thread.start()
            end_s = time.monotonic() + _START_S
            while not self._server.started:
                if not self._thread.is_alive() or time.monotonic() > end_s:
                    raise ServerError(f"the server at {self.url} did not start; its log says why")
                time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop serving and close every connection. Stopping twice is harmless."""
        self._server.should_exit = self._server.force_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(server: uvicorn.Server, bound: socket.socket) -> None:
    """Answer requests in this thread, until the server is told to stop."""
    # Quick requests run in the event loop's thread, and Worker.now does so only where gradients are off.
    with torch.no_grad():
        server.run(sockets=[bound])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Args:
        host: the address.
        port: the port; 0 for any free one.

    Raises:
        ServerError: the address is not available.
    """
    bound: socket.socket | None = None
    try:
        if not 0 <= port < 1 << 16:
            # getaddrinfo would use the lower 16 bits only.
            raise OverflowError("a port is a number from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        raise ServerError(
            f"cannot listen on {host[:300]}:{port}: {short(error)}; choose another port or host"
        ) from error
    return bound


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(scheme: str, host: str, port: int) -> str:
    """Return the URL of an address."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def config_of(
    app: Any, connections: Connections, *, direct: bool, certificates: Certificates | None = None
) -> uvicorn.Config:
    """Return uvicorn's configuration for an application.

    Args:
        app: the application.
        connections: the open connections.
        direct: whether plain inference requests bypass ASGI.
        certificates: for HTTPS; None for HTTP.
    """
    taken = getattr(app, "direct", None) if direct else None
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(ServeProtocol, taken, connections, getattr(app, "listeners", []))),
        # Not uvloop, which took half as long again for what ServeProtocol does.
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=None if certificates is None else certificates.cert,
        ssl_keyfile=None if certificates is None else certificates.key,
    )
    if certificates is not None:
        config.load()
        # In place of the one that uvicorn has made, which would keep its certificates.
        config.ssl = certificates.context
    return config
