"""The models that a server holds, by name."""

from __future__ import annotations

import difflib
import functools
import logging
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from torch import Tensor, nn

from torchsurgeon import wire
from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends import Backend, find_backends
from torchsurgeon.backends.eager import Eager
from torchsurgeon.errors import (
    BackendError,
    ModelNotReadyError,
    ModelNotServedError,
    SpecError,
    TorchSurgeonError,
    TraceError,
    short,
)
from torchsurgeon.models import specs
from torchsurgeon.module import SplitModule
from torchsurgeon.serve.admission import MAX_QUEUE
from torchsurgeon.serve.batching import Batching
from torchsurgeon.serve.concurrency import default_concurrency, why_in_turn
from torchsurgeon.serve.independence import MOST_EXACT, most_exact, why_alone
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.served import Profiler, ServedModel, measured_profile
from torchsurgeon.serve.worker import ClosedError
from torchsurgeon.tracing.call import call_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.tracer import trace

LoadingState = Literal["loading", "reloading", "failed", "unloaded"]
"""What a model is that cannot be asked: "reloading" and "unloaded" only where a client has had it unloaded."""

_NOT_OURS = "another server or a backend runs its parts, and not PyTorch here"
_log = logging.getLogger(__name__)
_RESERVED = ("stats",)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ModelRegistry:
    """The models that a server holds, by name. Thread-safe.

    Args:
        max_batch: the largest batch of a request. It also limits how much larger than the example other sizes are.
        max_tails: how many tails to keep for each model.
        concurrency: how many requests of a model run at once; by default so many that their threads together use each
            core once. A model that must run them one after the other does so whatever this says.
        max_queue: how many requests of a model may wait; another one is refused with 503.
        batching: whether requests that wait are joined and run as one: ``"off"``, ``"exact"`` (only as far as answers
            keep the bits that they have alone, which is found out when a model is added), or ``"rounded"`` (also where
            they are the same to rounding only, which devices are told).
        profiler: returns the JSON of a graph's layer profile, for which devices with ``partition="auto"`` ask. It is
            called at the first request for it. By default it measures the layers; with None there is no profile.
    """

    def __init__(
        self,
        *,
        max_batch: int = 64,
        max_tails: int = 64,
        concurrency: int | None = None,
        max_queue: int = MAX_QUEUE,
        batching: Batching = "off",
        profiler: Profiler | None = measured_profile,
    ) -> None:
        self.max_batch = max_batch
        self.max_tails = max_tails
        self.concurrency = concurrency
        self.max_queue = max_queue
        self.batching = batching
        self._profiler = profiler
        self._models: dict[str, ServedModel | LoadingState] = {}
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def announce(self, name: str, *, replace: bool = False) -> None:
        """Announce a model that will be loaded. Until it is, requests for it are answered with "not ready".

        Args:
            name: the model's name.
            replace: whether it may take the place of a model that is served, which goes on until then.

        Raises:
            SpecError: the name is not valid, or is taken.
        """
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"a model's name must consist of letters, digits, '.', '_' and '-', and begin with a letter or digit; "
                f"got {short(name)}"
            )
        if name in _RESERVED:
            raise SpecError(
                f"a model must not be named {name!r}, since GET /v2/models/{name} asks for all; choose another"
            )
        with self._lock:
            known = self._models.get(name)
            if not isinstance(known, ServedModel):
                self._models[name] = "loading" if known in (None, "loading", "failed") else "reloading"
            elif not replace:
                raise SpecError(f"a model named {short(name)} is already served; choose another name")

    def add(
        self,
        name: str,
        model: nn.Module,
        example: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        leaf_modules: Collection[str | type[nn.Module]] = (),
        verify: bool = True,
        source: str = "",
        backend: str | Backend | Sequence[str | Backend] | None = None,
        replace: bool = False,
        prepare: Callable[[ServedModel], object] | None = None,
    ) -> ServedModel:
        """Trace a model and serve it.

        Args:
            name: the name to serve it under.
            model: the model. Of a ``SplitModule``, which needs no example, this server runs the layers up to its cut,
                and the SplitModule's own server runs the rest.
            example: an example of a call, as ``SplitModule`` takes it on the device: a tensor, a tuple of positional
                arguments, or a dict of keyword arguments.
            kwargs: further keyword arguments of the example.
            leaf_modules: modules to keep whole, as the device names them too.
            verify: whether to run the model and what was traced, and compare, as ``trace()`` does.
            source: where the model comes from, in words.
            backend: what runs its tails in place of eager PyTorch: a ``torchsurgeon.backends.Backend`` or its name. Of
                several, a text with commas or a sequence, the first is the server's own choice, and devices may ask for
                the others; for eager PyTorch they always may. A tail runs in eager PyTorch until the backend has built
                it in the background.
            replace: whether it takes the place of a model of this name that is served. That one is served until this
                one is ready, and stays if this one fails.
            prepare: called with the model before any request reaches it, such as to add its codecs. If it raises, the
                model is not served.

        Raises:
            SpecError: the name is not valid, or is taken.
            TraceError: the model could not be traced.
            BackendError: there is no such backend here, or one is given for a ``SplitModule``.
        """
        self.announce(name, replace=replace)
        try:
            remote = model if isinstance(model, SplitModule) else None
            if remote is not None and backend is not None:
                raise BackendError(
                    f"model {short(name)} is a SplitModule, whose parts run as it was made; give backend= to it"
                )
            runs = find_backends(backend)
            args, named = call_of(example)
            named = {**named, **(kwargs or {})}
            graph = (
                trace(model, *args, leaf_modules=leaf_modules, verify=verify, **named)
                if remote is None
                else remote.graph
            )
            # What may not be run here is not run to find out how it could be served faster.
            tensors = graph.tensors_of_call(args, named) if remote is None and verify else None
            ours = remote is None and all(isinstance(one, Eager) for one in runs)
            why = why_in_turn(graph, tensors) if ours else _NOT_OURS
            together, rounded = self._together(name, graph, tensors if ours else None)
            served = ServedModel(
                name,
                graph,
                max_batch=self.max_batch,
                max_tails=self.max_tails,
                profiler=self._profiler,
                source=source,
                finish=None if remote is None else functools.partial(_finish, remote, graph),
                same_bits=remote is None or remote.exact,
                backends=runs,
                concurrency=1 if why is not None else self.concurrency or default_concurrency(),
                together=together,
                max_queue=self.max_queue,
                rounded=rounded,
            )
            try:
                if prepare is not None:
                    prepare(served)
            except BaseException:
                served.close()
                raise
        except Exception as error:
            self._fail(name, error)
            raise
        if why is not None:
            _log.info("requests of model %s run one after the other: %s", name, why)
        with self._lock:
            before, self._models[name] = self._models.get(name), served
        if isinstance(before, ServedModel):
            before.close()
        return served

    def _together(self, name: str, graph: LayerGraph, tensors: Sequence[Tensor] | None) -> tuple[int, bool]:
        """Return how many samples may be run together, and whether answers may then be the same to rounding only."""
        if self.batching == "off" or tensors is None:
            return 1, False
        try:
            why = why_alone(graph, tensors)
            exact = 1 if why is not None else most_exact(graph, tensors)
        except Exception as error:
            if by_signal_handler(error):
                raise
            why = f"it does not take other values than its example's: {type(error).__name__}: {short(error)}"
        if why is not None:
            _log.info("requests of model %s are not joined to batches: %s", name, why)
            return 1, False
        if self.batching == "exact" or exact == MOST_EXACT:
            return exact, False
        return self.max_batch, True

    def load(
        self,
        name: str,
        spec: str,
        *,
        leaf_modules: Collection[str | type[nn.Module]] = (),
        verify: bool = True,
        backend: str | Backend | Sequence[str | Backend] | None = None,
        replace: bool = False,
        prepare: Callable[[ServedModel], object] | None = None,
        **options: Any,
    ) -> ServedModel:
        """Load a model by its SPEC and serve it.

        Args:
            name: the name to serve it under.
            spec: the SPEC, such as ``torchvision:resnet18``.
            leaf_modules: modules to keep whole, as the device names them too.
            verify: whether to run the model and what was traced, and compare, as ``trace()`` does.
            backend: what runs its tails, as in ``add()``.
            replace: whether it takes the place of a model of this name that is served, as in ``add()``.
            prepare: called with the model before any request reaches it, as in ``add()``.
            **options: passed on to ``torchsurgeon.models.specs.load()``.

        Raises:
            SpecError: the name is not valid or is taken, or the SPEC could not be loaded.
            TraceError: the model could not be traced.
        """
        self.announce(name, replace=replace)
        try:
            loaded = specs.load(spec, **options)
        except Exception as error:
            self._fail(name, error)
            raise
        return self.add(
            name,
            loaded.model,
            loaded.args,
            loaded.kwargs,
            leaf_modules=leaf_modules,
            verify=verify,
            source=loaded.source,
            backend=backend,
            replace=replace,
            prepare=prepare,
        )

    def submit(self, model: ServedModel, request: Received, *, quick: bool = False) -> Future[wire.Encoded]:
        """Have a model answer a request; where another has been loaded in its place since, have that one answer it.

        Args:
            model: the model that ``get()`` has returned.
            request: the request.
            quick: whether it is expected to be quick.

        Raises:
            BusyError: too many requests wait, or this one would be answered after its deadline.
            ModelNotReadyError: the model has been unloaded.
            ModelNotServedError: the registry has been closed.
        """
        try:
            return model.intake.submit(request, quick=quick)
        except ClosedError:
            return self.get(model.name).intake.submit(request, quick=quick)

    def unload(self, name: str) -> None:
        """Serve a model no more, until it is loaded again. What it has taken is answered.

        Raises:
            ModelNotServedError: there is no such model.
            ModelNotReadyError: it is still loading, or could not be loaded.
        """
        served = self.get(name)
        with self._lock:
            if self._models.get(name) is served:
                self._models[name], self._reasons[name] = "unloaded", "a client asked for it"
        served.close()

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self._models)

    def loaded(self) -> dict[str, ServedModel | None]:
        """Return the models by name; None for one that is still loading, or could not be loaded."""
        models = list(self._models.items())
        return {name: model if isinstance(model, ServedModel) else None for name, model in models}

    def states(self) -> dict[str, tuple[ServedModel | LoadingState, str]]:
        """Return by name each model, or why there is none: the state, and the reason where there is one."""
        models = list(self._models.items())
        return {
            name: (model, "" if isinstance(model, ServedModel) else self._reasons.get(name, ""))
            for name, model in models
        }

    def ready(self) -> bool:
        """Return whether every announced model is loaded. One that a client has had unloaded does not count."""
        return all(model not in ("loading", "failed") for model in list(self._models.values()))

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """Return a model.

        Args:
            name: the model's name.
            version: the model's version; any by default.

        Raises:
            ModelNotServedError: there is no such model or version.
            ModelNotReadyError: the model is still loading, or could not be loaded.
        """
        model = self._models.get(name)
        if model is None:
            near = difflib.get_close_matches(name, self._models, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; served are {', '.join(self.names())[:300] or 'none'}"
            raise ModelNotServedError(f"model {short(name)} is not served{hint}")
        if model == "failed":
            raise ModelNotReadyError(f"model {short(name)} could not be loaded: {self._reasons.get(name, '')}")
        if model == "unloaded":
            raise ModelNotReadyError(f"model {short(name)} is not loaded: {self._reasons.get(name, '')}")
        if not isinstance(model, ServedModel):
            raise ModelNotReadyError(f"model {short(name)} is still loading; try again")
        if version is not None and version not in model.versions:
            raise ModelNotServedError(
                f"model {short(name)} has no version {short(version)}; it has {', '.join(model.versions)}"
            )
        return model

    def close(self) -> None:
        """End the models' threads, and serve none of them any more."""
        with self._lock:
            models, self._models = list(self._models.values()), {}
        for model in models:
            if isinstance(model, ServedModel):
                model.close()

    def _fail(self, name: str, error: Exception) -> None:
        with self._lock:
            known = self._models.get(name)
            if not isinstance(known, ServedModel):
                self._models[name] = "unloaded" if known == "reloading" else "failed"
                # Clients are told the reason. What an unexpected error says is for the operator's log only.
                is_expected = isinstance(error, TorchSurgeonError)
                self._reasons[name] = (
                    str(error) if is_expected else f"{type(error).__name__}; the server's log says more"
                )


def _finish(remote: SplitModule, graph: LayerGraph, names: tuple[str, ...], *tensors: Tensor) -> Sequence[Tensor]:
    """Have a SplitModule finish an inference, unless it runs another graph now than the one that is served."""
    if remote.graph is not graph:
        raise TraceError(
            "the SplitModule that is served here has been given another model, or has traced its own anew, since it "
            "was added; add it to a new ModelRegistry"
        )
    return remote.finish(names, *tensors)
