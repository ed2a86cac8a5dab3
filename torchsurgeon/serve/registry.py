"""The models a server holds, the tails cut from them on the spot, and the threads that run them."""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import nn

from torchsurgeon.errors import (
    ModelNotReadyError,
    ModelNotServedError,
    SpecError,
    TorchSurgeonError,
)
from torchsurgeon.models import specs
from torchsurgeon.module import SplitModule
from torchsurgeon.serve.served import Profiler, ServedModel, profile_here
from torchsurgeon.tracing.call import call_of
from torchsurgeon.tracing.tracer import trace

State = Literal["loading", "ready", "failed"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ModelRegistry:
    """Models by name. Thread-safe.

    ``profiler`` turns a graph into the JSON that ``…/profile`` answers with, which ``partition="auto"`` asks for. It is
    called at the first request, by default :func:`profile_here`; with None there is no such answer.
    """

    def __init__(self, *, max_batch: int = 64, max_tails: int = 64, profiler: Profiler | None = profile_here) -> None:
        self.max_batch = max_batch
        self.max_tails = max_tails
        self._profiler = profiler
        self._models: dict[str, ServedModel | State] = {}
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def announce(self, name: str) -> None:
        """Say that a model will be loaded; until then it answers "not ready". Raises SpecError for an unusable name."""
        if not _NAME.fullmatch(name):
            raise SpecError(f"{name!r} cannot be a model's name; use letters, digits, '.', '_' and '-'")
        with self._lock:
            if isinstance(self._models.get(name), ServedModel):
                raise SpecError(f"a model named {name!r} is already served; choose another name")
            self._models[name] = "loading"

    def add(
        self,
        name: str,
        model: nn.Module,
        example: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        leaf_modules: Collection[str | type[nn.Module]] = (),
        source: str = "",
    ) -> ServedModel:
        """Trace ``model`` with the example and serve it. Raises TraceError or SpecError.

        ``example`` and ``leaf_modules`` are what :class:`~torchsurgeon.module.SplitModule` is given on the device: a
        tensor, a tuple of positional arguments or a dict of keyword ones, to which ``kwargs`` are added.
        Of a :class:`~torchsurgeon.module.SplitModule`, which needs no example, this server runs the layers up to its
        cut, and has its server do the rest.
        """
        self.announce(name)
        try:
            remote = model if isinstance(model, SplitModule) else None
            args, named = call_of(example)
            named = {**named, **(kwargs or {})}
            graph = trace(model, *args, leaf_modules=leaf_modules, **named) if remote is None else remote.graph
            served = ServedModel(
                name,
                graph,
                max_batch=self.max_batch,
                max_tails=self.max_tails,
                profiler=self._profiler,
                source=source,
                finish=None if remote is None else remote.finish,
            )
        except TorchSurgeonError as error:
            self._fail(name, error)
            raise
        with self._lock:
            self._models[name] = served
        return served

    def load(
        self, name: str, spec: str, *, leaf_modules: Collection[str | type[nn.Module]] = (), **options: Any
    ) -> ServedModel:
        """Load a SPEC (options as :func:`torchsurgeon.models.load`) and serve it. Raises SpecError or TraceError."""
        self.announce(name)
        try:
            loaded = specs.load(spec, **options)
        except TorchSurgeonError as error:
            self._fail(name, error)
            raise
        return self.add(name, loaded.model, loaded.args, loaded.kwargs, leaf_modules=leaf_modules, source=loaded.source)

    def names(self) -> list[str]:
        return sorted(self._models)

    def ready(self) -> bool:
        """True when every announced model is loaded."""
        return all(isinstance(model, ServedModel) for model in list(self._models.values()))

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """The model. Raises ModelNotServedError or ModelNotReadyError."""
        model = self._models.get(name)
        if model is None:
            near = difflib.get_close_matches(name, self._models, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; served are {', '.join(self.names()) or 'none'}"
            raise ModelNotServedError(f"model {name!r} is not served{hint}")
        if model == "failed":
            raise ModelNotReadyError(f"model {name!r} could not be loaded: {self._reasons.get(name, '')}")
        if not isinstance(model, ServedModel):
            raise ModelNotReadyError(f"model {name!r} is still loading; try again")
        if version is not None and version not in model.versions:
            raise ModelNotServedError(f"model {name!r} has no version {version!r}; it has {', '.join(model.versions)}")
        return model

    def close(self) -> None:
        """End the models' threads."""
        with self._lock:
            models, self._models = list(self._models.values()), {}
        for model in models:
            if isinstance(model, ServedModel):
                model.close()

    def _fail(self, name: str, error: Exception) -> None:
        with self._lock:
            self._models[name] = "failed"
            self._reasons[name] = str(error)
