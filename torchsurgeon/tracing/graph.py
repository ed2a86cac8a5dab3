"""A model as a graph of layers, with every point where it can be cut.

A ``LayerGraph`` names each layer by its module path, and lists each ``PartitionPoint`` with the boundary tensors that
cross from the device to the server there.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon._cached import cached_property
from torchsurgeon.errors import PartitionError, short
from torchsurgeon.tracing.aliases import Aliases
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.capture import Captured
from torchsurgeon.tracing.closure import Closure
from torchsurgeon.tracing.configuration import Configuration
from torchsurgeon.tracing.digests import tensor_digest
from torchsurgeon.tracing.flow import DataFlow, Value
from torchsurgeon.tracing.gradients import check_asked
from torchsurgeon.tracing.held import holdings, parameter_holdings
from torchsurgeon.tracing.questions import check_inputs
from torchsurgeon.tracing.reading import Reading, plain_tensors, read_model
from torchsurgeon.tracing.replaced import functions_of_pytorch, replaced_functions
from torchsurgeon.tracing.results import Left
from torchsurgeon.tracing.shapes import MetaModel, storage_of
from torchsurgeon.tracing.specs import Layer, PartitionPoint, Specs, TensorSpec


class LayerGraph:
    """A traced model, as ``trace()`` returns it. It does not change, and it shares the model's parameters.

    Attributes:
        model: the model itself.
        layers: every ``Layer``, in the order the model runs them.
        points: every ``PartitionPoint``, from all layers on the server to all layers on the device.
        inputs: the model's own input tensors.
        outputs: the model's own output tensors.
        values: every tensor that may cross a boundary, by name.
        batch: the example's batch size; 1 where the batch is not free.
        batch_free: whether the model takes other batch sizes. Where it does not, the example counts as one sample.
        traced_by: ``"recorded"``, ``"export"``, or ``"hierarchical"`` (recorded, with modules kept whole that cannot be
            followed).
        verified: for which inputs the model and the traced steps were seen to give the same bits; empty where they were
            not compared.
        left: what a call with the example leaves in the model; None where they were not compared.
        decided_by: the model's own tensors whose elements decided which path was traced, by name, with their digests.
        opaque: by path, each module kept whole as one layer, and why.
        check_values: raises ``TypeError`` for input tensors whose values would take another path than the traced one;
            None where values decide nothing.
        value_dependent: whether shapes depend on values, so that the example was run for real.
        sizes_vary: whether values decide some of the sizes, as how many objects a detector finds; sizes are then those
            of the example, or the largest there can be.
        fingerprint: hex digest of the layers' names, types, configurations, shapes and order, not of the weights.
    """

    def __init__(self, model: nn.Module, call: Call, captured: Captured, flow: DataFlow, specs: Specs) -> None:
        self.model = model
        self.traced_by, self.opaque, self._guard = captured.traced_by, dict(captured.opaque), captured.guard
        self._asked, self.check_values = captured.asked, captured.check_values
        self._asked_of_inputs, self._settled = captured.asked_of_inputs, captured.settled
        self.value_dependent = specs.value_dependent
        self.sizes_vary = specs.value_dependent or bool(specs.shapes.bound)
        self.verified: tuple[str, ...] = ()
        self.left: Left | None = None
        self.decided_by = {name: tensor_digest(operator.attrgetter(name)(model)) for name in sorted(captured.stored)}
        self._deciding = [(tensor, tensor_digest(tensor)) for tensor in captured.constants]
        self._formed = captured.formed
        self._forms = _forms(model)
        steps = captured.steps
        self._aliases = Aliases(steps, specs.shapes, MetaModel(model))
        written = frozenset().union(*specs.shapes.overwrites)
        self._writes_to_inputs = any(
            storage_of(specs.shapes.values[step.index]) in written for step in steps if step.kind == "input"
        )
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
                on_device=k == len(self.layers),
            )
            for k, boundary in boundaries.items()
        )
        self._points = {point.name: point for point in self.points} | {point.index: point for point in self.points}

    def _layer(self, i: int, index: int, specs: Specs) -> Layer:
        step = self.steps[index]
        parameters = parameter_holdings(step.target.modules()) if step.is_module else {}
        parameters |= holdings(self.flow.attributes_of(step, self.model))
        return Layer(
            index=i,
            name=step.name,
            type=step.type_name,
            inputs=tuple(self.values[v.name] for v in self.flow.reads(step)),
            outputs=tuple(specs.of(v) for v in self.flow.gives(index)),
            flops=specs.shapes.flops[index],
            parameter_bytes=sum(parameters.values()),
            uncounted=tuple(sorted(specs.shapes.uncounted[index])),
        )

    def point(self, ref: int | str | PartitionPoint) -> PartitionPoint:
        """Return a partition point.

        Args:
            ref: its index (a negative one counts from the end), the name of the last layer on the device, or
                ``"server"`` or ``"device"`` for the point at which all layers run there. A point of this graph is
                returned as it is.

        Raises:
            PartitionError: the graph has no such point; the message lists the nearest.
        """
        if isinstance(ref, PartitionPoint):
            known = {spec.name for spec in self.outputs} if ref.index == len(self.layers) else self.values
            foreign = next((spec.name for spec in ref.tensors if spec.name not in known), None)
            if foreign is not None:
                raise PartitionError(
                    f"the partition point after {short(ref.name, 100)} is of another model: this graph has no tensor "
                    f"{short(foreign, 100)}; take one of graph.points"
                )
            return ref
        if not isinstance(ref, (int, str)) or isinstance(ref, bool):
            raise PartitionError(f"a partition point must be an index or a layer's name; got {short(ref)}")
        if ref in ("server", "device"):
            return self.points[0 if ref == "server" else -1]
        key = ref + len(self.layers) + 1 if isinstance(ref, int) and ref < 0 else ref
        found = self._points.get(key)
        if found is not None:
            return found
        if isinstance(ref, int):
            stuck = self.flow.withheld.get(int(key))
            if stuck is not None:
                raise PartitionError(
                    f"there is no cut at point {ref}, because {stuck}, which is not sent; cut elsewhere"
                )
            near = sorted(self.points, key=lambda p: abs(p.index - int(key)))[:3]
            listed = ", ".join(f"{p.index} ({p.name})" for p in sorted(near, key=lambda p: p.index))
            raise PartitionError(
                f"there is no partition point {short(ref, 40)}; the points are 0 … {len(self.layers)}, the nearest "
                f"{listed}"
            )
        names = [point.name for point in self.points]
        stuck = next((why for k, why in self.flow.withheld.items() if ref == self.layers[k - 1].name), None)
        if stuck is not None:
            raise PartitionError(f"there is no cut after {ref!r}, because {stuck}, which is not sent; cut elsewhere")
        inside = [name for name in names if name.startswith(f"{ref}.")]
        if inside:
            raise PartitionError(
                f"{ref!r} is a module with layers inside; name one of them, the last is {inside[-1]!r}"
            )
        near_names = difflib.get_close_matches(ref[:200], names, n=5, cutoff=0.3) or names[:5]
        word = difflib.get_close_matches(ref[:200].lower(), ("device", "server"), n=1, cutoff=0.8)
        if word:
            raise PartitionError(f'there is no layer {short(ref)} to cut after; did you mean "{word[0]}"?')
        raise PartitionError(
            f"there is no layer {short(ref)} to cut after; near it: {', '.join(near_names)}; or "
            '"device" or "server" for everything on one side'
        )

    @cached_property
    def closure(self) -> Closure:
        """Which layers need which; computed at the first use."""
        return Closure(self.flow)

    def point_of(self, layers: Collection[int]) -> PartitionPoint:
        """Return the cut that runs exactly ``layers`` on the device: one of ``points``, or one across branches.

        Args:
            layers: the layers on the device, by index.

        Raises:
            PartitionError: an index is out of range, a layer needs one that is not listed, or the layers share memory
                with others in a way that only the graph's own points allow.
        """
        inside = sorted(set(layers))
        if inside and not 0 <= inside[0] <= inside[-1] < len(self.layers):
            raise PartitionError(
                f"layers must be indices from 0 to {len(self.layers) - 1}; got {inside[0]} to {inside[-1]}"
            )
        if inside == list(range(len(inside))) and len(inside) in self._points:
            return self._points[len(inside)]
        boundary = self.closure.crossing(inside, self._sizes)
        if boundary is None or self.closure.prefixes_only:
            reason = (
                "some need layers that are not among them, or what is not sent"
                if boundary is None
                else "they share memory with others"
            )
            raise PartitionError(
                f"{len(inside)} layers cannot run apart from the rest: {reason}; use one of the graph's points"
            )
        needed = {j for i in inside for j in self.closure.needs[i]}
        name = "+".join(self.layers[i].name for i in inside if i not in needed)
        return PartitionPoint(len(inside), name, tuple(self.values[v.name] for v in boundary), tuple(inside))

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return a call's tensors by input name.

        Args:
            *args: the call's positional arguments.
            **kwargs: the call's keyword arguments.

        Raises:
            TypeError: the call is unlike the traced example in anything but the values, and allowed sizes, of tensors.
        """
        return dict(zip(self.call.names, self.tensors_of_call(args, kwargs), strict=True))

    def tensors_of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return a call's tensors in the order of ``inputs``.

        Raises:
            TypeError: as ``bind()`` raises it.
        """
        tensors = self.call.tensors(args, kwargs)
        self.check_sizes(tensors)
        if self._asked:
            check_asked(self._asked, self.call.names, tensors)
        if self._asked_of_inputs:
            check_inputs(self._asked_of_inputs, self.call.names, tensors)
        if self.check_values is not None:
            self.check_values(tensors)
        return tensors

    def decides_anew(self) -> str | None:
        """Return the name of a tensor of ``decided_by`` that has changed or is gone; None if there is none."""
        for name, digest in self.decided_by.items():
            try:
                if tensor_digest(operator.attrgetter(name)(self.model)) != digest:
                    return name
            except AttributeError:
                return name
        for tensor, digest in self._deciding:
            if tensor_digest(tensor) != digest:
                known = plain_tensors(self.model, self.reading)
                return next((name for name, one in known.items() if one is tensor), "a tensor that the code reads")
        return None

    def reformed(self) -> str | None:
        """Return in a sentence how the model's own tensors have another form than when it was traced; None if not.

        Dtype, sizes and strides count where the code reads one of them, and everywhere which names stand for one and
        the same tensor.
        """
        now = _forms(self.model)
        for name, (form, same) in self._forms.items():
            if name not in now:
                continue
            if name in self._formed and now[name][0] != form:
                return (
                    f"{short(name)} has another dtype, shape or layout in memory than when it was traced, and the "
                    "model's code reads that"
                )
            if same != name and same in now and now[name][1] != now[same][1]:
                return f"{short(name)} and {short(same)} were one tensor when it was traced, and are two now"
            became = now[name][1]
            if same == name and became != name and became in self._forms:
                return f"{short(name)} and {short(became)} were two tensors when it was traced, and are one now"
        return None

    def check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check that the model would do what it did when it was traced for input tensors of such sizes and dtypes.

        Their layout in memory counts, too, where it decides what the model does.

        Args:
            tensors: the model's input tensors, in the order of ``inputs``.

        Raises:
            TypeError: it would not; the message names the size.
        """
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if tensor.dtype is not spec.dtype:
                raise TypeError(
                    f"argument {short(spec.name, 100)} must be of the example's dtype {spec.dtype}; got "
                    f"{tensor.dtype}; convert it, or trace the model again with an example of this dtype"
                )
            # The rank of a tensor is the same in all calls: a model may ask for it, and count dimensions from the end.
            if tensor.dim() != len(spec.shape):
                raise TypeError(
                    f"argument {short(spec.name, 100)} must have {len(spec.shape)} dimensions as in the example; got "
                    f"{tensor.dim()}; reshape it, or trace the model again with an example of this form"
                )
        if self._guard is not None:
            self._guard(tensors)
        self.check_memory(tensors)

    def check_memory(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check that what the model overwrites is what it overwrote in the example.

        Args:
            tensors: the model's input tensors, in the order of ``inputs``.

        Raises:
            TypeError: it would not be, since of two input tensors that share memory the model overwrites one, or since
                a call copies a tensor where it did not.
        """
        if self._writes_to_inputs and len(tensors) > 1:
            apart = {id(tensor): storage_of(tensor) for tensor in tensors}
            if len(set(apart.values())) < len(apart):
                raise TypeError(
                    "two arguments of the call share memory, and the model overwrites an argument; pass a clone of one "
                    "of them"
                )
        if self._aliases:
            self._aliases.check(tensors)

    def value(self, name: str) -> Value:
        """Return which step makes the tensor ``name``, and where in that step's value it lies."""
        return self._values[name]

    def unflatten_output(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return the model's result, in its own structure, from tensors that are named as in ``outputs``."""
        return self.steps[-1].target.build(*[tensors[spec.name] for spec in self.outputs])

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

    @cached_property
    def reading(self) -> Reading:
        """What the model's call reads besides its inputs; found out at the first use."""
        left = None if self.left is None else self.left._replace(settled=self._settled)
        return read_model(self.model, self.call.fixed, left)

    @cached_property
    def configuration(self) -> Configuration:
        """What the layers compute, the weights aside; found out at the first use."""
        names = [step.name for step in self.steps]
        kept = {id(tensor): name for name, tensor in plain_tensors(self.model, self.reading).items()}
        replaced = replaced_functions(functions_of_pytorch(map(type, self.model.modules()), self.reading))
        return Configuration((*self.inputs, *self.outputs), self.layers, self.flow.running(), names, kept, replaced)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the graph, not of the weights; computed at the first use."""
        return self.configuration.fingerprint

    def __repr__(self) -> str:
        return f"LayerGraph({type(self.model).__name__}, {len(self.layers)} layers, {len(self.points)} points)"


def _forms(model: nn.Module) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Return, by name, dtype, shape and strides of a model's own tensors, and the first name of the same tensor."""
    first: dict[int, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (_form(tensor), first.setdefault(id(tensor), name)) for name, tensor in named}


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride() if tensor.layout is torch.strided else None


def _never(_: Any) -> Any:
    raise AssertionError("inputs are fed and attributes are read, neither is called")
