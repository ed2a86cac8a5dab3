"""Writing a bundle: heads of a model, what they cost, and what identifies the model, for a device without PyTorch."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchsurgeon import __version__, _json_file
from torchsurgeon.backends import Backend, find_backend
from torchsurgeon.backends.onnxruntime import OnnxRuntime
from torchsurgeon.backends.part import Part
from torchsurgeon.codec import CodecTable, FittedCodec
from torchsurgeon.edge.bundle import (
    FINGERPRINT,
    FORMAT,
    FRONTIER,
    MANIFEST,
    BundlePoint,
    OnnxPart,
    digest_of,
    read,
    to_json,
)
from torchsurgeon.edge.codec import has
from torchsurgeon.errors import BackendError, BundleError, short
from torchsurgeon.export.fitted import checked_fitted, on_arrays, write_fitted
from torchsurgeon.export.parts import array_specs, write_part
from torchsurgeon.export.premises import batches_of, check_values_free
from torchsurgeon.link.rates import PRESETS
from torchsurgeon.models.watching import WatchedWeights
from torchsurgeon.models.weights import weight_digests
from torchsurgeon.planning import Frontier
from torchsurgeon.planning.costs import CostTable
from torchsurgeon.planning.row import Row
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.profiling import LayerProfile, example_inputs
from torchsurgeon.runtime.handshake import fingerprint_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.reading import plain_tensors
from torchsurgeon.tracing.specs import PartitionPoint

BACKENDS = ("onnxruntime", "onnxruntime:int8")
"""The names of what runs a bundle's parts on a device."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: the bundle.
        points: the points at which it can cut the model.
        size_bytes: bytes of all its files.
        left_out: the codecs that were measured, but that a device without PyTorch does not have, such as a fitted codec
            that was not given.
        in_floats: what is in the bundle in float32, although whole numbers were asked for, since these do not keep the
            budget there: the points of heads, or the whole model, each with what was measured.
    """

    folder: Path
    points: tuple[PartitionPoint, ...]
    size_bytes: int
    left_out: tuple[str, ...]
    in_floats: tuple[str, ...] = ()


def best_points(graph: LayerGraph, device: LayerProfile, server: LayerProfile) -> list[PartitionPoint]:
    """Return the points that are the best over one of the links that torchsurgeon knows by name.

    Args:
        graph: the traced model.
        device: what each layer costs on the device.
        server: what each layer costs on the server.
    """
    frontier = Frontier.build(graph, device, server)
    rows = [frontier.best(link) for link in PRESETS.values()]
    found = {row.index: row.point(graph) for row in rows if not row.on_device}
    return [found[index] for index in sorted(found)] or [graph.points[0]]


def export_bundle(
    graph: LayerGraph,
    folder: str | Path,
    *,
    points: Sequence[int | str | PartitionPoint],
    device: LayerProfile,
    server: LayerProfile,
    codecs: CodecTable | None = None,
    fitted: Sequence[FittedCodec] = (),
    name: str = "net",
    whole: bool = True,
    inputs: Sequence[Tensor] | None = None,
    backend: str | Backend = "onnxruntime",
) -> Exported:
    """Write a bundle, which ``torchsurgeon.edge.open()`` opens on a device without PyTorch.

    Args:
        graph: the traced model, with the weights that its servers have.
        folder: an empty or new folder.
        points: where the device may cut the model.
        device: what each layer costs on the device.
        server: what each layer costs on the server.
        codecs: measured codecs; without them, tensors are sent as they are. The seconds of encoding by a fitted codec
            become more by how much longer NumPy takes here than PyTorch.
        fitted: codecs fitted to the bundle's points, with or without a student, which servers have been given, too.
        name: the name under which servers have the model.
        whole: whether the whole model belongs to it, so that the device can answer alone.
        inputs: the model's input tensors, with which every part is compared with the model; by default random ones.
        backend: what runs the parts on the device: ``"onnxruntime"``, or ``find_backend("onnxruntime:int8", sample=…,
            budget=…)`` for whole numbers of 8 bits. A part that does not keep the budget in these stays in float32.

    Raises:
        BundleError: the folder holds something else, there are no points, or the weights change meanwhile.
        BackendError: a layer cannot be exported to ONNX, which the message names; values of the model's inputs decide
            which path it takes; or the backend is another one, or lacks a sample and a budget.
        CodecError: the backend's sample does not fit the model, or is too small for its budget; or a fitted codec is of
            another model or other points.
        PartitionError: the graph has no such point.
    """
    folder, runs = Path(folder), _backend(backend)
    runs.check(graph)
    check_values_free(graph)
    batches = batches_of(graph)
    chosen = list(dict.fromkeys(graph.point(point) for point in points))
    chosen = [point for point in chosen if point.index != len(graph.layers)]
    if not chosen:
        raise BundleError(
            "a bundle needs at least one point where something crosses to a server; give points other than 'device'"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"a bundle is written to a new or empty folder; {short(folder)} holds something already")
    fitted = checked_fitted(graph, chosen, fitted)
    # Before the first part is written, so that a write in between is noticed.
    weights = WatchedWeights(graph.model, plain_tensors(graph.model, graph.reading).values())
    weights.remember()
    example = example_inputs(graph) if inputs is None else [tensor.detach().cpu() for tensor in inputs]
    taken = array_specs(graph.inputs, [spec.name for spec in graph.inputs])
    every = Part.head(graph, graph.points[-1])
    outputs = array_specs(graph.outputs, every.output_names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own until it is whole, so that an export that fails or is interrupted leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "bundle"
        made.mkdir()
        listed, in_floats = [], []

        def write(part: Part, file: str, what: str) -> OnnxPart:
            try:
                return OnnxPart(file, write_part(part, example, made / file, runs))
            except BackendError as error:
                if runs.judge is None or error.layer is not None:
                    raise
                in_floats.append(f"{what}: {error}")
                return OnnxPart(file, write_part(part, example, made / file))

        for point in chosen:
            part = Part.head(graph, point)
            tensors = array_specs(point.tensors, part.output_names)
            head = None
            if point.index:
                head = write(part, f"heads/{point.index}.onnx", f"the head up to {point.name}")
            listed.append(BundlePoint(point.index, point.name, point.layers, tuple(tensors), head))
        alone = write(every, "whole.onnx", "the whole model") if whole else None
        held = write_fitted(graph, fitted, made, write)
        if codecs is not None:
            codecs = on_arrays(graph, codecs, chosen, fitted, made, example)
        costs, left_out = _costs(graph, chosen, device, server, codecs, {one.name for one in fitted})
        _json_file.write(made / FRONTIER, costs.to_json(), BundleError)
        fingerprint = fingerprint_of(graph, weight_digests(graph.model, graph.reading))
        if not weights.same_in_full():
            raise BundleError(
                "weights of the model were written to while the bundle was made, so its parts may differ; export it "
                "when they stay the same"
            )
        _json_file.write(made / FINGERPRINT, to_json(fingerprint), BundleError)
        files: dict[str, dict[str, Any]] = {
            path.relative_to(made).as_posix(): {"size_bytes": path.stat().st_size, "sha256": digest_of(path)}
            for path in sorted(made.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "format": FORMAT,
            "torchsurgeon": __version__,
            "name": name,
            "model": type(graph.model).__name__,
            "graph": fingerprint.graph,
            "weights": fingerprint.weights,
            "example_batch": graph.batch,
            "batches": batches,
            "valued": graph.sizes_vary,
            "inputs": list(map(to_json, taken)),
            "outputs": list(map(to_json, outputs)),
            "points": list(map(to_json, listed)),
            "whole": None if alone is None else to_json(alone),
            "codecs": list(map(to_json, held)),
            "files": files,
        }
        _json_file.write(made / MANIFEST, manifest, BundleError)
        read(made)
        os.replace(made, folder)
    size = sum(file["size_bytes"] for file in files.values())
    return Exported(folder, tuple(chosen), size, left_out, tuple(in_floats))


def _backend(wanted: str | Backend) -> OnnxRuntime:
    found = find_backend(wanted)
    if not isinstance(found, OnnxRuntime) or found.name not in BACKENDS:
        raise BackendError(f"a bundle's parts are run by {' or '.join(BACKENDS)}; got {found.name}")
    return found


def _costs(
    graph: LayerGraph,
    points: Sequence[PartitionPoint],
    device: LayerProfile,
    server: LayerProfile,
    codecs: CodecTable | None,
    fitted: Collection[str],
) -> tuple[CostTable, tuple[str, ...]]:
    """Return the rows of the chosen points and of the device alone, and the codecs that are left out.

    Those that are named by ``fitted`` are in the bundle.
    """
    wanted = {(point.index, point.layers) for point in points}
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    costs = LayerCosts(graph, device, server)
    known = costs.rows(codecs)
    there = {(row.index, row.layers) for row in known}
    known += [costs.row_of(layers) for index, layers in wanted - there if layers is not None]
    for row in known:
        if not row.on_device and (row.index, row.layers) not in wanted:
            continue
        if has(row.codec) or row.codec.partition("@")[0] in fitted:
            rows.append(row)
        else:
            left_out[row.codec] = None
    answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
    name = type(graph.model).__name__
    table = CostTable(name, graph.fingerprint, graph.batch, len(graph.layers), answer_bytes, tuple(rows), False)
    return table, tuple(left_out)
