"""A model as a graph of layers, with every point where it can be cut.

``trace`` follows the model once with torch.fx and once on meta tensors; nothing is computed. The resulting
:class:`LayerGraph` names each layer by its module path, and lists each :class:`PartitionPoint` with the boundary
tensors that have to travel there.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.capture import Captured, capture
from torchsurgeon.capture_fx import left_as_it_was
from torchsurgeon.closure import Closure
from torchsurgeon.configuration import configuration, constant_digest
from torchsurgeon.errors import PartitionError, TraceError
from torchsurgeon.flow import Flow, Value
from torchsurgeon.interface import Call, settle_output
from torchsurgeon.layout import Layout, has_gaps
from torchsurgeon.program import Constant, Step
from torchsurgeon.shapes import MetaModel, RealModel, Shapes, propagate, tensors_in, with_selections


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that may cross a boundary.

    ``shape`` is the shape in the traced example. ``batch_step`` says by how much each dimension grows with every
    further sample in the batch: ``(1, 0, 0, 0)`` for an image tensor, ``(64, 0, 0)`` where 64 windows are folded into
    the batch, all zeros where the batch size does not matter (or is not free).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    batch_step: tuple[int, ...]
    example_batch: int = 1

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """Return the shape for a batch of ``batch`` samples."""
        extra = batch - self.example_batch
        if not extra:
            return self.shape
        return tuple(size + step * extra for size, step in zip(self.shape, self.batch_step, strict=True))

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """The shape with -1 for each dimension that depends on the batch."""
        return tuple(-1 if step else size for size, step in zip(self.shape, self.batch_step, strict=True))

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the traced example."""
        return self.dtype.itemsize * math.prod(self.shape)

    def size_bytes_at(self, batch: int) -> int:
        """Bytes of the tensor for a batch of ``batch`` samples."""
        size = self.dtype.itemsize
        for dim in self.at_batch(batch):
            size *= dim
        return size

    def __str__(self) -> str:
        dims = "×".join(
            "N" if s == 1 else f"{s}N" if s else str(n) for n, s in zip(self.shape, self.batch_step, strict=True)
        )
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}[{dims}]"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "batch_step": list(self.batch_step),
            "size_bytes": self.size_bytes,
        }


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation of the model: a module called, or a function on tensors.

    ``name`` is the module path (``layer1.0.conv1``); a function's is the path of the module that calls it and its own
    name (``layer1.0.add``); later calls of the same are numbered (``layer1.0.relu_1``). ``flops`` counts multiply and
    add as two, as PyTorch's flop counter does, and only for the operators that counter knows (matrix products,
    convolutions, attention). ``uncounted`` names custom operators inside whose flops are unknown.
    """

    index: int
    name: str
    type: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flops: int
    parameter_bytes: int
    uncounted: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        fields = {k: getattr(self, k) for k in ("index", "name", "type", "flops", "parameter_bytes", "uncounted")}
        return fields | {
            "inputs": [spec.name for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }


@dataclasses.dataclass(frozen=True)
class PartitionPoint:
    """A place to cut: the first ``index`` layers run on the device.

    Point 0 is everything on the server, its boundary tensors are the model's inputs; the last point is everything on
    the device, its boundary tensors are the model's outputs. ``name`` is the last layer on the device (``input`` at
    point 0). Where a memory hazard forbids a cut, the index is missing from the graph's points.

    A cut across parallel branches (:meth:`LayerGraph.point_of`) is not among the graph's points: its ``layers`` lists
    the ``index`` layers on the device, which are not the first ones; ``name`` joins the last of them.
    """

    index: int
    name: str
    tensors: tuple[TensorSpec, ...]
    layers: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all boundary tensors in the traced example."""
        return sum(spec.size_bytes for spec in self.tensors)

    def __str__(self) -> str:
        place = "before the first layer" if self.index == 0 else f"after {self.name}"
        return f"point {self.index} ({place}): {', '.join(map(str, self.tensors))}; {self.size_bytes} bytes"

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "size_bytes": self.size_bytes,
            "tensors": [spec.to_json() for spec in self.tensors],
        }


class LayerGraph:
    """A traced model. Made by :func:`trace`; immutable; holds the model itself and shares its parameters.

    Attributes:
        model: the model.
        layers: every :class:`Layer`, in the order the model runs them.
        points: every :class:`PartitionPoint`, from all on the server to all on the device.
        inputs, outputs: the model's own input and output tensors.
        values: every tensor that may cross a boundary, by name.
        batch: the example's batch size; ``batch_free`` says whether other sizes work. Where they do not, the example
            counts as one sample.
        traced_by: ``"fx"``, ``"export"``, or ``"hierarchical"`` (fx around modules that it cannot follow).
        opaque: path of each module kept whole as one layer, and why.
        value_dependent: whether shapes depend on values, so that the example had to be run for real.
        fingerprint: hex digest of names, types, configurations, shapes and order; not of the weights.
    """

    def __init__(self, model: nn.Module, call: Call, captured: Captured, flow: Flow, specs: _Specs) -> None:
        self.model = model
        self.traced_by, self.opaque, self._guard = captured.traced_by, dict(captured.opaque), captured.guard
        self.value_dependent = specs.value_dependent
        steps = captured.steps
        self.batch, self.batch_free = specs.batch, specs.batch_free
        self.shapes = specs.shapes
        self.layouts = {value.name: layout for value in flow.values if (layout := specs.layout(value)) is not None}
        self.call, self.steps, self.flow = call, steps, flow
        self.calls = [step.compiled() if step.kind in ("call", "output") else _never for step in steps]
        self._values = {value.name: value for value in flow.values}
        self.values: Mapping[str, TensorSpec] = {value.name: specs.of(value) for value in flow.values}
        self.inputs = tuple(self.values[name] for name in call.names)
        names = steps[-1].target.names
        result = tuple(specs.of_output(name, ref) for name, ref in zip(names, steps[-1].args, strict=True))
        self.outputs = result
        self.layers = tuple(self._layer(i, index, specs) for i, index in enumerate(flow.layers))
        self._sizes = {name: spec.size_bytes for name, spec in self.values.items()}
        boundaries = flow.boundaries(self._sizes)
        self.points = tuple(
            PartitionPoint(
                k,
                self.layers[k - 1].name if k else "input",
                self.inputs
                if k == 0
                else result
                if k == len(self.layers)
                else tuple(self.values[v.name] for v in boundary),
            )
            for k, boundary in boundaries.items()
        )
        self._points = {point.name: point for point in self.points} | {point.index: point for point in self.points}

    def _layer(self, i: int, index: int, specs: _Specs) -> Layer:
        step = self.steps[index]
        parameters = {id(p): p for p in step.target.parameters()} if step.is_module else {}
        parameters |= {id(p): p for p in self.flow.attributes_of(step, self.model)}
        return Layer(
            index=i,
            name=step.name,
            type=step.type_name,
            inputs=tuple(self.values[v.name] for v in self.flow.reads(step)),
            outputs=tuple(specs.of(v) for v in self.flow.gives(index)),
            flops=specs.shapes.flops[index],
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
            uncounted=tuple(sorted(specs.shapes.uncounted[index])),
        )

    def point(self, ref: int | str) -> PartitionPoint:
        """Return a partition point by index (negative counts from the end), by the name of the last layer on the
        device, or as ``"server"`` and ``"device"`` for the two ends.

        Raises :class:`~torchsurgeon.errors.PartitionError`, listing the near ones, when there is none.
        """
        if not isinstance(ref, (int, str)) or isinstance(ref, bool):
            raise PartitionError(f"a partition point is an index or a layer's name, not {ref!r}")
        if ref in ("server", "device"):
            return self.points[0 if ref == "server" else -1]
        key = ref + len(self.layers) + 1 if isinstance(ref, int) and ref < 0 else ref
        found = self._points.get(key)
        if found is not None:
            return found
        if isinstance(ref, int):
            near = sorted(self.points, key=lambda p: abs(p.index - int(key)))[:3]
            listed = ", ".join(f"{p.index} ({p.name})" for p in sorted(near, key=lambda p: p.index))
            raise PartitionError(
                f"there is no partition point {ref}; the points are 0 … {len(self.layers)}, the nearest {listed}"
            )
        names = [point.name for point in self.points]
        inside = [name for name in names if name.startswith(f"{ref}.")]
        if inside:
            raise PartitionError(
                f"{ref!r} is a module with layers inside; the last of them to cut after is {inside[-1]!r}"
            )
        near_names = difflib.get_close_matches(ref, names, n=5, cutoff=0.3) or names[:5]
        raise PartitionError(f"there is no layer {ref!r} to cut after; near it: {', '.join(near_names)}")

    @functools.cached_property
    def closure(self) -> Closure:
        """Which layers need which; made when first asked for."""
        return Closure(self.flow)

    def point_of(self, layers: Collection[int]) -> PartitionPoint:
        """Return the cut that runs exactly ``layers`` on the device: one of ``points``, or one across branches.

        Raises :class:`~torchsurgeon.errors.PartitionError`: a layer needs one that is not listed, or memory forbids it.
        """
        inside = sorted(set(layers))
        if inside and not 0 <= inside[0] <= inside[-1] < len(self.layers):
            raise PartitionError(f"there are layers 0 … {len(self.layers) - 1}, not {inside[0]} … {inside[-1]}")
        if inside == list(range(len(inside))) and len(inside) in self._points:
            return self._points[len(inside)]
        boundary = self.closure.crossing(inside, self._sizes)
        if boundary is None or self.closure.prefixes_only:
            reason = "some need layers that are not among them" if boundary is None else "they share memory with others"
            raise PartitionError(
                f"{len(inside)} layers cannot run apart from the rest: {reason}; use one of the graph's points"
            )
        needed = {j for i in inside for j in self.closure.needs[i]}
        name = "+".join(self.layers[i].name for i in inside if i not in needed)
        return PartitionPoint(len(inside), name, tuple(self.values[v.name] for v in boundary), tuple(inside))

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return a call's tensors by input name. Raises ``TypeError`` for a call unlike the traced example."""
        return dict(zip(self.call.names, self.tensors_of_call(args, kwargs), strict=True))

    def tensors_of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return a call's tensors in the order of ``inputs``. Raises ``TypeError`` as ``bind`` does."""
        tensors = self.call.tensors(args, kwargs)
        self.check_sizes(tensors)
        return tensors

    def check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise ``TypeError`` for input tensors whose sizes would have taken another path through the model's
        source."""
        if self._guard is not None:
            self._guard(tensors)

    def value(self, name: str) -> Value:
        """Return where in the program the tensor ``name`` comes to be."""
        return self._values[name]

    def flatten_output(self, output: Any) -> dict[str, torch.Tensor]:
        """Return the tensors of a model's result, named as in ``outputs``."""
        return self.steps[-1].target.tensors(output)  # type: ignore[no-any-return]

    def unflatten_output(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return the model's result, in its own structure, from the tensors named as in ``outputs``."""
        target = self.steps[-1].target
        return target.build(*(tensors[name] for name in target.names))

    def to_json(self) -> dict[str, Any]:
        """Return the graph as plain data: layers, points, inputs, outputs and fingerprint."""
        return {
            "format": "torchsurgeon.graph/1",
            "model": type(self.model).__name__,
            "traced_by": self.traced_by,
            "opaque": self.opaque,
            "fingerprint": self.fingerprint,
            "batch": self.batch,
            "batch_free": self.batch_free,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "layers": [layer.to_json() for layer in self.layers],
            "points": [point.to_json() for point in self.points],
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the graph, without the weights; made when first asked for."""
        rows: list[Any] = [[s.name, str(s.dtype), s.wire_shape] for s in (*self.inputs, *self.outputs)]
        rows += [[[str(spec.dtype), spec.wire_shape] for spec in layer.outputs] for layer in self.layers]
        names = [step.name for step in self.steps]
        for step in self.flow.running():
            if isinstance(step.target, Constant):
                rows.append([step.name, constant_digest(step.target)])
            elif step.kind != "input":
                rows.append(configuration(step, names))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"LayerGraph({type(self.model).__name__}, {len(self.layers)} layers, {len(self.points)} points)"


def _never(_: Any) -> Any:
    raise AssertionError("inputs are fed and attributes are read, neither is called")


class _Specs:
    """Tensor specs from two runs of the shapes: the example's batch size and one more sample."""

    def __init__(self, shapes: Shapes, more: Shapes | None, batch: int, value_dependent: bool) -> None:
        self.shapes, self.more, self.batch, self.value_dependent = shapes, more, batch, value_dependent
        self.batch_free = more is not None

    def of(self, value: Value) -> TensorSpec:
        return self._spec(
            value.name, value.leaf(self.shapes.values), value.leaf(self.more.values) if self.more else None
        )

    def of_output(self, name: str, ref: Any) -> TensorSpec:
        value = Value(name, ref.step)
        return self._spec(name, value.leaf(self.shapes.values), value.leaf(self.more.values) if self.more else None)

    def layout(self, value: Value) -> Layout | None:
        """Return the layout of a tensor with gaps between its elements, which does not survive a journey; None for
        others."""
        leaf = value.leaf(self.shapes.values)
        if not has_gaps(leaf):
            return None
        spec = self.of(value)
        more = value.leaf(self.more.values).stride() if self.more else leaf.stride()
        grows = tuple(b - a for a, b in zip(leaf.stride(), more, strict=True))
        return Layout(spec.shape, spec.batch_step, leaf.stride(), grows)

    def _spec(self, name: str, leaf: torch.Tensor, more: torch.Tensor | None) -> TensorSpec:
        shape = tuple(leaf.shape)
        step = tuple(b - a for a, b in zip(shape, more.shape, strict=True)) if more is not None else (0,) * len(shape)
        return TensorSpec(name, leaf.dtype, shape, step, self.batch)


def trace(
    model: nn.Module,
    *example_args: Any,
    leaf_modules: Collection[str | type[nn.Module]] = (),
    **example_kwargs: Any,
) -> LayerGraph:
    """Trace ``model``, called with the example, into a :class:`LayerGraph`.

    The model must be in eval mode. It is followed by torch.fx; failing that by torch.export; failing that by torch.fx
    around the modules that cannot be followed, which stay whole. What ``torch.compile`` has wrapped is traced itself.
    The example's tensors give shapes and dtypes only; no layer is computed, unless shapes depend on values. Dimension
    0 of all input tensors is the batch when it has one size for all of them. ``leaf_modules`` names modules (paths or
    classes) to keep whole, as one layer each.

    Raises :class:`~torchsurgeon.errors.TraceError`: the model is in training mode, cannot be followed (the message
    names the line and what to try), changes its own parameters or buffers while it runs, or has dropout left on.
    Warns with :class:`UnrepeatableWarning` when it draws random numbers.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes an nn.Module, not {type(model).__name__}: trace(model, example)")
    model = model._modules.get("_orig_mod") or model
    _refuse_training(model)
    with left_as_it_was(model):
        return _traced(model, Call(model, example_args, example_kwargs), example_args, example_kwargs, leaf_modules)


def _traced(
    model: nn.Module,
    call: Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    leaf_modules: Collection[str | type[nn.Module]],
) -> LayerGraph:
    tensors = call.tensors(args, kwargs)
    captured = capture(model, call, tensors, leaf_modules)
    steps = captured.steps
    try:
        source: MetaModel = MetaModel(model)
        shapes = propagate(steps, tensors, source)
    except TraceError:
        raise
    except Exception:
        # Some step needs values, not only shapes; then the example is run for real, and says itself what is wrong.
        source = RealModel(model)
        shapes = propagate(steps, tensors, source)
    if settle_output(steps, shapes.values, tensors[0].device):
        shapes = with_selections(steps, shapes)
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    more = None
    if len(sizes) == 1 and None not in sizes and _any_batch(captured, tensors):
        alike = [t if isinstance(source, RealModel) else t.detach().to("meta") for t in tensors]
        more = _try_propagate(steps, [torch.cat([t[:1], t]) for t in alike], source, shapes)
    _refuse_randomness([steps[i] for i in shapes.random])
    flow = Flow(steps, shapes, model)
    if not flow.layers:
        raise TraceError(f"{type(model).__name__} computes nothing from its input: there is no layer to cut after")
    specs = _Specs(shapes, more, (next(iter(sizes)) if more is not None else 1) or 1, isinstance(source, RealModel))
    return LayerGraph(model, call, captured, flow, specs)


def _any_batch(captured: Captured, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the path the example took through the model's source is that of batches of other sizes, too."""
    try:
        for extra in (1, 1023):
            more = [torch.empty((t.shape[0] + extra, *t.shape[1:]), dtype=t.dtype, device="meta") for t in tensors]
            if captured.guard is not None:
                captured.guard(more)
    except TypeError:
        return False
    return True


def _try_propagate(
    steps: Sequence[Step], tensors: list[torch.Tensor], source: MetaModel, like: Shapes
) -> Shapes | None:
    """Return the shapes with one more sample, or None when the model does not take one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = propagate(steps, tensors, source, count_flops=False)
    except Exception:
        return None
    for one, other in zip(like.values, more.values, strict=True):
        pair = tensors_in(one), tensors_in(other)
        if len(pair[0]) != len(pair[1]) or any(a.dim() != b.dim() for a, b in zip(*pair, strict=True)):
            return None
    return more


class UnrepeatableWarning(UserWarning):
    """The model answers differently from run to run, so no cut can give "the" answer."""


def _refuse_randomness(drawing: list[Step]) -> None:
    for step in drawing:
        if "dropout" in step.type_name:
            raise TraceError(
                f"layer {step.name!r} drops values at random although the model is in eval mode: pass "
                "training=self.training to it, or remove it"
            )
    if drawing:
        names = ", ".join(repr(step.name) for step in drawing[:5])
        warnings.warn(
            f"{names} draw random numbers: the model's answers differ from run to run, and so do a split model's",
            UnrepeatableWarning,
            stacklevel=4,
        )


def _refuse_training(model: nn.Module) -> None:
    name = next((path for path, module in model.named_modules() if module.training), None)
    if name is not None:
        what = f"submodule {name!r} of {type(model).__name__}" if name else type(model).__name__
        raise TraceError(
            f"{what} is in training mode: dropout and batch statistics would make head and tail give other answers "
            "than the model; call model.eval() first"
        )
