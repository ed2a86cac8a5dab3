"""The tail server as a Ray Serve application, which scales over the machines of a Ray cluster.

    serve run torchsurgeon.serve.ray:app models=alexnet=torchvision:alexnet max_replicas=8 gpus=0.25

There are two deployments. ``Front`` takes requests, and knows no model. ``Tails`` holds models, each under the very
application that ``torchsurgeon serve`` runs. Ray Serve adds and removes its replicas by how many requests they have,
and prefers those that hold a request's model already. An inference depends on nothing but the request, so when a
replica is lost under way, ``Front`` has another one answer.

Ray moves objects between its own processes by pickle. What a client sends crosses as bytes and is never unpickled, but
the ports of a Ray cluster must be reachable by its own machines only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from torch.utils import _pytree

from torchsurgeon.errors import BodyTooLargeError, ModelNotServedError, ServerError, short
from torchsurgeon.models import specs
from torchsurgeon.serve.admission import DEADLINE, deadline_in
from torchsurgeon.serve.app import TailApp, create_app
from torchsurgeon.serve.body import check_length, content_length
from torchsurgeon.serve.failure import BusyError, ExpiredError, error_body, retry_after_s, status_of
from torchsurgeon.serve.ray_options import RayOptions
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.replies import HEALTH
from torchsurgeon.serve.tokens import Tokens

_log = logging.getLogger(__name__)

# A lost replica is replaced within seconds. Another one answers at once where there is one.
_TRIES, _PAUSE_S = 20, 0.25
# What a server says of a connection is the front's business, and not that of the replica behind it.
_OF_CONNECTIONS = (b"connection", b"transfer-encoding", b"content-length", b"keep-alive", b"expect")


class Asked(NamedTuple):
    """A request on its way from the front to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    client: tuple[str, int] | None


class Answered(NamedTuple):
    """An answer on its way back."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Tails:
    """A replica: some of the models, and the application that answers for each.

    Args:
        options: what is served.
    """

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._held = serve.multiplexed(max_num_models_per_replica=options.models_per_replica)(_loader(options))

    async def reconfigure(self, names: list[str]) -> None:
        """Load models before the replica takes requests; called by Ray Serve."""
        for name in names:
            await self._held(name)

    async def answer(self, model: str, asked: Asked) -> Answered:
        """Answer a request about a model, which is loaded if it is not there yet."""
        held = await self._held(model)
        return await call(held.app, asked)


class Front:
    """What clients talk to: it checks tokens and sizes, and has a replica answer.

    Args:
        options: what is served.
        tails: the handle of the ``Tails``.
    """

    def __init__(self, options: RayOptions, tails: Any) -> None:
        self._options, self._tails = options, tails
        self._own = create_app(ModelRegistry(profiler=None))
        # It knows no model, so the page would show none.
        self._own.has_page = False
        if options.token_file is not None:
            self._own.tokens = Tokens(options.token_file)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        scope = request.scope
        try:
            answered = await self._answer(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            about = {"asked": f"{scope['method']} {scope['path']}"}
            status, body = status_of(error), error_body(error, about)
            answered = Answered(status, [(b"content-type", b"application/json")], body)
            if status == 503:
                answered.headers.append((b"retry-after", b"%d" % retry_after_s(error)))
        response = Response(answered.body, answered.status)
        response.raw_headers[:] = [*answered.headers, (b"content-length", b"%d" % len(answered.body))]
        return response

    async def _answer(self, request: Request) -> Answered:
        scope = request.scope
        headers = dict(scope["headers"])
        tokens = self._own.tokens
        model = _model_in(scope["path"])
        let_in = (
            tokens is None or scope["path"] in HEALTH or tokens.holder_of(headers.get(b"authorization")) is not None
        )
        if model is None or not let_in:
            # Not a byte of the body is read for someone who is not let in.
            asked = await _asked(request, headers, self._options.max_body_bytes if let_in else 0, read=let_in)
            return await call(self._own, asked)
        if model not in self._options.models:
            raise ModelNotServedError(
                f"model {short(model)} is not served; served are {', '.join(self._options.models)[:300]}"
            )
        deadline_s = deadline_in(headers.get(DEADLINE))
        asked = await _asked(request, headers, self._options.max_body_bytes)
        try:
            return await asyncio.wait_for(
                self._by_some_replica(model, asked), deadline_s if math.isfinite(deadline_s) else None
            )
        except asyncio.TimeoutError:
            raise ExpiredError(
                f"no replica has answered within the request's deadline of {deadline_s:g} s; allow more, or replicas"
            ) from None

    async def _by_some_replica(self, model: str, asked: Asked) -> Answered:
        handle = self._tails.options(multiplexed_model_id=model)
        for left in reversed(range(_TRIES)):
            try:
                answered: Answered = await handle.answer.remote(model, asked)
                return answered
            except BackPressureError:
                raise BusyError(
                    f"as many requests wait as are taken ({self._options.max_queue}); try again later", 1.0
                ) from None
            except (RayActorError, RayServeException) as error:
                if not left:
                    raise
                _log.warning("a replica was lost; another one is asked (%s)", short(error, 200))
            await asyncio.sleep(_PAUSE_S if left < _TRIES - 1 else 0.0)
        raise AssertionError("the last try returns or raises")


def app(args: Mapping[str, Any]) -> Any:
    """Return the Ray Serve application.

    Args:
        args: the options by their names, as ``RayOptions.parse()`` takes them.

    Raises:
        ServerError: an option is unknown or not valid.
    """
    return application(RayOptions.parse(args))


def application(options: RayOptions) -> Any:
    """Return the Ray Serve application of some options, for ``ray.serve.run()``.

    Args:
        options: what is served, and how far it scales.
    """
    tails = serve.deployment(Tails).options(
        name="tails",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        user_config=list(options.models)[: options.models_per_replica],
        max_ongoing_requests=options.max_ongoing,
        max_queued_requests=options.max_queue,
        autoscaling_config={
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.ongoing,
        },
    )
    front = serve.deployment(Front).options(
        name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4 * options.max_queue
    )
    return front.bind(options, tails.bind(options))


def run(options: RayOptions, host: str = "127.0.0.1", port: int = 8000, *, blocking: bool = True) -> None:
    """Serve from this machine's Ray, which is started if there is none.

    Args:
        options: what is served, and how far it scales.
        host: the address to listen on.
        port: the port to listen on.
        blocking: whether to return only once the process is interrupted.

    Raises:
        ServerError: Ray Serve runs on the cluster already, and listens elsewhere.
    """
    serve.start(http_options={"host": host, "port": port})
    _check_address(host, port)
    serve.run(application(options), name="torchsurgeon", blocking=blocking)


def _check_address(host: str, port: int) -> None:
    """Check that Ray Serve listens where it is told to. One that runs already goes on listening where it does."""
    # There is no public way to ask for it, so a release in which it has moved is not asked.
    with contextlib.suppress(ImportError, AttributeError):
        from ray.serve.context import _get_global_client

        found = _get_global_client().http_config
        if (found.host, found.port) != (host, port):
            raise ServerError(
                f"Ray Serve runs on this cluster already, and listens on {found.host}:{found.port} of its machines; "
                f"give that --host and --port in place of {host[:300]}:{port}, or end it first (serve shutdown)"
            )


async def call(app: TailApp, asked: Asked) -> Answered:
    """Have an ASGI application answer a request that is there as a whole.

    Args:
        app: the application.
        asked: the request.
    """
    given, told = False, Answered(500, [], b"")
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            # A client that leaves has its request cancelled, here too, so there is nothing that could be received.
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": asked.body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal told
        if message["type"] == "http.response.start":
            told = Answered(message["status"], list(message["headers"]), b"")
        else:
            pieces.append(bytes(message.get("body", b"")))

    headers = [*asked.headers, (b"content-length", b"%d" % len(asked.body))]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": quote(asked.path).encode(),
        "root_path": "",
        "query_string": asked.query,
        "headers": headers,
        "client": asked.client,
        "server": None,
    }
    await app(scope, receive, send)
    kept = [(name, value) for name, value in told.headers if name.lower() not in _OF_CONNECTIONS]
    return Answered(told.status, kept, b"".join(pieces))


class _Held:
    """A model that a replica holds. Its threads end once Ray Serve has dropped it and nothing asks it any more."""

    def __init__(self, options: RayOptions, name: str) -> None:
        registry = ModelRegistry(max_batch=options.max_batch, batching=options.batching)  # type: ignore[arg-type]
        # Not __del__, which Ray Serve calls when it drops a model, while requests that have found it still run.
        weakref.finalize(self, registry.close)
        loaded = specs.load(
            options.models[name],
            weights=options.weights.get(name),
            input_spec=options.input_specs.get(name),
            seed=options.seed,
        )
        args, kwargs = loaded.args, loaded.kwargs
        if options.gpus:
            loaded.model.cuda()
            args, kwargs = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), (args, kwargs))
        served = registry.add(name, loaded.model, args, kwargs, source=loaded.source)
        # The answers of every replica say of which weights they are, whichever of them was asked for the fingerprint.
        served.fingerprint()
        self.app = create_app(registry)


def _loader(options: RayOptions) -> Callable[[str], Any]:
    turn = asyncio.Lock()

    async def load(name: str) -> _Held:
        # One at a time, since random weights come from a generator that all threads share. The replica answers for its
        # other models meanwhile.
        async with turn:
            return await asyncio.to_thread(_Held, options, name)

    return load


def _model_in(path: str) -> str | None:
    """Return the model that a path is about; None where it is about none."""
    parts = path.split("/")
    return parts[3] if len(parts) > 3 and parts[1:3] == ["v2", "models"] and parts[3] else None


async def _asked(request: Request, headers: Mapping[bytes, bytes], limit_bytes: int, *, read: bool = True) -> Asked:
    """Return a request with its body, of which no more than ``limit_bytes`` are read.

    Raises:
        BodyTooLargeError: the body is larger.
        ProtocolError: the length that the headers declare is no number.
    """
    body = bytearray()
    if read:
        check_length(content_length(headers), limit_bytes)
        async for piece in request.stream():
            body += piece
            if len(body) > limit_bytes:
                raise BodyTooLargeError(f"the body may have at most {limit_bytes} bytes; this one has more")
    scope = request.scope
    kept = [(name, value) for name, value in scope["headers"] if name not in _OF_CONNECTIONS]
    client = tuple(scope["client"]) if scope.get("client") else None
    return Asked(scope["method"], scope["path"], scope["query_string"], kept, bytes(body), client)
