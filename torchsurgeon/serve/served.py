"""One served model: what it is, what it tells devices, and what answers its requests."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from torchsurgeon import wire
from torchsurgeon.backends import Backend
from torchsurgeon.codec import FittedCodec, codec_names
from torchsurgeon.errors import ModelNotServedError, NoisyProfileWarning
from torchsurgeon.models.arithmetic import ArithmeticReader
from torchsurgeon.profiling import profile
from torchsurgeon.serve.admission import MAX_QUEUE
from torchsurgeon.serve.answers import VERSION, Answers, Finish
from torchsurgeon.serve.backends import TailBackends
from torchsurgeon.serve.checks import tensor_metadata
from torchsurgeon.serve.edition import Editions
from torchsurgeon.serve.fitted import FittedCodecs
from torchsurgeon.serve.intake import Intake
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.statistics import Statistics
from torchsurgeon.serve.tails import Tails
from torchsurgeon.serve.worker import Worker
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import TensorSpec

_log = logging.getLogger(__name__)

Profiler = Callable[[LayerGraph], dict[str, Any]]
"""Returns the JSON of a graph's layer profile."""

# JSON is for trying things out, and is kept small: Python parses and writes a message as a whole, during which no other
# thread of the process runs, and takes many times its bytes for that. A message has at most so many numbers, or as many
# as one sample has.
JSON_NUMBERS = 1 << 17
# A number has up to 24 characters, and a comma, a space and brackets.
_NUMBER_BYTES = 32
# It takes no more than eight times the bytes of its value ("255, " for a uint8).
_JSON_FACTOR = 8


def measured_profile(graph: LayerGraph) -> dict[str, Any]:
    """Measure the layers of a graph on this machine, without joules, and return the profile's JSON."""

    def tell(noise: NoisyProfileWarning) -> None:
        # Nobody started this measurement here: a device has asked for it.
        _log.warning(
            "the layer times of %s that a device asked for are rough: %s; its calls correct them",
            type(graph.model).__name__,
            noise.finding,
        )

    return profile(graph, meter=None, on_noise=tell).to_json()


class ServedModel:
    """A loaded model, with its tails and the threads that run its requests.

    Args:
        name: the name that it is served under.
        graph: the traced model.
        max_batch: the largest batch of a request. It also limits how much larger than the example other sizes are.
        max_tails: how many tails to keep.
        profiler: returns the JSON of the graph's layer profile; None for no profile.
        source: where the model comes from, in words.
        finish: computes the output in place of a tail of the graph, where another server runs the rest of the model.
        same_bits: whether ``finish`` gives the bits that this server would compute. If not, it does not tell devices
            what it computes with.
        backends: what may run tails besides eager PyTorch, this server's own choice first; none for eager PyTorch.
        concurrency: how many requests run at once. More than one asks for a model that ``serve.concurrency`` has found
            fit for it.
        together: how many samples of requests that wait may be joined and run as one; more than one asks for a model
            that ``serve.independence`` has found fit for it.
        max_queue: how many requests may wait.
        rounded: whether such answers may be the same to rounding only, which devices are told.

    Attributes:
        versions: the versions that are served.
        max_tensor_bytes: the most bytes that the tensors of a request have together.
        max_times: the most times the example's bytes that one tensor has.
        answers: answers the requests.
        open: whether requests are accepted.
        backends: what runs the tails.
        together: how many samples of requests that wait are joined at most.
    """

    versions = (VERSION,)

    def __init__(
        self,
        name: str,
        graph: LayerGraph,
        *,
        max_batch: int = 64,
        max_tails: int = 64,
        profiler: Profiler | None = None,
        source: str = "",
        finish: Finish | None = None,
        same_bits: bool = True,
        backends: Sequence[Backend] = (),
        concurrency: int = 1,
        together: int = 1,
        max_queue: int = MAX_QUEUE,
        rounded: bool = False,
    ) -> None:
        self.name = name
        self.graph = graph
        self.source = source
        self.max_batch = max_batch if graph.batch_free else graph.batch
        # An image may be larger than the example, or a sequence longer, by the same factor as a batch.
        self.max_tensor_bytes = max_batch * max(point.size_bytes for point in graph.points) // graph.batch
        self.max_times = max_batch / graph.batch
        self._max_json_inputs = max(JSON_NUMBERS, _numbers_in(graph, graph.inputs))
        self.together = min(together, self.max_batch)
        self.open = True
        self.backends = TailBackends(name, graph, backends, max_tails)
        batched = {"batching": f"up to {self.together} samples"} if rounded and self.together > 1 else {}
        self._finish = finish
        self._profiler = profiler
        self._profile: dict[str, Any] | None = None
        # By backend, what measures now or has measured.
        self._profiling: dict[str | None, Future[dict[str, Any]]] = {}
        self._asking = threading.Lock()
        self._editions = Editions(name, graph, max_tails)
        self._arithmetic = {
            backend: ArithmeticReader(graph.model, {**batched, "backend": backend} if changes else batched)
            for backend, changes in self.backends.changing().items()
            if same_bits
        }
        self._fitted = FittedCodecs(name, graph)
        self.answers = Answers(
            name,
            graph,
            self._editions,
            self.backends,
            self._fitted,
            self._arithmetic,
            finish,
            max_batch=self.max_batch,
            max_tensor_bytes=self.max_tensor_bytes,
            max_times=self.max_times,
            max_json_inputs=self._max_json_inputs,
            max_json_outputs=max(JSON_NUMBERS, _numbers_in(graph, graph.outputs)),
            concurrency=concurrency,
            together=self.together,
            max_queue=max_queue,
        )

    @property
    def intake(self) -> Intake:
        """What hands requests to the threads that run them."""
        return self.answers.intake

    @property
    def statistics(self) -> Statistics:
        """What requests have taken."""
        return self.answers.statistics

    @property
    def worker(self) -> Worker:
        """The threads that run the requests."""
        return self.intake.worker

    @property
    def tails(self) -> Tails:
        """The tails that are kept now."""
        return self._editions.present.tails

    def max_body_bytes(self, *, binary: bool) -> int:
        """Return the size of the largest request: the widest boundary at the largest batch, and a header.

        Args:
            binary: whether tensors are sent as bytes. As JSON numbers they have at most 4 MiB, or as much as one sample
                of the model's own inputs takes.
        """
        if binary:
            return self.max_tensor_bytes + wire.MAX_HEADER_BYTES
        most_bytes = self.max_tensor_bytes * _JSON_FACTOR + wire.MAX_HEADER_BYTES
        return min(most_bytes, self._max_json_inputs * _NUMBER_BYTES)

    def metadata(self) -> dict[str, Any]:
        """Return the protocol's model metadata: inputs and outputs with a batch dimension of -1, and all codecs."""
        return {
            "name": self.name,
            "versions": list(self.versions),
            "platform": "torchsurgeon",
            "inputs": [tensor_metadata(spec) for spec in self.graph.inputs],
            "outputs": [tensor_metadata(spec) for spec in self.graph.outputs],
            "parameters": {"codecs": [*codec_names(), *self._fitted.digests(self._editions.present.known_weights)]},
        }

    def add_codec(self, path: str | Path) -> FittedCodec:
        """Load the file of a codec that was fitted to this model, and decode what devices encode with it.

        Args:
            path: the file.

        Raises:
            CodecError: the file cannot be read, is damaged, or is of another version, graph, cut or weights.
            NativeUnavailableError: the compiled extension is missing.
        """
        return self._fitted.add(path)

    def fingerprint(self) -> dict[str, Any]:
        """Return the digests of graph, layers and weights, and what the server computes with now.

        Raises:
            ModelNotReadyError: the weights are being changed.
        """
        known = {**self._editions.fingerprint(), "backends": self.backends.told()}
        if self._fitted:
            known = {**known, "fitted_codecs": self._fitted.digests(known["weights"])}
        if not self._arithmetic:
            return known
        # The calling thread reads it, but it is the worker's settings that count.
        self.worker.follow()
        self.worker.settings.adopt()
        # The weights may lie in memory otherwise than before.
        for reader in self._arithmetic.values():
            reader.forget()
        return {**known, "arithmetic": dict(self._arithmetic[self.backends.own].now().facts)}

    def profile(self, backend: str | None = None) -> Future[dict[str, Any]]:
        """Return the future of the layer profile. One measurement, during which no request runs, serves all who ask.

        Args:
            backend: by which backend; None for eager PyTorch.

        Raises:
            ModelNotServedError: the server has no profiler. The future may raise it too.
            ProtocolError: the model is not served by this backend.
            ModelNotReadyError: what it takes by this backend is being measured, in the background. The future may raise
                it too.
            ClosedError: the model is served no more.
        """
        # By the name of the backend that is measured, of which there are few, whatever clients write.
        key = None if backend is None else self.backends.chosen(backend)
        profile = functools.partial(self.backends.profile, key, self._eager_profile)
        with self._asking:
            builder = None if key is None else self.backends.builders.get(key)
            # What is being measured in the background is refused until it is there.
            known = self._profile is not None if builder is None else builder.profile is not None or builder.measuring
            if known or self._profiler is None:
                # Nothing is measured, so no thread is waited for.
                future: Future[dict[str, Any]] = Future()
                future.set_result(profile())
                return future
            asked = self._profiling.get(key)
            if asked is None or asked.done():
                asked = self._profiling[key] = self.worker.submit_alone(profile)
            return asked

    def _eager_profile(self) -> dict[str, Any]:
        if self._profiler is None:
            raise ModelNotServedError(
                f"this server does not profile model {self.name!r}, because its ModelRegistry has profiler=None. Leave "
                'that out at the server, or give SplitModule a server_profile or a partition other than "auto"'
            )
        if self._profile is None:
            with torch.no_grad():
                self._profile = self._profiler(self.graph)
        return self._profile

    def quick(self, alike: bytes | int) -> bool:
        """Return whether a request is so quick that the worker's thread is not worth switching to.

        Args:
            alike: what the request has in common with earlier ones, which say how long it takes.
        """
        return self._finish is None and self.intake.quick(alike)

    def brief(self, alike: bytes | int) -> bool:
        """Return whether the worker's thread is not worth switching to for a request whose client is alone."""
        return self._finish is None and self.intake.brief(alike)

    def answer(self, request: Received) -> wire.Encoded:
        """Answer one request, as ``Answers.answer()`` does."""
        return self.answers.answer(request)

    def close(self) -> None:
        """Accept no more requests, and end the threads after those that are queued."""
        self.open = False
        self.worker.close()
        self.backends.close()
        self._editions.close()


def _numbers_in(graph: LayerGraph, specs: Sequence[TensorSpec]) -> int:
    """Return how many numbers tensors have together, of one sample where the model takes other batches."""
    shapes = (spec.at_batch(1) if graph.batch_free else spec.shape for spec in specs)
    return sum(map(math.prod, shapes))
