"""What goes into a bundle's model and what comes out of it: checked, and under its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchsurgeon.edge.bundle import DATATYPES, ArraySpec, Bundle
from torchsurgeon.errors import ProtocolError, short

Array = np.ndarray[Any, Any]


def checked_inputs(bundle: Bundle, arrays: Sequence[Array], named: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """Return the inputs of a call by name, and their batch size.

    Args:
        bundle: what the device has of the model.
        arrays: inputs in their order.
        named: inputs by name.

    Raises:
        TypeError: an input is missing, unknown, of another dtype or of a shape that the model does not take.
    """
    specs = bundle.inputs
    wanted = ", ".join(map(str, specs))
    names = [spec.name for spec in specs]
    given = {**dict(zip(names, arrays, strict=False)), **named}
    if len(arrays) > len(specs) or len(given) != len(arrays) + len(named) or set(given) != set(names):
        got = [*(["1 array" if len(arrays) == 1 else f"{len(arrays)} arrays"] if arrays else []), *named]
        raise TypeError(f"the model takes {wanted}; got {', '.join(got) or 'nothing'}")
    batches = set()
    for spec in specs:
        array = given[spec.name]
        dtype = DATATYPES[spec.datatype]
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            kind = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"input {spec.name!r} must be a NumPy array of dtype {dtype}; got {kind}")
        batch = _batch_of(spec, array.shape)
        if batch is None:
            raise TypeError(f"the model takes {spec}; got an array of shape {list(array.shape)} as {spec.name!r}")
        if any(spec.batch_step):
            batches.add(batch)
    if len(batches) > 1:
        raise TypeError(f"all inputs must have the same batch size; got {sorted(batches)}")
    batch = batches.pop() if batches else bundle.example_batch
    if batch != bundle.example_batch:
        stuck = next((part.file for part in bundle.parts if not part.free_batch), None)
        if stuck is not None:
            raise TypeError(f"{stuck} of the bundle takes a batch of {bundle.example_batch} only; got {batch}")
    if bundle.batches is not None and not any(first <= batch <= last for first, last in bundle.batches):
        known = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in bundle.batches)
        raise TypeError(
            f"with a batch of {batch} the model takes another path than the bundle's; it takes the same for "
            f"{short(known, 100, quote=False)}; export it with an example of this batch size"
        )
    return given, batch


def check_answer(bundle: Bundle, arrays: Mapping[str, Array], batch: int) -> None:
    """Check that the arrays of an answer are the model's outputs at a batch size.

    Raises:
        ProtocolError: they have other names, dtypes or shapes.
    """
    outputs = bundle.outputs
    if set(arrays) != {spec.name for spec in outputs}:
        raise ProtocolError(
            f"the server answered with tensors {sorted(arrays)}, expected {[spec.name for spec in outputs]}"
        )
    for spec in outputs:
        array, wanted = arrays[spec.name], spec.at_batch(batch)
        fits = array.ndim == len(wanted) if bundle.valued else array.shape == wanted
        if array.dtype != DATATYPES[spec.datatype] or not fits:
            raise ProtocolError(
                f"the server answered with {array.dtype} {list(array.shape)} as {spec.name!r}, expected {spec} at "
                f"batch {batch}"
            )


def result_of(bundle: Bundle, arrays: Mapping[str, Array]) -> Any:
    """Return the outputs as the model returns them: an array, a tuple, or a dict."""
    names = [spec.name for spec in bundle.outputs]
    if names == ["output"]:
        return arrays["output"]
    if names == [f"output.{i}" for i in range(len(names))]:
        return tuple(arrays[name] for name in names)
    return {name: arrays[name] for name in names}


def _batch_of(spec: ArraySpec, shape: tuple[int, ...]) -> int | None:
    """Return the batch size that explains a shape; None where none does."""
    dim = next((dim for dim, step in enumerate(spec.batch_step) if step), None)
    batch = spec.example_batch
    if dim is not None and len(shape) == len(spec.shape):
        batch += (shape[dim] - spec.shape[dim]) // spec.batch_step[dim]
    return batch if batch > 0 and shape == spec.at_batch(batch) else None
