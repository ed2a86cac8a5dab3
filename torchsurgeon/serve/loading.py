"""Loading the models that a server was started with, one after the other, while it answers for those that are ready."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from torchsurgeon._allocator import give_freed_memory_back
from torchsurgeon.backends import Backend
from torchsurgeon.codec import FittedCodec
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.served import ServedModel

# By then, threads have answered what was queued for a model that is gone, and idle connections on which it was asked
# last are closed (``server._KEEP_ALIVE_S``).
_LET_GO_S = 90.0


class ModelLoader:
    """Loads models by their SPECs into a registry.

    Args:
        registry: where the models go.
        models: the SPEC of each model by its name.
        weights: weights files by model name.
        input_specs: inputs by model name.
        leaf_modules: modules to keep whole by model name.
        codecs: files of fitted codecs by model name.
        backends: what runs the tails by model name.
        verify: whether to run each model and what was traced, and compare.
        seed: seed of random weights.
        report: called with lines about what was loaded.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        models: Mapping[str, str],
        *,
        weights: Mapping[str, str] | None,
        input_specs: Mapping[str, str] | None,
        leaf_modules: Mapping[str, Collection[str]] | None,
        codecs: Mapping[str, Collection[str]] | None,
        backends: Mapping[str, str | Backend | Sequence[str | Backend]] | None,
        verify: bool,
        seed: int,
        report: Callable[[str], None],
    ) -> None:
        self._registry, self._models = registry, models
        self._weights, self._input_specs, self._leaf_modules = weights or {}, input_specs or {}, leaf_modules or {}
        self._codecs, self._backends = codecs or {}, backends or {}
        self._verify, self._seed, self._report = verify, seed, report
        # One model at a time: a client may ask for one while the server starts, and random weights come from a
        # generator that all threads share.
        self._turn = threading.Lock()

    def load_all(self) -> None:
        """Load all models, and leave them out of garbage collection. One that a client has had loaded already stays.

        Raises:
            SpecError: a SPEC could not be loaded.
            TraceError: a model could not be traced.
            CodecError: a codec's file is damaged, or is not of its model.
        """
        for name in self._models:
            with self._turn:
                state, _ = self._registry.states().get(name, ("loading", ""))
                if state in ("loading", "failed"):
                    self._load(name)
        settle()

    def load_again(self, name: str) -> None:
        """Load a model anew, in place of the one that is served under its name. It raises what ``load_all()`` does."""
        with self._turn:
            self._load(name, replace=True)
        settle_twice()

    def _load(self, name: str, replace: bool = False) -> None:
        started_s = time.perf_counter()
        fitted: list[tuple[FittedCodec, str]] = []

        def add_codecs(served: ServedModel) -> None:
            fitted.extend((served.add_codec(path), path) for path in self._codecs.get(name, ()))

        served = self._registry.load(
            name,
            self._models[name],
            weights=self._weights.get(name),
            input_spec=self._input_specs.get(name),
            leaf_modules=self._leaf_modules.get(name, ()),
            verify=self._verify,
            backend=self._backends.get(name),
            replace=replace,
            # Before it is served: where a codec is not of these weights, the model that is served stays, with its own.
            prepare=add_codecs,
            seed=self._seed,
        )
        self._report(
            f"loaded {name} from {served.source} in {time.perf_counter() - started_s:.1f} s: "
            f"{len(served.graph.layers)} layers, {len(served.graph.points)} partition points"
        )
        for codec, path in fitted:
            self._report(f"loaded {codec.name}, fitted to {name} after {codec.point[1]}, from {path}")


def settle() -> None:
    """Leave what is loaded out of garbage collection, which would walk through it during requests.

    What was left out before, and is no longer needed, is collected now, and its memory is given back to the system.
    Loading compares what all layers give for several batches, and glibc would keep the memory of that for good.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_freed_memory_back()


def settle_twice() -> None:
    """Settle now, and once more when nothing refers any more to a model that is gone.

    A thread that ends, or an idle connection, may still refer to it now. It would then be left out of garbage
    collection with the rest, and its memory would stay taken until a client has another model loaded or unloaded.
    """
    settle()
    later = threading.Timer(_LET_GO_S, settle)
    later.daemon = True
    later.start()
