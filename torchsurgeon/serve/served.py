"""One model as a server holds it: the tails cut from it on the spot, and how a request is run on them."""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.codec import codec_names
from torchsurgeon.cutting.partition import check_shapes, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import (
    ModelFailedError,
    ModelNotServedError,
    ProtocolError,
)
from torchsurgeon.models.weights import identity, weight_digests
from torchsurgeon.profiling import profile
from torchsurgeon.serve.worker import Worker
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import TensorSpec

Finish = Callable[..., Sequence[Tensor]]


Profiler = Callable[[LayerGraph], dict[str, Any]]


# JSON numbers take up to eight times the bytes of the value they stand for ("255, " for a uint8).
JSON_FACTOR = 8


# Handing a short request to another thread and back would be felt, so it is run where it was received.
_QUICK_S = 5e-4


_MAX_REMEMBERED = 256


# Seconds, to the microsecond.
_TIMES = '{"receive_s":%.6f,"queue_s":%.6f,"decode_s":%.6f,"compute_s":%.6f}'


def profile_here(graph: LayerGraph) -> dict[str, Any]:
    """Measure the graph's layers on this machine, without joules; what servers tell unless they are given another."""
    return profile(graph, meter=None).to_json()


class Tails:
    """The tails cut so far, by the names that they take; the least recently used are dropped beyond ``capacity``."""

    def __init__(self, graph: LayerGraph, capacity: int) -> None:
        self._graph = graph
        self.capacity = capacity
        self._tails: OrderedDict[tuple[str, ...], Segment] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tails)

    def get(self, names: tuple[str, ...]) -> Segment:
        """The tail for ``names``, cut now if it was never asked for. Raises PartitionError."""
        with self._lock:
            tail = self._tails.get(names)
            if tail is not None:
                self._tails.move_to_end(names)
                return tail
        tail = tail_for(self._graph, names, flat=True)
        with self._lock:
            self._tails[names] = tail
            while len(self._tails) > self.capacity:
                self._tails.popitem(last=False)
        return tail


class Received(NamedTuple):
    """A request's body as it came, and how long it took to come."""

    body: memoryview
    header_bytes: int | None
    receive_s: float
    arrived_s: float


class ServedModel:
    """A loaded model: its graph, its tails and its thread."""

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
    ) -> None:
        self.name = name
        self.graph = graph
        self.source = source
        self.max_batch = max_batch if graph.batch_free else graph.batch
        # Images may be larger than the example, and sequences longer, by as much as a batch may.
        self.max_tensor_bytes = max_batch * max(point.size_bytes for point in graph.points) // graph.batch
        self.max_times = max_batch / graph.batch
        self.tails = Tails(graph, max_tails)
        self._finish = finish
        self._output_names = [spec.name for spec in graph.outputs]
        self.worker = Worker(f"torchsurgeon-{name}")
        self.open = True
        self._profiler = profiler
        self._once = threading.Lock()
        self._fingerprint: dict[str, Any] | None = None
        self._told = _TIMES
        self._profile: dict[str, Any] | None = None
        self._taken_s: dict[int, float] = {}
        self._plans: dict[object, _Plan] = {}

    def max_body_bytes(self, *, binary: bool) -> int:
        """The largest request body there can be: the widest boundary ``max_batch`` times, and a header."""
        return self.max_tensor_bytes * (1 if binary else JSON_FACTOR) + wire.MAX_HEADER_BYTES

    def metadata(self) -> dict[str, Any]:
        """The protocol's model metadata; the batch dimension is -1. ``parameters`` lists the codecs known here."""
        return {
            "name": self.name,
            "versions": list(self.versions),
            "platform": "torchsurgeon",
            "inputs": [_tensor_metadata(spec) for spec in self.graph.inputs],
            "outputs": [_tensor_metadata(spec) for spec in self.graph.outputs],
            "parameters": {"codecs": list(codec_names())},
        }

    def fingerprint(self) -> dict[str, Any]:
        """Graph and weight digests, computed once."""
        with self._once:
            if self._fingerprint is None:
                digests = weight_digests(self.graph.model)
                name = identity(self.graph.fingerprint, digests.combined)
                told = {"identity": name, "graph": self.graph.fingerprint, "torch": torch.__version__}
                self._fingerprint = {**told, **digests.to_json()}
                # From now on answers tell it, so that clients who shook hands notice another model in this one's place.
                self._told = f'{{"identity":"{name}",{_TIMES[1:]}'
            return self._fingerprint

    def profile(self) -> dict[str, Any]:
        """The server's layer profile, measured once; call it in the worker thread.

        Raises ModelNotServedError when the server has no profiler.
        """
        if self._profiler is None:
            raise ModelNotServedError(
                f"this server does not profile model {self.name!r}, because it was made with profiler=None; leave that "
                'out there, or here give SplitModule a server_profile or a partition other than "auto"'
            )
        if self._profile is None:
            with torch.no_grad():
                self._profile = self._profiler(self.graph)
        return self._profile

    def quick(self, body_bytes: int) -> bool:
        """Whether the last request of this size, so most likely with the same cut, took less than a thread switch."""
        return self._finish is None and self._taken_s.get(body_bytes, 1.0) < _QUICK_S

    def answer(self, request: Received) -> wire.Encoded:
        """Decode, run and encode one request; to be called by the worker.

        Raises ProtocolError or PartitionError for a request that is wrong, ModelFailedError when the model fails.
        """
        started_s = time.perf_counter()
        try:
            return self._answer(request, started_s)
        finally:
            if len(self._taken_s) >= _MAX_REMEMBERED:
                self._taken_s.clear()
            self._taken_s[len(request.body)] = time.perf_counter() - started_s

    def _answer(self, request: Received, started_s: float) -> wire.Encoded:
        decoded = wire.decode_request(request.body, request.header_bytes, max_decoded_bytes=self.max_tensor_bytes)
        plan = self._plans.get(decoded.recurring) or self._plan(decoded)
        decoded_s = time.perf_counter()
        try:
            # Called without nn.Module's own call, whose hooks a tail has none of.
            results = plan.run(*[decoded.tensors[name] for name in plan.names])
        except Exception as error:
            raise ModelFailedError(f"model {self.name!r} failed: {type(error).__name__}: {error}") from error
        computed_s = time.perf_counter()
        outputs = dict(zip(self._output_names, results, strict=True))
        if plan.outputs is not None:
            outputs = {name: outputs[name] for name in plan.outputs}
        taken_s = (request.receive_s, started_s - request.arrived_s, decoded_s - started_s, computed_s - decoded_s)
        return wire.encode_response(
            self.name,
            self.versions[0],
            outputs,
            as_json=plan.as_json,
            dim_order=decoded.dim_order,
            request_id=decoded.request_id,
            parameters=self._told % taken_s,
            codec=decoded.output_codec,
            crc32=decoded.crc32,
        )

    def close(self) -> None:
        """Take no more requests, and end the thread."""
        self.open = False
        self.worker.close()

    def _plan(self, request: wire.InferRequest) -> _Plan:
        """Everything about a request but its tensors' values, checked; kept for the next with the same header."""
        known = self._output_names
        for output in request.outputs:
            if output.name not in known:
                raise ProtocolError(f"model {self.name!r} has no output {output.name!r}; it has {', '.join(known)}")
        usual = check_tensors(self.graph, request.tensors, self.max_batch, self.max_times)
        names = tuple(sorted(request.tensors))
        tail = self.tails.get(names)
        if not usual:
            check_shapes(self.graph, tail, names, [request.tensors[name] for name in names])
        run = tail.forward if self._finish is None else functools.partial(self._finish, names)
        if request.outputs:
            outputs: tuple[str, ...] | None = tuple(output.name for output in request.outputs)
            as_json = tuple(output.name for output in request.outputs if not output.binary)
        else:
            outputs, as_json = None, () if request.binary_output else tuple(known)
        plan = _Plan(names, run, outputs, as_json)
        if request.recurring is not None:
            # A plan keeps its tail alive, so there are no more of them than of tails.
            if len(self._plans) >= self.tails.capacity:
                self._plans.clear()
            self._plans[request.recurring] = plan
        return plan


@dataclass(frozen=True)
class _Plan:
    names: tuple[str, ...]
    run: Callable[..., Sequence[Tensor]]
    outputs: tuple[str, ...] | None
    as_json: tuple[str, ...]


def check_tensors(graph: LayerGraph, tensors: Mapping[str, Tensor], max_batch: int, max_times: float) -> bool:
    """Refuse tensors whose dtype, rank or size the graph cannot have, or that disagree about the batch size.

    ``max_times`` is how many times the example's bytes a tensor may have. Returns whether all shapes are the
    example's at some batch size; others (an image of another size) may still be fine, which ``check_shapes`` tells.
    Names the graph does not know are left to ``tail_for``. Raises ProtocolError.
    """
    usual = True
    batch: int | None = None
    decided_by = ""
    for name, tensor in tensors.items():
        spec = graph.values.get(name)
        if spec is None:
            continue
        if tensor.dtype != spec.dtype:
            theirs, ours = wire.datatype_of(tensor.dtype), wire.datatype_of(spec.dtype)
            raise ProtocolError(f"tensor {name!r} is {theirs}; the model has {ours} there")
        shape = tuple(tensor.shape)
        own = _batch_of(spec, shape)
        samples = all(size or not step for size, step in zip(shape, spec.batch_step, strict=False))
        fits = len(shape) == len(spec.shape) and tensor.nbytes <= spec.size_bytes * max_times
        if own is None and samples and fits:
            usual = False
            continue
        if own is None or own > max_batch:
            problem = f" in a batch of at most {max_batch}" if any(spec.batch_step) else ""
            raise ProtocolError(
                f"tensor {name!r} has shape {list(shape)}; the model has {list(spec.wire_shape)} there{problem}, and "
                f"other sizes of at most {max_times:g} times the example's bytes (a larger --max-batch raises that)"
            )
        if any(spec.batch_step):
            if batch is not None and own != batch:
                raise ProtocolError(f"tensor {name!r} is a batch of {own}, but {decided_by!r} is a batch of {batch}")
            batch, decided_by = own, name
    return usual


def _batch_of(spec: TensorSpec, shape: tuple[int, ...]) -> int | None:
    """The batch size a shape stands for (the example's where it does not depend on it), None if it fits none."""
    if len(shape) != len(spec.shape):
        return None
    batch = spec.example_batch
    for size, example, step in zip(shape, spec.shape, spec.batch_step, strict=True):
        if step:
            batch = spec.example_batch + (size - example) // step
            break
    return batch if batch >= 1 and spec.at_batch(batch) == shape else None


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": wire.datatype_of(spec.dtype), "shape": list(spec.wire_shape)}
