"""What is checked of a request's tensors before a model runs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import TensorSpec


def value_check(graph: LayerGraph, name: str, names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], None] | None:
    """Return what refuses inputs whose values take another path than the traced one; None where values decide nothing.

    Args:
        graph: the traced model.
        name: the model's name.
        names: the names of the tensors in a request.
    """
    inputs, check = [spec.name for spec in graph.inputs], graph.check_values
    if check is None or not set(inputs) <= set(names):
        return None

    def check_inputs(tensors: Mapping[str, Tensor]) -> None:
        try:
            check([tensors[one] for one in inputs])
        except TypeError as error:
            raise ProtocolError(f"model {name!r}: {error}") from None

    return check_inputs


def check_tensors(graph: LayerGraph, tensors: Mapping[str, Tensor], max_batch: int, max_times: float) -> bool:
    """Check the dtypes and the shapes of tensors against a graph. Names that the graph does not have are left out.

    Args:
        graph: the traced model.
        tensors: the tensors by name.
        max_batch: the largest batch.
        max_times: the most times the example's bytes that a tensor may have.

    Returns:
        Whether all shapes are those of the example at some batch size. If not (an image of another size), they have to
        be checked by ``check_shapes()``.

    Raises:
        ProtocolError: a dtype, rank or size is not possible in this graph, or the tensors differ in their batch size.
    """
    usual = True
    batch: int | None = None
    decided_by = ""
    for name, tensor in tensors.items():
        spec = graph.values.get(name)
        if spec is None:
            continue
        if tensor.dtype != spec.dtype:
            raise ProtocolError(
                f"tensor {short(name)} must be {wire.datatype_of(spec.dtype)}; got {wire.datatype_of(tensor.dtype)}"
            )
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
                f"tensor {short(name)} must have shape {list(spec.wire_shape)}{problem}, or another size of at most "
                f"{max_times:g} times the example's bytes (a larger --max-batch raises that); got shape {list(shape)}"
            )
        if any(spec.batch_step):
            if batch is not None and own != batch:
                raise ProtocolError(
                    f"all tensors must have the same batch size; {short(decided_by, 100)} is a batch of {batch}, and "
                    f"{short(name, 100)} is a batch of {own}"
                )
            batch, decided_by = own, name
    return usual


def samples_in(graph: LayerGraph, tensors: Mapping[str, Tensor]) -> int:
    """Return how many samples a request has, of tensors that were checked; the example's number where none tells it."""
    for name, tensor in tensors.items():
        spec = graph.values.get(name)
        if spec is not None and any(spec.batch_step):
            return _batch_of(spec, tuple(tensor.shape)) or graph.batch
    return graph.batch


def _batch_of(spec: TensorSpec, shape: tuple[int, ...]) -> int | None:
    """Return the batch size of a shape (the example's, where the shape does not depend on it); None if it fits none."""
    if len(shape) != len(spec.shape):
        return None
    batch = spec.example_batch
    for size, example, step in zip(shape, spec.shape, spec.batch_step, strict=True):
        if step:
            batch = spec.example_batch + (size - example) // step
            break
    return batch if batch >= 1 and spec.at_batch(batch) == shape else None


def tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    """Return the protocol's description of a tensor."""
    return {"name": spec.name, "datatype": wire.datatype_of(spec.dtype), "shape": list(spec.wire_shape)}
