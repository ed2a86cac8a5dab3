"""One served model: its tails, which are cut when they are first asked for, and how a request is run on them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.backends import Backend
from torchsurgeon.codec import FittedCodec, codec_names
from torchsurgeon.cutting.partition import check_shapes
from torchsurgeon.errors import (
    ModelFailedError,
    ModelNotServedError,
    ProtocolError,
    short,
)
from torchsurgeon.models.arithmetic import ArithmeticReader
from torchsurgeon.profiling import profile
from torchsurgeon.serve.admission import MAX_QUEUE
from torchsurgeon.serve.backends import TailBackends
from torchsurgeon.serve.batching import Seam
from torchsurgeon.serve.checks import check_tensors, tensor_metadata, value_check
from torchsurgeon.serve.edition import Edition, Editions
from torchsurgeon.serve.fitted import FittedCodecs
from torchsurgeon.serve.intake import Intake
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.tails import RequestPlan, Tails, place_of, run_at
from torchsurgeon.serve.worker import Worker
from torchsurgeon.tracing.graph import LayerGraph

Finish = Callable[..., Sequence[Tensor]]
"""Called with the sorted names of the boundary tensors and with the tensors; returns the model's output tensors."""
Profiler = Callable[[LayerGraph], dict[str, Any]]
"""Returns the JSON of a graph's layer profile."""

# JSON numbers take up to eight times the bytes of the value that they stand for ("255, " for a uint8).
JSON_FACTOR = 8
# The server's times in the parameters of an answer, which begin before them: seconds, to the microsecond.
_TIMES = '"receive_s":%.6f,"queue_s":%.6f,"decode_s":%.6f,"compute_s":%.6f}'


def measured_profile(graph: LayerGraph) -> dict[str, Any]:
    """Measure the layers of a graph on this machine, without joules, and return the profile's JSON."""
    return profile(graph, meter=None).to_json()


class _Ready(NamedTuple):
    """A request that has been decoded and checked."""

    request: Received
    edition: Edition
    decoded: wire.InferRequest
    plan: RequestPlan
    given: list[Tensor]
    started_s: float
    decoded_s: float


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
        intake: hands requests to the threads that run them.
        open: whether requests are accepted.
        backends: what runs the tails.
        together: how many samples of requests that wait are joined at most.
    """

    versions = ("1",)

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
        self._editions = Editions(name, graph, max_tails)
        self._finish = finish
        self._output_names = [spec.name for spec in graph.outputs]
        self.together = min(together, self.max_batch)
        self.intake = Intake(
            name,
            self.answer,
            self.answer_together,
            concurrency=concurrency,
            together=self.together,
            max_queue=max_queue,
        )
        self.open = True
        self._profiler = profiler
        self.backends = TailBackends(name, graph, backends, max_tails)
        by_backend = {} if self.backends.keeps_bits else {"backend": self.backends.own}
        batched = {"batching": f"up to {self.together} samples"} if rounded and self.together > 1 else {}
        self._arithmetic = ArithmeticReader(graph.model, {**batched, **by_backend}) if same_bits else None
        self._profile: dict[str, Any] | None = None
        self._fitted = FittedCodecs(name, graph)

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
            binary: whether tensors are sent as bytes; as JSON numbers they take more.
        """
        return self.max_tensor_bytes * (1 if binary else JSON_FACTOR) + wire.MAX_HEADER_BYTES

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
        if self._arithmetic is None:
            return known
        # The calling thread reads it, but it is the worker's settings that count.
        self.worker.follow()
        self.worker.settings.adopt()
        # The weights may lie in memory otherwise than before.
        self._arithmetic.forget()
        return {**known, "arithmetic": dict(self._arithmetic.now().facts)}

    def profile(self, backend: str | None = None) -> dict[str, Any]:
        """Return the layer profile, measured at the first call. To be called in one of the worker's threads, alone.

        Args:
            backend: by which backend; None for eager PyTorch.

        Raises:
            ModelNotServedError: the server has no profiler.
            ProtocolError: the model is not served by this backend.
            ModelNotReadyError: what it takes by this backend is being measured, in the background.
        """
        return self.backends.profile(backend, self._eager_profile)

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

    def quick(self, body_bytes: int) -> bool:
        """Return whether a request is so quick that the worker's thread is not worth switching to.

        Args:
            body_bytes: length of the request's body. Earlier requests of this length, which most likely had the same
                cut, say how long this one takes.
        """
        return self._finish is None and self.intake.quick(body_bytes)

    def answer(self, request: Received) -> wire.Encoded:
        """Decode one request, run the tail, and encode the answer. To be called by the worker.

        Args:
            request: the request.

        Raises:
            ProtocolError: the body is no valid request, or its tensors do not fit the model.
            PartitionError: its tensors do not determine the model's output.
            ModelNotReadyError: the model is in training mode.
            ModelFailedError: the model raised an error.
        """
        started_s = time.perf_counter()
        ready = self._ready(request, started_s)
        results = self._run(ready.plan, ready.given, request.over if request.queued else None)
        if results is None:
            request.check()
        assert results is not None
        answer = self._encoded(ready, results, ready.decoded_s, time.perf_counter())
        # One that is refused, or whose client has left, ends sooner, and says nothing of how long answers take.
        self.intake.took(request, time.perf_counter() - started_s)
        return answer

    def answer_together(self, requests: Sequence[Received]) -> list[wire.Encoded | Exception]:
        """Answer requests of one kind, and run the tail once for all of them. To be called by the worker.

        Each gets the answer, or the error, that it would have got alone. Where they cannot be joined after all, or the
        model fails for all of them, each runs alone.
        """
        started_s = time.perf_counter()
        ready: list[_Ready] = []
        for request in requests:
            try:
                ready.append(self._ready(request, started_s))
            except Exception:
                return [self._tried(one) for one in requests]
        plan = ready[0].plan
        joined = None
        if plan.seam is not None and all(one.plan is plan for one in ready):
            sizes = [plan.seam.size(one.given) for one in ready]
            joined = plan.seam.join([one.given for one in ready]) if sum(sizes) <= self.together else None
        if joined is None or plan.seam is None:
            return [self._tried(one) for one in requests]
        joined_s = time.perf_counter()
        try:
            results = self._run(plan, joined, lambda: all(request.over() for request in requests))
            if results is None:
                return [self._tried(one) for one in requests]
            parts = plan.seam.part(results, sizes)
            computed_s = time.perf_counter()
            encoded = [self._encoded(*pair, joined_s, computed_s) for pair in zip(ready, parts, strict=True)]
        except Exception:
            return [self._tried(one) for one in requests]
        self.intake.took(requests[0], time.perf_counter() - started_s, len(requests))
        return list(encoded)

    def _tried(self, request: Received) -> wire.Encoded | Exception:
        try:
            return self.answer(request)
        except Exception as error:
            return error

    def _ready(self, request: Received, started_s: float) -> _Ready:
        request.check()
        edition = self._editions.present
        decoded = wire.decode_request(
            request.body,
            request.header_bytes,
            max_decoded_bytes=self.max_tensor_bytes,
            check_codec=functools.partial(self._fitted.check, edition.known_weights),
        )
        self._editions.refuse_training()
        plan = edition.plans.get(decoded.recurring) or self._plan(edition, decoded)
        request.cut = plan.cut
        decoded_s = time.perf_counter()
        if plan.check is not None:
            plan.check(decoded.tensors)
        given = [decoded.tensors[name] for name in plan.names]
        return _Ready(request, edition, decoded, plan, given, started_s, decoded_s)

    def _run(
        self, plan: RequestPlan, tensors: Sequence[Tensor], over: Callable[[], bool] | None = None
    ) -> Sequence[Tensor] | None:
        """Return the model's output tensors; None where ``over()``, which is asked before each layer, has said so."""
        try:
            if over is not None and plan.until is not None:
                return plan.until(over, tensors)
            # The tail's forward, without the overhead of nn.Module's call: a tail has no hooks.
            return plan.run(*tensors)
        except Exception as error:
            raise ModelFailedError(f"model {self.name!r} failed: {type(error).__name__}: {short(error)}") from error

    def _encoded(self, ready: _Ready, results: Sequence[Tensor], begun_s: float, computed_s: float) -> wire.Encoded:
        """Return the answer, for results that were computed from ``begun_s`` to ``computed_s``."""
        request, plan, decoded = ready.request, ready.plan, ready.decoded
        outputs = dict(zip(self._output_names, results, strict=True))
        if plan.outputs is not None:
            outputs = {name: outputs[name] for name in plan.outputs}
        decode_s = ready.decoded_s - ready.started_s
        times_s = (request.receive_s, begun_s - decode_s - request.arrived_s, decode_s, computed_s - begun_s)
        return wire.encode_response(
            self.name,
            self.versions[0],
            outputs,
            as_json=plan.as_json,
            dim_order=decoded.dim_order,
            request_id=decoded.request_id,
            parameters=self._told(ready.edition) + _TIMES % times_s,
            codec=decoded.output_codec,
            crc32=decoded.crc32,
        )

    def _told(self, edition: Edition) -> str:
        """Return the beginning of the parameters of an answer that has been computed in this edition.

        Once a client has asked for the fingerprint, every answer names the model and what this thread computes with, so
        that a client which compared them notices when either changes.
        """
        identity = self._editions.identity(edition)
        if identity is None:
            return "{"
        arithmetic = "" if self._arithmetic is None else f'"arithmetic":"{self._arithmetic.now().digest}",'
        return f'{{"identity":"{identity}",{arithmetic}'

    def close(self) -> None:
        """Accept no more requests, and end the threads after those that are queued."""
        self.open = False
        self.worker.close()
        self.backends.close()
        self._editions.close()

    def _plan(self, edition: Edition, request: wire.InferRequest) -> RequestPlan:
        """Check everything about a request but its tensors' values; keep the result for requests with its header."""
        known = self._output_names
        for output in request.outputs:
            if output.name not in known:
                raise ProtocolError(
                    f"model {self.name!r} has no output {short(output.name)}; it has {', '.join(known)[:300]}"
                )
        usual = check_tensors(self.graph, request.tensors, self.max_batch, self.max_times)
        names = tuple(sorted(request.tensors))
        tail = edition.tails.get(names)
        if usual and set(names) >= {spec.name for spec in self.graph.inputs}:
            try:
                self.graph.check_sizes([request.tensors[spec.name] for spec in self.graph.inputs])
            except TypeError as error:
                raise ProtocolError(f"model {self.name!r}: {error}") from None
        if not usual:
            check_shapes(self.graph, tail, names, [request.tensors[name] for name in names])
        run = self.backends.run(request.parameters.get("backend"), names, tail)
        if self._finish is not None:
            run = functools.partial(self._finish, names)
        place = place_of(self.graph.model)
        if place.type != "cpu":
            run = functools.partial(run_at, place, run)
        if request.outputs:
            outputs: tuple[str, ...] | None = tuple(output.name for output in request.outputs)
            as_json = tuple(output.name for output in request.outputs if not output.binary)
        else:
            outputs, as_json = None, () if request.binary_output else tuple(known)
        seam = Seam.of(self.graph, names) if usual and self.together > 1 else None
        until = tail.until if run == tail.forward else None
        plan = RequestPlan(names, run, outputs, as_json, value_check(self.graph, self.name, names), seam, until)
        if request.recurring is not None:
            # A plan keeps its tail alive, so there must not be more plans than tails.
            if len(edition.plans) >= edition.tails.capacity:
                edition.plans.clear()
            edition.plans[request.recurring] = plan
        return plan
