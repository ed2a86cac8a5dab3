"""SplitModule: a model whose head runs here and whose tail runs on a server."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from torchsurgeon.codec import Codec, find_codec
from torchsurgeon.cut import cut, middle_for, tail_for
from torchsurgeon.errors import (
    ModelMismatchError,
    PartitionError,
    ProtocolError,
    RequestRefusedError,
    ServerUnavailableError,
    TraceError,
)
from torchsurgeon.fingerprint import Snapshot, WeightDigests, weight_digests
from torchsurgeon.graph import LayerGraph, PartitionPoint, trace
from torchsurgeon.link import Link
from torchsurgeon.plan import Estimate, best, estimate
from torchsurgeon.profile import LayerProfile, profile
from torchsurgeon.transport import Answer, HttpTransport, Transport

_PROBE_BYTES = (16 << 10, 128 << 10, 1 << 20)
_PROBE_ENOUGH_S = 0.05
_LISTED_TENSORS = 5
_MOST_HEADS = 64
_LEAST_ANSWER_LIMIT_BYTES = 64 << 20

Backend = Callable[[nn.Module], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Inference:
    """Where the time of one inference went, in seconds, and what crossed.

    ``uplink_s`` and ``downlink_s`` include half a round trip each; what the server spends beside queue and tail
    counts to the uplink. The parts add up to ``total_s``.
    """

    partition: PartitionPoint
    total_s: float
    head_s: float
    encode_s: float = 0.0
    uplink_s: float = 0.0
    queue_s: float = 0.0
    tail_s: float = 0.0
    downlink_s: float = 0.0
    decode_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name + '_s') * 1e3:.2f}" for name in _PARTS if getattr(self, name + "_s")]
        where = f"cut after {self.partition.name}" if self.sent_bytes else "all on the device"
        return f"{self.total_s * 1e3:.2f} ms ({where}; ms: {', '.join(parts)}; {self.sent_bytes} bytes sent)"


_PARTS = ("head", "encode", "uplink", "queue", "tail", "downlink", "decode")


class SplitModule(nn.Module):
    """Wrap ``model`` so that calling it runs a part here and the rest on a tail server, and gives the model's own
    answer.

    Args:
        model: the model, in eval mode. It is not changed; its parameters are shared.
        example: what the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword ones.
        server: URL of a server started with ``torchsurgeon serve``, or a :class:`~torchsurgeon.transport.Transport`.
            Not needed with ``partition="device"``.
        name: the model's name on that server.
        partition: where to cut, as a :class:`~torchsurgeon.graph.PartitionPoint` of this model; ``"device"`` or
            ``"server"`` for everything on one side, a partition index, the name of the last layer to run here, or
            ``"auto"``: the point with the lowest predicted latency, from measured layer times of both sides and the
            measured link.
        link: the link, when it is known; measured at the first call otherwise (``"auto"`` only).
        device_profile, server_profile: layer times, when they are known; measured otherwise (``"auto"`` only).
        codec: the codec of the boundary tensors, by name: ``"raw"`` or ``"zstd"``, or one that loses something
            (``"int8+zstd"``), which makes the answer another than the model's own. Assign ``codec`` to change it.
        answer_codec: the codec that the server is asked to answer with.
        backend: makes the callable that runs the head from its module; eager PyTorch by default.
        timeout_s: an inference that takes the server longer raises.
        leaf_modules: passed to :func:`~torchsurgeon.graph.trace`.

    The first call shakes hands with the server and raises :class:`~torchsurgeon.errors.ModelMismatchError` unless
    both sides hold the same graph and weights; so does the first call after the weights of either side have changed. A
    model that is put into training mode or gets other submodules raises
    :class:`~torchsurgeon.errors.TraceError`. A server that is down, slow or gone in mid-answer raises
    :class:`~torchsurgeon.errors.ServerUnavailableError` within ``timeout_s``. Inference only: no gradients. May be
    called from several threads at once. Close it, or use it in a ``with`` statement, to close its connections.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        server: str | Transport | None = None,
        name: str = "model",
        partition: str | int | PartitionPoint = "auto",
        link: Link | None = None,
        device_profile: LayerProfile | None = None,
        server_profile: LayerProfile | None = None,
        codec: str = "raw",
        answer_codec: str = "raw",
        backend: Backend | None = None,
        timeout_s: float = 30.0,
        leaf_modules: Sequence[str | type[nn.Module]] = (),
    ) -> None:
        super().__init__()
        self.training = False
        self.model = model
        args, kwargs = _call_of(example)
        self.graph: LayerGraph = trace(model, *args, leaf_modules=leaf_modules, **kwargs)
        self.name = name
        self.link, self.device_profile, self.server_profile = link, device_profile, server_profile
        self.last: Inference | None = None
        """The inference that ended last, in any thread; None before the first."""
        self.codec = codec
        self.answer_codec: Codec = find_codec(answer_codec)
        self._example = self.graph.tensors_of_call(args, kwargs)
        # A larger batch or image gives a larger answer; this only keeps a hostile server from filling the memory.
        self._max_answer_bytes = max(_LEAST_ANSWER_LIMIT_BYTES, 64 * self.graph.points[-1].size_bytes)
        self._backend: Backend = backend or (lambda module: module)
        self._transport = HttpTransport(server, timeout_s) if isinstance(server, str) else server
        self._lock = threading.RLock()
        self._shaken = False
        self._identity: str | None = None
        self._snapshot = Snapshot(model)
        self._heads: dict[Any, Callable[..., Any]] = {}
        self._choice: PartitionPoint | None = None
        self.partition = partition

    # --- where to cut ---

    @property
    def partition(self) -> PartitionPoint | None:
        """The partition point in use; None while ``"auto"`` has not chosen yet. Assign what the constructor takes."""
        return self._choice

    @partition.setter
    def partition(self, wanted: str | int | PartitionPoint) -> None:
        if isinstance(wanted, PartitionPoint):
            choice: PartitionPoint | None = wanted
        else:
            choice = None if wanted == "auto" else self.graph.point(wanted)
        if self._transport is None and (choice is None or choice != self.graph.points[-1]):
            raise ServerUnavailableError(
                f'partition {wanted!r} needs a server: give server="http://host:port", or partition="device"'
            )
        self._choice = choice

    @property
    def codec(self) -> Codec:
        """The codec of the boundary tensors. Assign a name; raises :class:`~torchsurgeon.errors.CodecError`."""
        return self._codec

    @codec.setter
    def codec(self, wanted: str | Codec) -> None:
        self._codec = find_codec(str(wanted))

    def estimates(self) -> list[Estimate]:
        """Return the predicted latency of every partition point; measures what is not known yet.

        Raises :class:`~torchsurgeon.errors.ServerError` when the server cannot tell its part.
        """
        with self._lock:
            transport = self._connected()
            if self.server_profile is None:
                self.server_profile = LayerProfile.from_json(transport.get_json(f"/v2/models/{self.name}/profile"))
            if self.device_profile is None:
                self.device_profile = profile(self.graph, inputs=self._example, meter=None)
            if self.link is None:
                self.link = measure_link(transport)
            return estimate(self.graph, self.device_profile, self.server_profile, self.link)

    def _chosen(self) -> PartitionPoint:
        if self._choice is None:
            with self._lock:
                if self._choice is None:
                    self._choice = best(self.estimates()).point
        return self._choice

    # --- running ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for this call."""
        # Choosing, shaking hands and cutting are done once, and are not part of where an inference's time goes.
        point = self._chosen()
        with torch.no_grad():
            if point.index != len(self.graph.layers):
                return self._split(self._connected(), point, args, kwargs)
            whole = self._head(point)
            begin = time.perf_counter()
            output = whole(*args, **kwargs)
            end = time.perf_counter()
            self.last = Inference(point, end - begin, end - begin)
            return output

    def _split(
        self, transport: Transport, point: PartitionPoint, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        head = self._head(point)
        begin = time.perf_counter()
        boundary = head(*args, **kwargs)
        headed = time.perf_counter()
        tensors = dict(zip((spec.name for spec in point.tensors), boundary, strict=True))
        answer = self._ask(transport, tensors, dict.fromkeys(tensors, self._codec))
        self._check_answer(point, boundary, answer.tensors)
        device = boundary[0].device
        tensors = {name: tensor.to(device) for name, tensor in answer.tensors.items()}
        output = self.graph.unflatten_output(tensors)
        end = time.perf_counter()
        self.last = self._account(point, answer, begin, headed, end)
        return output

    def finish(self, names: tuple[str, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the model's result, in the order of ``graph.outputs``, from the tensors ``names``.

        The layers up to this module's own cut run here, the rest on its server. So a server that is given a SplitModule
        is the middle of a chain. Tensors that lie beyond the cut are passed on as they are.

        Raises :class:`~torchsurgeon.errors.PartitionError` when they do not determine the result.
        """
        point = self._chosen()
        with torch.no_grad():
            key = names, point.index, point.layers
            middle = self._heads.get(key)
            if middle is None:
                if len(self._heads) >= _MOST_HEADS:
                    self._heads.clear()
                middle = self._heads[key] = self._middle(names, point)
            boundary = middle(*tensors)
            if point.index == len(self.graph.layers):
                return tuple(boundary)
            at = [self.graph.values[name] for name in names] if middle is _passed_on else point.tensors
            sent = dict(zip((spec.name for spec in at), boundary, strict=True))
            answer = self._ask(self._connected(), sent, dict.fromkeys(sent, self._codec))
            self._check_answer(dataclasses.replace(point, tensors=tuple(at)), boundary, answer.tensors)
            return tuple(answer.tensors[spec.name].to(tensors[0].device) for spec in self.graph.outputs)

    def _middle(self, names: tuple[str, ...], point: PartitionPoint) -> Callable[..., tuple[torch.Tensor, ...]]:
        rest = tail_for(self.graph, names, flat=True)
        if point.index == len(self.graph.layers):
            return rest
        try:
            return middle_for(self.graph, names, point)
        except PartitionError:
            return _passed_on

    def _ask(self, transport: Transport, tensors: Mapping[str, torch.Tensor], codecs: Mapping[str, Codec]) -> Answer:
        """Return the answer of the model that hands were shaken with, or of an equal one in its place."""

        def infer() -> Answer:
            return transport.infer(
                self.name,
                tensors,
                max_answer_bytes=self._max_answer_bytes,
                codecs=codecs,
                output_codec=self.answer_codec,
            )

        known = self._identity
        answer = infer()
        if answer.parameters.get("identity") == known:
            return answer
        with self._lock:
            if self._identity == known:
                self._shake_hands(transport)
            known = self._identity
        answer = infer()
        if answer.parameters.get("identity") != known:
            raise ModelMismatchError(
                f"model {self.name!r} answers with other weights than the server has just given the fingerprint of; "
                "are there several servers behind one address? Serve the same weights on all of them"
            )
        return answer

    def _check_answer(
        self, point: PartitionPoint, boundary: Sequence[torch.Tensor], answered: Mapping[str, torch.Tensor]
    ) -> None:
        graph = self.graph
        valued = graph.value_dependent or any(graph.value(spec.name).restore for spec in point.tensors)
        batch = None if valued else _batch(point, boundary)
        for spec in graph.outputs:
            tensor = answered.get(spec.name)
            wanted = spec.shape if batch is None else spec.at_batch(batch)
            if tensor is None or len(answered) != len(graph.outputs):
                names = sorted(other.name for other in graph.outputs)
                raise ProtocolError(f"the server answered with tensors {sorted(answered)}, expected {names}")
            shape = tuple(tensor.shape)
            if tensor.dtype != spec.dtype or (len(shape) != len(wanted) if batch is None else shape != wanted):
                raise ProtocolError(
                    f"the server answered with {tensor.dtype} {list(shape)} as {spec.name!r}, expected {spec.dtype} "
                    f"{list(wanted)}"
                )

    def _account(self, point: PartitionPoint, answer: Any, begin: float, headed: float, end: float) -> Inference:
        timing, told = answer.timing, answer.parameters
        half_trip_s = self.link.round_trip_s / 2 if self.link is not None else 0.0
        queue_s, tail_s = _seconds(told.get("queue_s")), _seconds(told.get("compute_s"))
        way_s = max(0.0, timing.end_s - timing.send_start_s - queue_s - tail_s)
        downlink_s = min(way_s, timing.end_s - timing.first_byte_s + half_trip_s)
        return Inference(
            partition=point,
            total_s=end - begin,
            head_s=headed - begin,
            encode_s=timing.send_start_s - headed,
            uplink_s=way_s - downlink_s,
            queue_s=queue_s,
            tail_s=tail_s,
            downlink_s=downlink_s,
            decode_s=end - timing.end_s,
            sent_bytes=timing.sent_bytes,
            received_bytes=timing.received_bytes,
        )

    def _head(self, point: PartitionPoint) -> Callable[..., Any]:
        key = point.index, point.layers
        found = self._heads.get(key)
        if found is None:
            whole = point.index == len(self.graph.layers)
            found = self._backend(self.model if whole else cut(self.graph, point).head)
            self._heads[key] = found
        return found

    # --- the server ---

    def _connected(self) -> Transport:
        transport = self._transport
        if transport is None:
            raise ServerUnavailableError('no server was given: SplitModule(…, server="http://host:port")')
        self._check_model()
        if not self._shaken or not self._snapshot.same_weights():
            with self._lock:
                if not self._shaken or not self._snapshot.same_weights():
                    self._snapshot = Snapshot(self.model)
                    self._heads.clear()
                    self._shake_hands(transport)
        return transport

    def _check_model(self) -> None:
        if self._snapshot.training():
            raise TraceError("the model has been put into training mode; call model.eval(): a SplitModule only answers")
        replaced = self._snapshot.replaced()
        if replaced is not None:
            raise TraceError(f"{replaced!r} of the model has been replaced since it was traced; make a new SplitModule")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise ModelMismatchError(
                "autocast is on here, and the server runs the model without it; call the SplitModule outside autocast, "
                "or have the model itself in the lower precision on both sides"
            )

    def _shake_hands(self, transport: Transport) -> None:
        """Make sure that the server's model is this model. Raises ModelMismatchError naming what differs first."""
        try:
            theirs = transport.get_json(f"/v2/models/{self.name}/fingerprint")
        except RequestRefusedError as error:
            if error.status != 404:
                raise
            raise ModelMismatchError(
                f"the server cannot tell fingerprints of a model {self.name!r} ({error}); "
                f"start it with: torchsurgeon serve {self.name}=SPEC"
            ) from None
        if not isinstance(theirs, dict) or not isinstance(theirs.get("tensors"), dict):
            raise ProtocolError("the server's fingerprint is not what torchsurgeon's servers answer")
        self._shaken = False
        ours = weight_digests(self.graph.model)
        if theirs.get("weights") != ours.combined:
            raise ModelMismatchError(_differing_weights(self.name, self.graph.model, ours, theirs["tensors"]))
        if theirs.get("graph") != self.graph.fingerprint:
            raise ModelMismatchError(
                f"model {self.name!r} has the same weights on both sides, but another graph: "
                f"{self.graph.fingerprint[:12]} here, {str(theirs.get('graph'))[:12]} on the server. Trace both with "
                f"the same example ({', '.join(map(str, self.graph.inputs))} here) and the same source of the model"
            )
        self._identity = theirs.get("identity")
        self._shaken = True

    def close(self) -> None:
        """Close the connections. Closing twice is harmless; calls that need the server raise afterwards."""
        if self._transport is not None:
            self._transport.close()

    def __enter__(self) -> SplitModule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- being an nn.Module ---

    def train(self, mode: bool = True) -> SplitModule:
        """Refuse training: a SplitModule gives answers only."""
        if mode:
            raise TraceError("a SplitModule is for inference; train the model itself, then wrap it again")
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> SplitModule:
        self._heads.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a SplitModule holds connections and cannot be copied or saved; copy its model and wrap that")

    def extra_repr(self) -> str:
        where = self._choice.name if self._choice is not None else "auto"
        return f"name={self.name!r}, partition={where!r}"


def measure_link(transport: Transport, *, name: str = "measured", repeats: int = 5) -> Link:
    """Measure the link to a tail server with small exchanges: the least round trip, then the rates of growing transfers
    until one takes long enough to tell."""
    trips = [_exchange_s(transport, 0, 0) for _ in range(repeats)]
    round_trip_s = min(trips)
    rates = []
    for up in (True, False):
        for size in _PROBE_BYTES:
            taken = min(_exchange_s(transport, size if up else 0, 0 if up else size) for _ in range(2)) - round_trip_s
            if taken >= _PROBE_ENOUGH_S:
                break
        rates.append(min(size * 8 / max(taken, 1e-6), 1e12))
    return Link(name, rates[0], rates[1], round_trip_s, source="probes of this connection")


def _exchange_s(transport: Transport, up_bytes: int, down_bytes: int) -> float:
    timing = transport.probe(up_bytes, down_bytes)
    return timing.end_s - timing.send_start_s


def _passed_on(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors


def _batch(point: PartitionPoint, boundary: Sequence[torch.Tensor]) -> int | None:
    """Return the batch size that explains the boundary's shapes; None if none does, as with images of another size."""
    sizes = {
        spec.example_batch + (size - example) // step
        for spec, tensor in zip(point.tensors, boundary, strict=True)
        for size, example, step in zip(tensor.shape, spec.shape, spec.batch_step, strict=False)
        if step
    }
    batch = sizes.pop() if sizes else 1
    fits = all(tensor.shape == spec.at_batch(batch) for spec, tensor in zip(point.tensors, boundary, strict=True))
    return batch if fits and not sizes else None


def _call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict):
        return (), example
    return (example,), {}


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e6 else 0.0


def _differing_weights(name: str, model: nn.Module, ours: WeightDigests, theirs: Mapping[str, Any]) -> str:
    rows = []
    order = [*model.state_dict(keep_vars=True), *ours.tensors, *theirs]
    for tensor in dict.fromkeys(order):
        here = ours.tensors[tensor].to_json() if tensor in ours.tensors else None
        there = theirs.get(tensor)
        if here != there:
            rows.append(f"{tensor} ({_described(here)} here, {_described(there)} on the server)")
    more = f", and {len(rows) - _LISTED_TENSORS} more" if len(rows) > _LISTED_TENSORS else ""
    return (
        f"model {name!r} has other weights on the server: {', '.join(rows[:_LISTED_TENSORS])}{more}. "
        "Serve the weights this model was loaded with"
    )


def _described(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return "absent"
    shape = "×".join(map(str, tensor.get("shape", ())))
    return f"{tensor.get('dtype')}[{shape}] {str(tensor.get('digest'))[:8]}"
