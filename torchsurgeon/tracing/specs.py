"""What a traced model is made of, as plain data: its tensors, its layers and the points where it can be cut."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from torchsurgeon._cached import cached_property
from torchsurgeon._place import place_text
from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.crossing import obstacle
from torchsurgeon.tracing.flow import Value
from torchsurgeon.tracing.layout import Layout, Lazy, has_gaps
from torchsurgeon.tracing.shapes import Shapes


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that may cross a boundary.

    Attributes:
        name: its name, unique in the graph.
        dtype: its element type.
        shape: its shape in the traced example.
        batch_step: by how much each dimension grows with every further sample in the batch: ``(1, 0, 0, 0)`` for an
            image tensor, ``(64, 0, 0)`` where 64 windows are folded into the batch, all zeros where the batch size
            does not matter or is not free.
        example_batch: the batch size of the traced example.
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

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the traced example."""
        return self.dtype.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        dims = "×".join(
            "N" if s == 1 else f"{s}N" if s else str(n) for n, s in zip(self.shape, self.batch_step, strict=True)
        )
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}[{dims}]"

    def to_json(self) -> dict[str, Any]:
        """Return the tensor as plain data."""
        return {
            "name": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "batch_step": list(self.batch_step),
            "size_bytes": self.size_bytes,
        }


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation of the model: a call of a module, or of a function on tensors.

    Attributes:
        index: its place in the order the model runs its layers, from 0.
        name: the path of the module (``layer1.0.conv1``); for a function, the path of the module that calls it and the
            function's name (``layer1.0.add``). Later calls of the same are numbered (``layer1.0.relu_1``).
        type: the class of the module, or the name of the function.
        inputs: the tensors it reads that depend on the model's inputs.
        outputs: the tensors it gives.
        flops: its floating-point operations at the example's batch. As in PyTorch's flop counter, multiply and add
            count as two, and only matrix products, convolutions and attention count.
        parameter_bytes: bytes of the parameters that it uses, and of the packed weights of quantized modules.
        uncounted: the operators inside it whose flops are unknown: custom ones, and those of PyTorch that multiply and
            add more than once per element but that its flop counter has no formula for (``aten::_fft_r2c``).
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
        """Return the layer as plain data; inputs by name only."""
        fields = {k: getattr(self, k) for k in ("index", "name", "type", "flops", "parameter_bytes", "uncounted")}
        return fields | {
            "inputs": [spec.name for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }


@dataclasses.dataclass(frozen=True)
class PartitionPoint:
    """A place to cut: the first ``index`` layers run on the device, the others on the server.

    At point 0 all layers run on the server, and the model's inputs cross. At the last point all layers run on the
    device, and the tensors are the model's outputs. Where a cut would separate views of memory that is overwritten,
    the index is missing from the graph's points.

    The index of a cut that would have to carry what cannot be sent (a sparse tensor, an object) is missing, too.

    A cut across parallel branches (``LayerGraph.point_of()``) is not among the graph's points.

    Attributes:
        index: how many layers run on the device.
        name: the last layer on the device; ``input`` at point 0. Across branches, the last ones joined by ``+``.
        tensors: the boundary tensors, which cross from the device to the server.
        layers: across branches, the indices of the layers on the device; None where they are the first ``index`` ones.
        on_device: whether all layers run on the device, and nothing crosses.
    """

    index: int
    name: str
    tensors: tuple[TensorSpec, ...]
    layers: tuple[int, ...] | None = None
    on_device: bool = False

    @property
    def where(self) -> str:
        """Where it cuts, in words: ``all on the server``, ``cut after features.5`` or ``all on the device``."""
        return place_text(self.index, self.name, on_device=self.on_device)

    @property
    def place(self) -> tuple[int, tuple[int, ...] | None]:
        """What tells it from all other points of its graph, one across branches with as many layers among them."""
        return self.index, self.layers

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all boundary tensors in the traced example."""
        return sum(spec.size_bytes for spec in self.tensors)

    def __str__(self) -> str:
        crosses = f"{', '.join(map(str, self.tensors))}; {self.size_bytes} bytes"
        return f"point {self.index} ({self.where}): {'nothing crosses' if self.on_device else crosses}"

    def to_json(self) -> dict[str, Any]:
        """Return the point as plain data."""
        return {
            "index": self.index,
            "name": self.name,
            "size_bytes": self.size_bytes,
            "tensors": [spec.to_json() for spec in self.tensors],
        }


class Specs:
    """Makes tensor specs from the shapes at two batch sizes.

    Args:
        shapes: the shapes of the example.
        more: the shapes with one more sample in the batch; None where the batch is not free.
        batch: the example's batch size.
        value_dependent: whether the shapes depend on values, so that the example was run for real.
    """

    def __init__(self, shapes: Shapes, more: Shapes | None, batch: int, value_dependent: bool) -> None:
        self.shapes, self.more, self.batch, self.value_dependent = shapes, more, batch, value_dependent
        self.batch_free = more is not None

    def of(self, value: Value) -> TensorSpec:
        """Return the spec of a value that may cross."""
        return self._spec(
            value.name, value.leaf(self.shapes.values), value.leaf(self.more.values) if self.more else None
        )

    def of_output(self, name: str, ref: Any) -> TensorSpec:
        """Return the spec of one of the model's outputs, which is the whole value of the step that ``ref`` names.

        Raises:
            TraceError: the output cannot cross.
        """
        value = Value(name, ref.step)
        why = obstacle(value.leaf(self.shapes.values))
        if why is not None:
            raise TraceError(
                f"the model returns {why} as {short(name, 100)}, which a server cannot send; return dense tensors, and "
                "convert them where the model is called"
            )
        return self._spec(name, value.leaf(self.shapes.values), value.leaf(self.more.values) if self.more else None)

    def layout(self, value: Value) -> Layout | Lazy | None:
        """Return what gives a tensor its layout again after it crossed; None for one that crosses as it lies."""
        leaf = value.leaf(self.shapes.values)
        layout = self._strides(value, leaf) if has_gaps(leaf) else None
        if leaf.is_conj() or leaf.is_neg():
            return Lazy(layout, leaf.is_conj(), leaf.is_neg())
        return layout

    def _strides(self, value: Value, leaf: torch.Tensor) -> Layout:
        spec = self.of(value)
        more = value.leaf(self.more.values).stride() if self.more else leaf.stride()
        grows = tuple(b - a for a, b in zip(leaf.stride(), more, strict=True))
        return Layout(spec.shape, spec.batch_step, leaf.stride(), grows)

    def _spec(self, name: str, leaf: torch.Tensor, more: torch.Tensor | None) -> TensorSpec:
        shape = tuple(leaf.shape)
        step = tuple(b - a for a, b in zip(shape, more.shape, strict=True)) if more is not None else (0,) * len(shape)
        return TensorSpec(name, leaf.dtype, shape, step, self.batch)
