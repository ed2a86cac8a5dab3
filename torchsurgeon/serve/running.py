"""``run()``: a server as a process's only task, from reading its files to its last answer."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon.backends import Backend, find_backends
from torchsurgeon.errors import ServerError
from torchsurgeon.serve.access import AccessLog
from torchsurgeon.serve.admission import MAX_QUEUE
from torchsurgeon.serve.app import create_app
from torchsurgeon.serve.arriving import Entrance
from torchsurgeon.serve.batching import Batching
from torchsurgeon.serve.certificates import certificates_of
from torchsurgeon.serve.connections import MAX_CONNECTIONS, Connections
from torchsurgeon.serve.draining import DrainingServer
from torchsurgeon.serve.failure import OncePerPeriod
from torchsurgeon.serve.fairness import Priority
from torchsurgeon.serve.hangup import reload_on_hangup
from torchsurgeon.serve.idle import IdleMemory
from torchsurgeon.serve.loading import ModelLoader, settle_twice
from torchsurgeon.serve.logs import LogFormat, configure
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.rehearsal import (
    tell_address,
    tell_entrance,
    tell_extras,
    tell_limits,
    tell_models,
    tell_priorities,
)
from torchsurgeon.serve.repository import Loading
from torchsurgeon.serve.served import Profiler, measured_profile
from torchsurgeon.serve.server import config_of, is_loopback, listen, serve, url_of
from torchsurgeon.serve.tokens import Tokens
from torchsurgeon.wire.header import PRIORITIES

_log = logging.getLogger("torchsurgeon.serve")
_uvicorns = logging.getLogger("uvicorn.error")


def run(
    models: Mapping[str, str],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    weights: Mapping[str, str] | None = None,
    input_specs: Mapping[str, str] | None = None,
    leaf_modules: Mapping[str, Collection[str]] | None = None,
    codecs: Mapping[str, Collection[str]] | None = None,
    backends: Mapping[str, str | Backend | Sequence[str | Backend]] | None = None,
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
    max_priority: Priority = "normal",
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_client_ca: str | None = None,
    log_format: LogFormat = "text",
    access_log: bool = False,
    metrics: bool = False,
    allow_load: bool = False,
    page: bool = True,
    check: bool = False,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve models until the process is interrupted. The process is meant to do nothing else.

    The server answers at once, with 503 for models that are still loading. It changes the process: memory that is freed
    is kept until there has been nothing to do for a while, and what is loaded is left out of garbage collection.

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
            except those for health. On SIGHUP it is read again, and so are the certificates.
        insecure: whether other machines may reach a server that asks for no token. A warning is given then.
        max_priority: the highest priority that a client may ask for, unless the line of its token says another.
        tls_cert: the certificate, for HTTPS.
        tls_key: the certificate's key.
        tls_client_ca: the certificates of those whose clients are let in; None to ask clients for no certificate.
        log_format: how the log is written to standard error, unless the program has set up ``logging`` itself:
            ``"text"`` or ``"json"``.
        access_log: whether a line is written for each request.
        metrics: whether ``/metrics`` tells what the server does. It needs prometheus-client.
        allow_load: whether clients may have models unloaded, and loaded again as they are given here.
        page: whether ``/`` is a page that shows how busy the server is.
        check: whether to tell only what would be served: every file is read and every model is loaded, and that is all.
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
    if not is_loopback(host) and token_file is None:
        _check_insecure(host, insecure)
    tokens = None if token_file is None else Tokens(token_file)
    certificates = certificates_of(tls_cert, tls_key, tls_client_ca)
    if tokens is not None or certificates is not None:
        reload_on_hangup(tokens, certificates, report)
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
    loader = ModelLoader(
        registry,
        models,
        weights=weights,
        input_specs=input_specs,
        leaf_modules=leaf_modules,
        codecs=codecs,
        backends=backends,
        verify=verify,
        seed=seed,
        report=report,
    )
    connections = Connections(max_connections, max_connections_per_address)
    scheme = "http" if certificates is None else "https"
    if check:
        extras = {
            "a page at /": page,
            "/metrics": metrics,
            "an access log": access_log,
            "clients may load and unload models": allow_load,
        }
        with contextlib.closing(registry):
            tell_entrance(report, url_of(scheme, host, port), host, tokens, certificates)
            is_free = tell_address(report, host, port)
            tell_limits(report, registry, connections, grace_s)
            tell_priorities(report, tokens, max_priority)
            tell_extras(report, [name for name, is_on in extras.items() if is_on])
            loader.load_all()
            tell_models(report, registry, is_free=is_free)
        gc.unfreeze()
        return
    bound = listen(host, port)
    if certificates is not None:
        bound = Entrance(bound, connections)
    url = url_of(scheme, host, bound.getsockname()[1])
    app = create_app(registry)
    app.tokens = tokens
    app.highest = PRIORITIES.index(max_priority)
    app.has_page = page
    app.connections = lambda: len(connections)
    if allow_load:
        app.loading = Loading(models, loader.load_again, settle_twice)
    with contextlib.suppress(ModuleNotFoundError):
        spans = importlib.import_module("torchsurgeon.serve.spans")
        if spans.traced():
            app.listeners.append(spans.Spans())
    log = AccessLog() if access_log else None
    if log is not None:
        app.listeners.append(log)
    if counting is not None:
        counts = counting.Metrics(registry, app.connections)
        app.listeners.append(counts)
        app.metrics = counts.text
    server = DrainingServer(
        config_of(app, connections, direct=True, certificates=certificates),
        connections,
        grace_s=grace_s,
        on_drain=app.drain,
        say=report,
        on_end=lambda: None if log is None else log.close(),
    )
    failures: list[Exception] = []

    def load() -> None:
        try:
            loader.load_all()
            report(f"ready: serving {', '.join(models)} at {url}")
        except Exception as error:
            # Of any kind: a server that was left to run would say for ever that its models are loading.
            failures.append(error)
            server.should_exit = server.force_exit = True

    # Whoever reads "ready" connects at once, and a small model can be loaded before uvicorn takes connections.
    bound.listen()
    threading.Thread(target=load, name="torchsurgeon-load", daemon=True).start()
    in_turn, idle = OncePerPeriod(), IdleMemory(registry)
    _uvicorns.addFilter(in_turn)
    idle.start()
    try:
        serve(server, bound)
    finally:
        idle.close()
        bound.close()
        registry.close()
        if log is not None:
            log.close()
        _uvicorns.removeFilter(in_turn)
        gc.unfreeze()  # or libraries report what was left out of garbage collection as leaks when the process ends
    if failures:
        raise failures[0]


def _check_insecure(host: str, insecure: bool) -> None:
    if not insecure:
        raise ServerError(
            f"an address that other machines can reach needs a token: give --token-file FILE for {host[:300]}, or "
            "--insecure to let everyone who can reach it run the models and read digests of their weights"
        )
    warnings.warn(
        f"listening on {host}: everyone who can reach this address can run the models and read their weights' digests",
        stacklevel=3,
    )


def _print_progress(line: str) -> None:
    print(line, flush=True)


def _log_progress(line: str) -> None:
    _log.info("%s", line)
