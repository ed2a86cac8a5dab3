"""How the requests of one served model are answered: decoded, planned, run alone or together, and encoded."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.cutting.partition import check_shapes
from torchsurgeon.errors import BodyTooLargeError, ModelFailedError, ProtocolError, short
from torchsurgeon.models.arithmetic import ArithmeticReader
from torchsurgeon.serve.admission import MAX_QUEUE
from torchsurgeon.serve.backends import TailBackends
from torchsurgeon.serve.batching import Seam
from torchsurgeon.serve.checks import check_tensors, samples_in, value_check
from torchsurgeon.serve.edition import Edition, Editions
from torchsurgeon.serve.fitted import FittedCodecs
from torchsurgeon.serve.intake import Intake
from torchsurgeon.serve.joining import Joining
from torchsurgeon.serve.received import Received
from torchsurgeon.serve.statistics import Statistics
from torchsurgeon.serve.tails import RequestPlan, place_of, run_at
from torchsurgeon.tracing.graph import LayerGraph

Finish = Callable[..., Sequence[Tensor]]
"""Called with the sorted names of the boundary tensors and with the tensors; returns the model's output tensors."""

VERSION = "1"
# The server's times in the parameters of an answer, which begin before them: seconds, to the microsecond.
_TIMES = '"receive_s":%.6f,"queue_s":%.6f,"decode_s":%.6f,"compute_s":%.6f}'

# So many values of a request in JSON may be others than numbers of its tensors: names, shapes, parameters.
_FEW = 1024


class _Ready(NamedTuple):
    """A request that has been decoded and checked."""

    request: Received
    edition: Edition
    decoded: wire.InferRequest
    plan: RequestPlan
    given: list[Tensor]
    started_s: float
    decoded_s: float


class Answers:
    """Answers the requests of one model.

    Args:
        name: the name that it is served under.
        graph: the traced model.
        editions: the model from one change of its weights to the next.
        backends: what runs the tails.
        fitted: the codecs that were fitted to the model.
        arithmetic: what devices are told that the server computes with, by the backend that runs their tails; empty to
            tell them nothing.
        finish: computes the output in place of a tail of the graph, where another server runs the rest of the model.
        max_batch: the largest batch of a request.
        max_tensor_bytes: the most bytes that the tensors of a request have together.
        max_times: the most times the example's bytes that one tensor has.
        max_json_inputs: the most numbers that a request has in JSON.
        max_json_outputs: the most numbers that an answer has in JSON.
        concurrency: how many requests run at once.
        together: how many samples of requests that wait are joined and run as one.
        max_queue: how many requests may wait.

    Attributes:
        intake: hands requests to the threads that run them.
        statistics: what requests have taken.
    """

    def __init__(
        self,
        name: str,
        graph: LayerGraph,
        editions: Editions,
        backends: TailBackends,
        fitted: FittedCodecs,
        arithmetic: Mapping[str, ArithmeticReader],
        finish: Finish | None,
        *,
        max_batch: int,
        max_tensor_bytes: int,
        max_times: float,
        max_json_inputs: int,
        max_json_outputs: int,
        concurrency: int = 1,
        together: int = 1,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self._name, self._graph = name, graph
        self._editions, self._backends, self._fitted = editions, backends, fitted
        self._arithmetic, self._finish = arithmetic, finish
        self._max_batch, self._max_tensor_bytes, self._max_times = max_batch, max_tensor_bytes, max_times
        self._max_json_inputs, self._max_json_outputs = max_json_inputs, max_json_outputs
        self._together = together
        self._output_names = [spec.name for spec in graph.outputs]
        self.statistics = Statistics()
        self._joining = Joining(graph, editions.present.tails.capacity)
        self.intake = Intake(
            name,
            self.answer,
            self.answer_together,
            self._joining.joins,
            concurrency=concurrency,
            together=together,
            max_queue=max_queue,
        )

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
        try:
            ready = self._ready(request, started_s)
            results = self._run(ready.plan, ready.given, request.over if request.queued else None)
            if results is None:
                request.check()
            assert results is not None
            computed_s = time.perf_counter()
            answer = self._encoded(ready, results, ready.decoded_s, computed_s)
        except Exception as error:
            ended_s = time.perf_counter()
            self.intake.failed(request, ended_s - started_s, error)
            self.statistics.failed(ended_s - request.arrived_s)
            raise
        # One that is refused, or whose client has left, ends sooner, and says nothing of how long answers take.
        note = functools.partial(self._ran, [ready], ready.decoded_s, computed_s, time.perf_counter())
        if request.notes_later:
            request.note = note
        else:
            note()
        return answer

    def answer_together(self, requests: Sequence[Received]) -> list[wire.Encoded | Exception]:
        """Answer requests that belong together, and run the layers once that they share. To be called by the worker.

        Each gets the answer, or the error, that it would have got alone. One that is refused, or for which nobody waits
        any more, is left out. Where the others cannot be joined after all, or the model fails for all of them, each of
        them runs alone.
        """
        started_s = time.perf_counter()
        read = [self._read(request, started_s) for request in requests]
        ready = [one for one in read if isinstance(one, _Ready)]
        try:
            answers = self._joined(ready) if ready else {}
        except Exception:
            answers = None
        if answers is None:
            answers = {id(one.request): self._tried(one.request) for one in ready}
        return [answers[id(one.request)] if isinstance(one, _Ready) else one for one in read]

    def _read(self, request: Received, started_s: float) -> _Ready | Exception:
        try:
            return self._ready(request, started_s)
        except Exception as error:
            self.statistics.failed(time.perf_counter() - request.arrived_s)
            return error

    def _joined(self, ready: Sequence[_Ready]) -> Mapping[int, wire.Encoded | Exception] | None:
        """Return the answers of requests that run together, by their identities; None where they cannot be joined."""
        plans = self._joining.order(list({id(one.plan): one.plan for one in ready}.values()))
        if plans is None or any(one.edition is not ready[0].edition for one in ready):
            return None
        seam = plans[-1].seam
        samples = sum(one.plan.samples for one in ready)
        if seam is None or samples > self._together:
            return None
        # In the order of the cuts.
        groups = [[one for one in ready if one.plan is plan] for plan in plans]
        ready = [one for group in groups for one in group]

        def over() -> bool:
            return all(one.request.over() for one in ready)

        begun_s = time.perf_counter()
        tensors = self._joining.advance(plans, [[one.given for one in group] for group in groups], over)
        if tensors is None:
            return None
        results = self._run(plans[-1], tensors, over)
        if results is None:
            return None
        parts = seam.part(results, [one.plan.samples for one in ready])
        computed_s = time.perf_counter()
        encoded = [self._encoded(*pair, begun_s, computed_s) for pair in zip(ready, parts, strict=True)]
        self._ran(ready, begun_s, computed_s, time.perf_counter())
        return {id(one.request): answer for one, answer in zip(ready, encoded, strict=True)}

    def _ran(self, ready: Sequence[_Ready], begun_s: float, computed_s: float, ended_s: float) -> None:
        """Take notice of requests that were answered together, and for which the model ran between these times.

        Args:
            ready: the requests.
            begun_s: when the model began.
            computed_s: when it had run.
            ended_s: when the answers were there.
        """
        first = ready[0]
        duration_s = ended_s - first.started_s
        requests = [one.request for one in ready]
        if all(one.plan is first.plan for one in ready):
            unloaded_s = [self.intake.took(requests, duration_s)] * len(ready)
        else:
            unloaded_s = self.intake.took_of_several(requests, duration_s)
        self.statistics.ran(
            [
                (one.started_s - one.request.arrived_s, least_s, one.plan.cut)
                for one, least_s in zip(ready, unloaded_s, strict=True)
            ],
            sum(one.plan.samples for one in ready),
            begun_s - first.started_s,
            computed_s - begun_s,
            ended_s - computed_s,
        )

    def _tried(self, request: Received) -> wire.Encoded | Exception:
        try:
            return self.answer(request)
        except Exception as error:
            return error

    def _ready(self, request: Received, started_s: float) -> _Ready:
        request.check()
        if request.header_bytes is None:
            self._check_json(request.body)
        edition = self._editions.present
        decoded = wire.decode_request(
            request.body,
            request.header_bytes,
            max_decoded_bytes=self._max_tensor_bytes,
            check_codec=functools.partial(self._fitted.check, edition.known_weights),
        )
        self._editions.refuse_training()
        # Not by the header itself, which is another in every request of a client that gives each an id of its own.
        recurring = None if decoded.recurring is None else request.alike
        plan = None if recurring is None else edition.plans.get(recurring)
        if plan is None:
            plan = self._plan(edition, decoded)
            if recurring is not None:
                edition.plans.put(recurring, plan)
        request.cut = plan.cut
        if request.kind is not None:
            self._joining.learn(request.kind, plan)
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
            if over is not None and plan.tail is not None:
                stopped: Sequence[Tensor] | None = plan.tail.until(over, tensors)
                return stopped
            # The tail's forward, without the overhead of nn.Module's call: a tail has no hooks.
            return plan.run(*tensors)
        except Exception as error:
            raise ModelFailedError(f"model {self._name!r} failed: {type(error).__name__}: {short(error)}") from error

    def _encoded(self, ready: _Ready, results: Sequence[Tensor], begun_s: float, computed_s: float) -> wire.Encoded:
        """Return the answer, for results that were computed from ``begun_s`` to ``computed_s``."""
        request, plan, decoded = ready.request, ready.plan, ready.decoded
        outputs = dict(zip(self._output_names, results, strict=True))
        if plan.outputs is not None:
            outputs = {name: outputs[name] for name in plan.outputs}
        self._check_outputs(outputs[name].numel() for name in plan.as_json)
        decode_s = ready.decoded_s - ready.started_s
        times_s = (request.receive_s, begun_s - decode_s - request.arrived_s, decode_s, computed_s - begun_s)
        return wire.encode_response(
            self._name,
            VERSION,
            outputs,
            as_json=plan.as_json,
            dim_order=decoded.dim_order,
            request_id=decoded.request_id,
            parameters=self._told(ready.edition, plan) + _TIMES % times_s,
            codec=decoded.output_codec,
            crc32=decoded.crc32,
        )

    def _told(self, edition: Edition, plan: RequestPlan) -> str:
        """Return the beginning of the parameters of an answer that has been computed in this edition by this plan.

        Once a client has asked for the fingerprint, every answer names the model and what this thread computes with, so
        that a client which compared them notices when either changes.
        """
        identity = self._editions.identity(edition)
        if identity is None:
            return "{"
        arithmetic = "" if plan.arithmetic is None else f'"arithmetic":"{plan.arithmetic.now().digest}",'
        return f'{{"identity":"{identity}",{arithmetic}'

    def _check_json(self, body: memoryview) -> None:
        """Check that a body of JSON has not too many values, before each of them becomes an object of Python's.

        Every value follows a comma or a bracket. A list of numbers has one comma for each of them, and where it is
        nested as a rule not more brackets than numbers.

        Raises:
            BodyTooLargeError: it has too many.
        """
        text = bytes(body)
        if sum(map(text.count, (b",", b"[", b"{"))) > 2 * self._max_json_inputs + _FEW:
            raise BodyTooLargeError(
                f"a request to model {self._name!r} may have at most {self._max_json_inputs} numbers in JSON; this one "
                f"has more: send tensors as binary data with {wire.HEADER_LENGTH}"
            )

    def _check_outputs(self, numbers: Iterable[int]) -> None:
        """Check that outputs of so many numbers may be written in JSON.

        Raises:
            BodyTooLargeError: they are too many.
        """
        count = sum(numbers)
        if count > self._max_json_outputs:
            raise BodyTooLargeError(
                f"an answer of model {self._name!r} may have at most {self._max_json_outputs} numbers in JSON; this "
                f"one would have {count}: ask for outputs as binary data (binary_data_output), or for fewer samples"
            )

    def _plan(self, edition: Edition, request: wire.InferRequest) -> RequestPlan:
        """Check everything about a request but its tensors' values; the result holds for all with such a header."""
        known = self._output_names
        for output in request.outputs:
            if output.name not in known:
                raise ProtocolError(
                    f"model {self._name!r} has no output {short(output.name)}; it has {', '.join(known)[:300]}"
                )
        usual = check_tensors(self._graph, request.tensors, self._max_batch, self._max_times)
        names = tuple(sorted(request.tensors))
        tail = edition.tails.get(names)
        if usual and set(names) >= {spec.name for spec in self._graph.inputs}:
            try:
                self._graph.check_sizes([request.tensors[spec.name] for spec in self._graph.inputs])
            except TypeError as error:
                raise ProtocolError(f"model {self._name!r}: {error}") from None
        if not usual:
            check_shapes(self._graph, tail, names, [request.tensors[name] for name in names])
        backend = self._backends.chosen(request.parameters.get("backend"))
        run = self._backends.run(backend, names, tail)
        if self._finish is not None:
            run = functools.partial(self._finish, names)
        place = place_of(self._graph.model)
        if place.type != "cpu":
            run = functools.partial(run_at, place, run)
        if request.outputs:
            outputs: tuple[str, ...] | None = tuple(output.name for output in request.outputs)
            as_json = tuple(output.name for output in request.outputs if not output.binary)
        else:
            outputs, as_json = None, () if request.binary_output else tuple(known)
        samples = samples_in(self._graph, request.tensors)
        if usual:
            # Already here, so that it neither is computed nor spoils a batch with others.
            self._check_outputs(
                math.prod(spec.at_batch(samples)) for spec in self._graph.outputs if spec.name in as_json
            )
        seam = Seam.of(self._graph, names) if usual and self._together > 1 else None
        eager = tail if run == tail.forward else None
        check = value_check(self._graph, self._name, names)
        return RequestPlan(names, run, outputs, as_json, check, seam, eager, samples, self._arithmetic.get(backend))
