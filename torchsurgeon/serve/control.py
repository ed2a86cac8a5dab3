"""Everything that is asked of the server besides inference, probes and the loading of models; routed by Starlette."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from torchsurgeon.serve import triton
from torchsurgeon.serve.failure import RETRY_AFTER_S, error_body, status_of
from torchsurgeon.serve.load import load
from torchsurgeon.serve.page import PATH, page
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.served import ServedModel
from torchsurgeon.serve.worker import ClosedError

_RETRY = {"retry-after": str(RETRY_AFTER_S)}
_OWN_EXTENSIONS = ("partition", "dim_order", "codec", "datatypes", "load")


class Serving(Protocol):
    """What is asked about.

    Attributes:
        registry: the models.
        metrics: returns what ``/metrics`` answers, and its media type; None for no such path.
        has_page: whether ``/`` shows how busy the server is.
        draining: whether the server is about to stop.
        connections: returns how many connections are open.
        started_s: when the server started, in seconds of ``time.monotonic``.
    """

    registry: ModelRegistry
    metrics: Callable[[], tuple[bytes, str]] | None
    has_page: bool
    draining: bool
    connections: Callable[[], int]
    started_s: float


def control_plane(app: Serving) -> ExceptionMiddleware:
    """Return the ASGI application that answers for the server ``app``."""
    registry = app.registry

    def find(request: Request) -> ServedModel:
        return registry.get(request.path_params["name"], request.path_params.get("version"))

    async def server(request: Request) -> JSONResponse:
        extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
        extensions += [f"torchsurgeon_{name}" for name in _OWN_EXTENSIONS]
        return JSONResponse({"name": "torchsurgeon", "version": _version(), "extensions": extensions})

    async def tell_page(request: Request) -> Response:
        if not app.has_page:
            raise HTTPException(404)
        body, headers = page()
        return Response(body, headers=dict(headers))

    async def tell_description(request: Request) -> Response:
        return Response(_description(), media_type="application/json")

    async def live(request: Request) -> JSONResponse:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> JSONResponse:
        is_ready = registry.ready() and not app.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503, None if is_ready else _RETRY)

    async def tell_load(request: Request) -> JSONResponse:
        return JSONResponse(load(registry, app.connections(), app.started_s, app.draining))

    async def model(request: Request) -> JSONResponse:
        return JSONResponse(find(request).metadata())

    async def model_ready(request: Request) -> JSONResponse:
        return JSONResponse({"name": find(request).name, "ready": True})

    async def configuration(request: Request) -> JSONResponse:
        return JSONResponse(triton.configuration(find(request)))

    async def stats(request: Request) -> JSONResponse:
        served = find(request)
        return JSONResponse({"model_stats": [served.statistics.as_triton(served.name, served.versions[0])]})

    async def all_stats(request: Request) -> JSONResponse:
        served = [one for one in registry.loaded().values() if one is not None]
        return JSONResponse(
            {"model_stats": [one.statistics.as_triton(one.name, one.versions[0]) for one in served]},
        )

    async def fingerprint(request: Request) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(find(request).fingerprint))

    async def profile(request: Request) -> JSONResponse:
        backend = request.query_params.get("backend")
        try:
            measuring = find(request).profile(backend)
        except ClosedError:
            measuring = find(request).profile(backend)
        # Others may wait for the same measurement, which goes on where this client leaves.
        return JSONResponse(await asyncio.shield(asyncio.wrap_future(measuring)))

    async def tell_metrics(request: Request) -> Response:
        if app.metrics is None:
            raise HTTPException(404)
        text, kind = await asyncio.to_thread(app.metrics)
        return Response(text, headers={"content-type": kind})

    async def post_only(request: Request) -> JSONResponse:
        raise HTTPException(404)

    async def failure(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            asked = f"{request.method} {request.url.path[:300]}"
            request.scope["exchange"].error = type(error).__name__
            return JSONResponse({"error": f"{error.detail}: {asked}"}, error.status_code, error.headers)
        status = status_of(error)
        body = error_body(error, request.scope["exchange"].about())
        request.scope["exchange"].error = type(error).__name__
        return Response(body, status, _RETRY if status == 503 else None, "application/json")

    routes = [
        Route(PATH, tell_page),
        Route("/openapi.json", tell_description),
        Route("/v2", server),
        Route("/v2/", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/load", tell_load),
        Route("/v2/probe", post_only, methods=["POST"]),
        Route("/v2/models/stats", all_stats),
        Route("/metrics", tell_metrics),
    ]
    # They are answered before they come here; any other method is refused with 405.
    routes += [
        Route(f"/v2/repository/{path}", post_only, methods=["POST"])
        for path in ("index", "models/{name}/load", "models/{name}/unload")
    ]
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(prefix, model),
            Route(f"{prefix}/ready", model_ready),
            Route(f"{prefix}/config", configuration),
            Route(f"{prefix}/stats", stats),
            Route(f"{prefix}/infer", post_only, methods=["POST"]),
            Route(f"{prefix}/fingerprint", fingerprint),
            Route(f"{prefix}/profile", profile),
        ]
    # Not a Starlette, which answers an unexpected error in plain text. And a redirect would go to whatever host the
    # request names.
    handlers: dict[Any, Any] = {HTTPException: failure, Exception: failure}
    return ExceptionMiddleware(Router(routes, redirect_slashes=False), handlers)


@functools.cache
def _description() -> bytes:
    return (Path(__file__).parent / "openapi.json").read_bytes()


def _version() -> str:
    try:
        return metadata.version("torchsurgeon")
    except metadata.PackageNotFoundError:
        return "0"
