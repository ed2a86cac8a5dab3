"""Running the application under uvicorn: in a thread (``Server``), or as a process's only task (``run()``)."""

from __future__ import annotations

import gc
import importlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import uvicorn

from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon.backends import find_backends
from torchsurgeon.errors import ServerError, TorchSurgeonError, short
from torchsurgeon.serve.access import AccessLog
from torchsurgeon.serve.admission import MAX_QUEUE
from torchsurgeon.serve.app import TailApp, create_app
from torchsurgeon.serve.batching import Batching
from torchsurgeon.serve.connections import MAX_CONNECTIONS, Connections
from torchsurgeon.serve.draining import DrainingServer
from torchsurgeon.serve.failure import OncePerPeriod
from torchsurgeon.serve.logs import LogFormat, configure
from torchsurgeon.serve.protocol import ServeProtocol
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.repository import Loading
from torchsurgeon.serve.served import Profiler, measured_profile
from torchsurgeon.serve.tokens import Tokens, check_certificates, reload_on_hangup

_log = logging.getLogger("torchsurgeon.serve")
_uvicorns = logging.getLogger("uvicorn.error")

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
        ServerError: the address is not available.

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
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = _url("https" if ssl_certfile else "http", host, self.port)
        connections = Connections(max_connections, max_connections_per_address)
        config = _config(app, connections, direct=direct, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
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
            self._thread = threading.Thread(target=_serve, args=arguments, name="torchsurgeon-serve", daemon=True)
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


def run(
    models: Mapping[str, str],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    weights: Mapping[str, str] | None = None,
    input_specs: Mapping[str, str] | None = None,
    leaf_modules: Mapping[str, Collection[str]] | None = None,
    codecs: Mapping[str, Collection[str]] | None = None,
    backends: Mapping[str, str] | None = None,
    verify: bool = True,
    seed: int = 0,
    max_batch: int = 64,
    concurrency: int | None = None,
    batching: Batching = "rounded",
    max_queue: int = MAX_QUEUE,
    max_connections: int = MAX_CONNECTIONS,
    max_connections_per_address: int | None = None,
    grace_s: float = 10.0,
    profiler: Profiler | None = measured_profile,
    token_file: str | Path | None = None,
    insecure: bool = False,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_client_ca: str | None = None,
    log_format: LogFormat = "text",
    access_log: bool = False,
    metrics: bool = False,
    allow_load: bool = False,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve models until the process is interrupted. The process is meant to do nothing else.

    The server answers at once, with 503 for models that are still loading. It changes the process: memory that is freed
    is kept, and what is loaded is left out of garbage collection.

    Args:
        models: the SPEC of each model by its name.
        host: the address to listen on. One that other machines can reach needs ``token_file``, or ``insecure``.
        port: the port to listen on; 0 for any free one.
        weights: weights files by model name, as in ``torchsurgeon.models.specs.load()``.
        input_specs: inputs by model name, as in ``torchsurgeon.models.specs.load()``.
        leaf_modules: modules to keep whole by model name, as in ``torchsurgeon.tracing.trace()``.
        codecs: files of fitted codecs by model name.
        backends: what runs the tails by model name, as in ``ModelRegistry.add()``; eager PyTorch by default.
        verify: whether to run each model and what was traced, and compare, as ``trace()`` does.
        seed: seed of random weights.
        max_batch: the largest batch of a request.
        concurrency: how many requests of a model run at once, as in ``ModelRegistry``.
        max_queue: how many requests of a model may wait, as in ``ModelRegistry``.
        batching: whether requests that wait are joined and run as one, as in ``ModelRegistry``.
        max_connections: as in ``Server``.
        max_connections_per_address: as in ``Server``.
        grace_s: after SIGTERM or SIGINT, the most seconds that requests under way are waited for.
        profiler: as in ``ModelRegistry``.
        token_file: a file with tokens, one a line, of which every request must have one as ``Authorization: Bearer``,
            except those for health. On SIGHUP it is read again.
        insecure: whether other machines may reach a server that asks for no token. A warning is given then.
        tls_cert: the certificate, for HTTPS.
        tls_key: the certificate's key.
        tls_client_ca: the certificates of those whose clients are let in; None to ask clients for no certificate.
        log_format: how the log is written to standard error, unless the program has set up ``logging`` itself:
            ``"text"`` or ``"json"``.
        access_log: whether a line is written for each request.
        metrics: whether ``/metrics`` tells what the server does. It needs prometheus-client.
        allow_load: whether clients may have models unloaded, and loaded again as they are given here.
        say: called with each line about the server's progress. By default the lines are printed, and with
            ``log_format="json"`` they are part of the log.

    Raises:
        ServerError: the address is not available.
        SpecError: a SPEC could not be loaded.
        TraceError: a model could not be traced.
        CodecError: a codec's file is damaged, or is not of its model.
        BackendError: there is no such backend here.
    """
    configure(log_format)
    report = say or (_log_progress if log_format == "json" else _print_progress)
    in_turn = OncePerPeriod()
    _uvicorns.addFilter(in_turn)
    if not is_loopback(host) and token_file is None:
        if not insecure:
            raise ServerError(
                f"an address that other machines can reach needs a token: give --token-file FILE for {host[:300]}, or "
                "--insecure to let everyone who can reach it run the models and read digests of their weights"
            )
        warnings.warn(
            f"listening on {host}: everyone who can reach this address can run the models and read their weights' "
            "digests",
            stacklevel=2,
        )
    tokens = None if token_file is None else Tokens(token_file)
    check_certificates(tls_cert, tls_key, tls_client_ca)
    # Before anything is opened, since the package may be missing.
    counting = importlib.import_module("torchsurgeon.serve.metrics") if metrics else None
    for backend in (backends or {}).values():
        find_backends(backend)
    keep_freed_memory()
    registry = ModelRegistry(
        max_batch=max_batch, concurrency=concurrency, batching=batching, max_queue=max_queue, profiler=profiler
    )
    for name in models:
        registry.announce(name)
    bound = listen(host, port)
    url = _url("http" if tls_cert is None else "https", host, bound.getsockname()[1])
    connections = Connections(max_connections, max_connections_per_address)
    app = create_app(registry)
    app.tokens = tokens
    app.connections = lambda: len(connections)
    log = AccessLog() if access_log else None
    if log is not None:
        app.listeners.append(log)
    if counting is not None:
        counts = counting.Metrics(registry, app.connections)
        app.listeners.append(counts)
        app.metrics = counts.text
    server = DrainingServer(
        _config(app, connections, direct=True, ssl_certfile=tls_cert, ssl_keyfile=tls_key, ssl_ca_certs=tls_client_ca),
        connections,
        grace_s=grace_s,
        on_drain=app.drain,
        say=report,
        on_end=lambda: None if log is None else log.close(),
    )
    failures: list[TorchSurgeonError] = []

    def load_one(name: str, replace: bool = False) -> None:
        started_s = time.perf_counter()
        served = registry.load(
            name,
            models[name],
            weights=(weights or {}).get(name),
            input_spec=(input_specs or {}).get(name),
            leaf_modules=(leaf_modules or {}).get(name, ()),
            verify=verify,
            backend=(backends or {}).get(name),
            replace=replace,
            seed=seed,
        )
        report(
            f"loaded {name} from {served.source} in {time.perf_counter() - started_s:.1f} s: "
            f"{len(served.graph.layers)} layers, {len(served.graph.points)} partition points"
        )
        for path in (codecs or {}).get(name, ()):
            fitted = served.add_codec(path)
            report(f"loaded {fitted.name}, fitted to {name} after {fitted.point[1]}, from {path}")

    def settle() -> None:
        # Models stay for long, so the garbage collector does not have to walk through them during requests. One that
        # was unloaded is among what it left alone.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def load_all() -> None:
        try:
            for name in models:
                load_one(name)
            settle()
            report(f"ready: serving {', '.join(models)} at {url}")
        except TorchSurgeonError as error:
            failures.append(error)
            server.should_exit = server.force_exit = True

    def load_again(name: str) -> None:
        load_one(name, replace=True)
        settle()

    if allow_load:
        app.loading = Loading(models, load_again, settle)

    # Whoever reads "ready" connects at once, and a small model can be loaded before uvicorn takes connections.
    bound.listen()
    threading.Thread(target=load_all, name="torchsurgeon-load", daemon=True).start()
    if tokens is not None:
        reload_on_hangup(tokens, report)
    try:
        _serve(server, bound)
    finally:
        bound.close()
        registry.close()
        if log is not None:
            log.close()
        _uvicorns.removeFilter(in_turn)
        gc.unfreeze()  # or libraries report what was left out of garbage collection as leaks when the process ends
    if failures:
        raise failures[0]


def _print_progress(line: str) -> None:
    print(line, flush=True)


def _log_progress(line: str) -> None:
    _log.info("%s", line)


def _serve(server: uvicorn.Server, bound: socket.socket) -> None:
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


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _config(
    app: Any,
    connections: Connections,
    *,
    direct: bool,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    ssl_ca_certs: str | None = None,
) -> uvicorn.Config:
    taken = getattr(app, "direct", None) if direct else None
    return uvicorn.Config(
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
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        ssl_ca_certs=ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )
