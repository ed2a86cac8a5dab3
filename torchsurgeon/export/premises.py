"""For which calls an exported part answers as the model does, where nothing but the sizes of arrays can be checked."""

from __future__ import annotations

import torch

from torchsurgeon.errors import BackendError, short
from torchsurgeon.tracing.graph import LayerGraph

_MOST_BATCH = 1024


def check_values_free(graph: LayerGraph) -> None:
    """Refuse a model in which values of its inputs decide which path it takes, since a device would not notice.

    Raises:
        BackendError: it is one.
    """
    if graph.check_values is None:
        return
    deciding = [spec.name for spec in graph.inputs if not (spec.dtype.is_floating_point or spec.dtype.is_complex)]
    raise BackendError(
        f"{type(graph.model).__name__} tests the values of {short(', '.join(deciding), 100)} and goes on by what it "
        "finds, and without PyTorch every call would take the example's path; trace the model without these inputs, or "
        "have it compute the same for all their values"
    )


def batches_of(graph: LayerGraph) -> list[tuple[int, int]] | None:
    """Return the batch sizes for which the model takes the traced path, as the first and last of each run of them.

    All sizes up to 1024 are tried.

    Returns:
        None where all of these do, or where the batch is not free.

    Raises:
        BackendError: not even the example's does, for arrays in row-major order.
    """
    if not graph.batch_free:
        _check(graph, graph.batch)
        return None
    held = [batch for batch in range(1, _MOST_BATCH + 1) if _holds(graph, batch)]
    if graph.batch not in held:
        _check(graph, graph.batch)
    if len(held) == _MOST_BATCH:
        return None
    there = set(held)
    firsts = [batch for batch in held if batch - 1 not in there]
    lasts = [batch for batch in held if batch + 1 not in there]
    return list(zip(firsts, lasts, strict=True))


def _holds(graph: LayerGraph, batch: int) -> bool:
    try:
        _check_sizes(graph, batch)
    except TypeError:
        return False
    return True


def _check(graph: LayerGraph, batch: int) -> None:
    try:
        _check_sizes(graph, batch)
    except TypeError as error:
        raise BackendError(
            f"arrays are given in row-major order, for which the trace does not hold: {short(error, quote=False)}"
        ) from None


def _check_sizes(graph: LayerGraph, batch: int) -> None:
    """Check sizes alone, on tensors without elements."""
    graph.check_sizes(
        [
            torch.empty(spec.at_batch(batch) if graph.batch_free else spec.shape, dtype=spec.dtype, device="meta")
            for spec in graph.inputs
        ]
    )
