"""Checks whether a server's answer can be the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from torchsurgeon.errors import ProtocolError
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import TensorSpec


def check_answer(
    graph: LayerGraph, specs: Sequence[TensorSpec], boundary: Sequence[Tensor], answered: Mapping[str, Tensor]
) -> None:
    """Check the names, types and shapes of an answer against the model's outputs.

    Args:
        graph: the traced model.
        specs: the specs of the boundary tensors.
        boundary: the boundary tensors that were sent; they tell the batch size.
        answered: the answer's tensors by name.

    Raises:
        ProtocolError: a name, type or shape is not one that the outputs can have.
    """
    if (
        len(answered) == len(graph.outputs)
        and _as_traced(specs, boundary)
        and _as_traced(graph.outputs, [answered.get(spec.name) for spec in graph.outputs])
    ):
        return
    valued = graph.sizes_vary or any(graph.value(spec.name).restore for spec in specs)
    batch = None if valued else _batch(specs, boundary)
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


def _as_traced(specs: Sequence[TensorSpec], tensors: Sequence[Tensor | None]) -> bool:
    """Return whether tensors have the types and shapes of the example; the usual case, which is settled soonest."""
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor is None or tensor.shape != spec.shape or tensor.dtype != spec.dtype:
            return False
    return True


def _batch(specs: Sequence[TensorSpec], boundary: Sequence[Tensor]) -> int | None:
    """Return the batch size that explains the boundary's shapes; None if none does, as with images of another size."""
    if specs and all(tensor.shape == spec.shape for spec, tensor in zip(specs, boundary, strict=True)):
        return specs[0].example_batch
    sizes = {
        spec.example_batch + (size - example) // step
        for spec, tensor in zip(specs, boundary, strict=True)
        for size, example, step in zip(tensor.shape, spec.shape, spec.batch_step, strict=False)
        if step
    }
    batch = sizes.pop() if sizes else 1
    fits = all(tensor.shape == spec.at_batch(batch) for spec, tensor in zip(specs, boundary, strict=True))
    return batch if fits and not sizes else None
