"""Triton's model repository extension: which models there are, and loading and unloading them when a client asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from typing import Any

from torchsurgeon.errors import ModelFailedError, ModelNotServedError, ProtocolError, TorchSurgeonError, short
from torchsurgeon.serve import triton
from torchsurgeon.serve.failure import ForbiddenError
from torchsurgeon.serve.registry import ModelRegistry

MAX_BODY_BYTES = 64 << 10


class Loading:
    """What an operator allows who lets clients load and unload models.

    Args:
        names: the models that may be loaded. A client cannot name others, nor say what is behind a name.
        load: loads a model by its name in place of the one that is served.
        settle: called after a model was unloaded.
    """

    def __init__(
        self, names: Collection[str], load: Callable[[str], object], settle: Callable[[], object] = lambda: None
    ) -> None:
        self.names = names
        self.load = load
        self.settle = settle
        # One model at a time, so that two requests cannot fill the memory twice.
        self.turn = asyncio.Lock()


async def answer(path: str, body: memoryview, registry: ModelRegistry, loading: Loading | None) -> Any:
    """Return the JSON that answers a POST below ``/v2/repository/``; None where there is no such path.

    Args:
        path: the path after ``/v2/repository/``.
        body: the request's body.
        registry: the models.
        loading: what the operator allows; None for nothing.

    Raises:
        ProtocolError: the body is not as the extension has it, or asks for what only the operator may say.
        ForbiddenError: models may not be loaded and unloaded.
        ModelNotServedError: there is no such model.
        ModelFailedError: the model could not be loaded.
    """
    parts = path.split("/")
    if parts == ["index"]:
        return triton.index(registry, ready=_asked(body).get("ready") is True)
    if len(parts) != 3 or parts[0] != "models" or parts[2] not in ("load", "unload"):
        return None
    name = parts[1]
    if loading is None:
        raise ForbiddenError(
            "this server loads and unloads no models when a client asks; it does where it is started with --allow-load"
        )
    parameters = _asked(body).get("parameters") or {}
    if name not in loading.names:
        raise ModelNotServedError(
            f"model {short(name)} is none of those that this server was started with: {short(list(loading.names), 300)}"
        )
    if parts[2] == "unload":
        async with loading.turn:
            await asyncio.to_thread(registry.unload, name)
            await asyncio.to_thread(loading.settle)
        return {}
    if not isinstance(parameters, dict) or parameters:
        raise ProtocolError(
            f"a model is loaded as the server was started with it, so no parameters are taken; got "
            f"{short(list(parameters), 200)}"
        )
    async with loading.turn:
        try:
            await asyncio.to_thread(loading.load, name)
        except TorchSurgeonError as error:
            raise ModelFailedError(f"model {short(name)} could not be loaded: {error}") from error
    return {}


def _asked(body: memoryview) -> dict[str, Any]:
    try:
        asked = json.loads(bytes(body)) if len(body) else {}
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body must be empty or a JSON object; {short(error)}") from None
    if not isinstance(asked, dict):
        raise ProtocolError(f"the body must be empty or a JSON object; got {short(asked, 100)}")
    return asked
