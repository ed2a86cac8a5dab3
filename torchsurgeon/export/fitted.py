"""Fitted codecs of a bundle: their files, their students, and how long a device without PyTorch takes to encode."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchsurgeon.backends.arrays import as_array
from torchsurgeon.backends.part import Part
from torchsurgeon.codec import CodecRow, CodecTable, FittedCodec
from torchsurgeon.codec.names import FITTED
from torchsurgeon.edge.bundle import BundleCodec, OnnxPart
from torchsurgeon.edge.fitted import ArrayFitted
from torchsurgeon.errors import CodecError, short
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

# An encoder is timed so often, or less often where that takes so long.
_REPEATS, _ENOUGH_S = 5, 1.0

WritesPart = Callable[[Part, str, str], OnnxPart]
"""Writes a part to a file of the bundle, both given by name, with what the part is called in messages."""


def checked_fitted(
    graph: LayerGraph, points: Sequence[PartitionPoint], fitted: Sequence[FittedCodec]
) -> list[FittedCodec]:
    """Return each fitted codec once, after checking that it is of a model and of what crosses at one of some points.

    Raises:
        CodecError: one is not; the message says which, and what to do.
    """
    for one in fitted:
        if not isinstance(one, FittedCodec):
            raise CodecError(f"fitted must be codecs that load_codec() or fit_codec() has returned; got {short(one)}")
        one.check(graph)
        names = {tensor.name for tensor in one.tensors}
        at = [point for point in points if names & {spec.name for spec in point.tensors}]
        if one.student is not None:
            at = [point for point in at if _is_students(point, one)]
        if not at:
            raise CodecError(
                f"{one.name} was fitted to what crosses at {short(one.point[1])}, and the bundle has other points: "
                f"{short(', '.join(point.name for point in points), 300, quote=False)}; add this point, or leave the "
                "codec out"
            )
    return list({one.name: one for one in fitted}.values())


def write_fitted(
    graph: LayerGraph, fitted: Sequence[FittedCodec], folder: Path, write_part: WritesPart
) -> list[BundleCodec]:
    """Write the files of fitted codecs, and their students, into a bundle.

    Args:
        graph: the traced model.
        fitted: the codecs, as ``checked_fitted()`` has returned them.
        folder: the bundle's folder.
        write_part: writes a part of the model.
    """
    written = []
    for one in fitted:
        file = folder / _file_of(one)
        file.parent.mkdir(exist_ok=True)
        one.save(file)
        student = None
        if one.student is not None:
            point = graph.point(one.point[0])
            part = Part.student(graph, point, one.student.segment(graph, point.index))
            student = write_part(part, f"students/{file.stem}.onnx", f"the student of {one.name}")
        written.append(BundleCodec(one.name, _file_of(one), student))
    return written


def on_arrays(
    graph: LayerGraph,
    table: CodecTable,
    points: Sequence[PartitionPoint],
    fitted: Sequence[FittedCodec],
    folder: Path,
    example: Sequence[Tensor],
) -> CodecTable:
    """Return a table of measured codecs with what encoding takes on a device without PyTorch.

    A fitted codec takes longer there, since no compiled extension codes its coefficients. Here it is timed both ways on
    what crosses for the example. As many times as it takes longer, the table's seconds become more.

    Args:
        graph: the traced model.
        table: the table, whose seconds of encoding are those by PyTorch.
        points: the bundle's points.
        fitted: the bundle's codecs.
        folder: the bundle's folder, in which their files stand.
        example: the model's input tensors.
    """
    by_name = {one.name: one for one in fitted}
    places = {(point.index, point.layers): point for point in points}
    crossing: dict[tuple[PartitionPoint, str], list[Tensor]] = {}
    arrays: dict[str, ArrayFitted] = {}
    rows: list[CodecRow] = []
    for row in table.rows:
        name, _, rate = row.cost.codec.partition("@")
        one, point = by_name.get(name), places.get((row.point, row.layers))
        if one is not None and point is not None and row.cost.within_budget:
            if name not in arrays:
                arrays[name] = ArrayFitted.load(folder / _file_of(one))
            if (point, name) not in crossing:
                crossing[point, name] = _crossing(graph, point, one, example)
            names = [spec.name for spec in point.tensors]
            longer = _longer(one, arrays[name], rate, names, crossing[point, name])
            row = dataclasses.replace(row, cost=dataclasses.replace(row.cost, encode_s=row.cost.encode_s * longer))
        rows.append(row)
    return dataclasses.replace(table, rows=tuple(rows))


def _file_of(fitted: FittedCodec) -> str:
    return f"codecs/{fitted.name.removeprefix(FITTED)}.fitted"


def _is_students(point: PartitionPoint, fitted: FittedCodec) -> bool:
    return fitted.at(fitted.rates[0]).student_at(point) is not None


def _crossing(graph: LayerGraph, point: PartitionPoint, fitted: FittedCodec, example: Sequence[Tensor]) -> list[Tensor]:
    """Return what crosses at a point for an example: of the codec's student, or of the model's own layers."""
    segment = Part.head(graph, point).segment
    if fitted.student is not None and _is_students(point, fitted):
        segment = fitted.student.segment(graph, point.index)
    with torch.inference_mode(False), torch.no_grad():
        return [tensor.detach().cpu().contiguous() for tensor in segment(*example)]


def _longer(
    fitted: FittedCodec, arrays: ArrayFitted, rate: str, names: Sequence[str], tensors: Sequence[Tensor]
) -> float:
    """Return how many times as long encoding takes by NumPy as by PyTorch and the compiled extension."""
    by_torch, by_numpy = fitted.at(rate), arrays.at(rate)
    pairs = list(zip(names, tensors, [as_array(tensor) for tensor in tensors], strict=True))
    taken: list[tuple[float, float]] = []
    while len(taken) < 2 or (len(taken) <= _REPEATS and sum(map(sum, taken)) < _ENOUGH_S):
        begin_s = time.perf_counter()
        for name, tensor, _array in pairs:
            by_torch.encode(tensor, name)
        between_s = time.perf_counter()
        for name, _tensor, array in pairs:
            by_numpy.encode(array, name)
        taken.append((between_s - begin_s, time.perf_counter() - between_s))
    # The first run makes what later ones use again.
    torch_s, numpy_s = (statistics.median(times) for times in zip(*taken[1:], strict=True))
    return float(numpy_s / max(torch_s, 1e-9))
