"""Tails for other inference servers: a model repository of NVIDIA Triton, and one of the OpenVINO Model Server.

Inputs and outputs have the names that device and server use with torchsurgeon, so the boundary tensors of a head are
the inputs of the tail there.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchsurgeon import _json_file, _whole_file
from torchsurgeon.backends.part import Part
from torchsurgeon.cutting.partition import Head, cut
from torchsurgeon.errors import BackendError, BundleError, short
from torchsurgeon.export.parts import write_part
from torchsurgeon.export.premises import batches_of, check_values_free
from torchsurgeon.profiling import example_inputs
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec
from torchsurgeon.wire.tensors import datatype_of

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def export_triton(
    graph: LayerGraph,
    folder: str | Path,
    *,
    point: int | str | PartitionPoint,
    name: str = "net",
    inputs: Sequence[Tensor] | None = None,
) -> Path:
    """Write the tail behind a point as a model repository of NVIDIA Triton, and return the model's folder in it.

    Args:
        graph: the traced model.
        folder: the model repository. It may hold other models, and is made if it does not exist.
        point: the point where the device cuts the model.
        name: the model's name in the repository.
        inputs: the model's input tensors, with which the tail is compared with the model; by default random ones.

    Raises:
        BackendError: a layer cannot be exported to ONNX, which the message names; values of the model's inputs decide
            which path it takes; or Triton cannot take what crosses.
        BundleError: the repository has a model of this name already, or the name is no name of a folder.
        PartitionError: the graph has no such point.
    """
    model = _folder(folder, name)
    part, free_batch = _write_tail(graph, point, model, inputs)
    shown = [
        f"name: {_quoted(name)}",
        'platform: "onnxruntime_onnx"',
        "# Each shape is given as a whole: with 0, Triton does not put the batch dimension before it.",
        "max_batch_size: 0",
    ]
    named = [("input", [(spec, spec.name) for spec in part.computed_inputs])]
    named += [("output", list(zip(part.outputs, part.output_names, strict=True)))]
    for kind, specs in named:
        for spec, called in specs:
            shape = spec.wire_shape if free_batch else spec.shape
            shown += [
                f"{kind} {{",
                f"  name: {_quoted(called)}",
                f"  data_type: {_triton_type(spec)}",
                f"  dims: [ {', '.join(map(str, shape))} ]",
                "}",
            ]
    _whole_file.write(model / "config.pbtxt", ("\n".join(shown) + "\n").encode(), BundleError)
    return model


def export_openvino(
    graph: LayerGraph,
    folder: str | Path,
    *,
    point: int | str | PartitionPoint,
    name: str = "net",
    mounted_at: str = "/models",
    inputs: Sequence[Tensor] | None = None,
) -> Path:
    """Write the tail behind a point for the OpenVINO Model Server, with its ``config.json``.

    Args:
        graph: the traced model.
        folder: where the models of the server lie. Other models in its ``config.json`` stay.
        point: the point where the device cuts the model.
        name: the model's name there.
        mounted_at: the path of ``folder`` as the server sees it, such as in its container.
        inputs: as ``export_triton()`` takes them.

    Returns:
        The model's folder.

    Raises:
        BackendError: a layer cannot be exported to ONNX, which the message names; or values of the model's inputs
            decide which path it takes.
        BundleError: the folder has a model of this name already, or holds a ``config.json`` of another kind.
        PartitionError: the graph has no such point.
    """
    config = Path(folder) / "config.json"
    listed: list[Any] = []
    if config.exists():
        data = _json_file.read(config, BundleError, "write the models to another folder")
        listed = data.get("model_config_list", ()) if isinstance(data, dict) else ()  # type: ignore[assignment]
        if not isinstance(listed, list):
            raise BundleError(f"{short(config)} has no model_config_list; write the models to another folder")
    model = _folder(folder, name)
    _write_tail(graph, point, model, inputs)
    listed.append({"config": {"name": name, "base_path": f"{mounted_at.rstrip('/')}/{name}"}})
    _json_file.write(config, {"model_config_list": listed}, BundleError)
    return model


def _folder(folder: str | Path, name: str) -> Path:
    """Return where a model is written."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise BundleError(f"a model's name is a folder of letters, digits, '_', '-' and '.'; got {short(name, 100)}")
    model = Path(folder) / name
    if model.exists():
        raise BundleError(f"{short(model)} exists already; remove it, or give another name")
    return model


def _write_tail(
    graph: LayerGraph, point: int | str | PartitionPoint, model: Path, inputs: Sequence[Tensor] | None
) -> tuple[Part, bool]:
    """Write the tail as version 1 of a model; return it, and whether it takes any batch size."""
    where = graph.point(point)
    if where.index == len(graph.layers):
        raise BundleError("behind the point 'device' there is no tail; cut earlier")
    check_values_free(graph)
    part = Part.tail(graph, [spec.name for spec in where.tensors])
    if batches_of(graph) is not None:
        # Other servers know of a size only whether it is free.
        part = dataclasses.replace(part, batch_free=False)
    if part.numbers:
        numbers = ", ".join(part.inputs[i].name for i in sorted(part.numbers))
        raise BackendError(
            f"numbers of the model's code cross at {where.name} ({short(numbers, 200, quote=False)}), and an exported "
            "tail has them fixed, so it would not take the device's requests; cut elsewhere"
        )
    for spec in (*part.inputs, *part.outputs):
        _triton_type(spec)
    example = example_inputs(graph) if inputs is None else [tensor.detach().cpu() for tensor in inputs]
    head = cut(graph, where).head
    assert isinstance(head, Head)
    boundary = example if where.index == 0 else list(head.segment(*example))
    try:
        return part, write_part(part, boundary, model / "1" / "model.onnx")
    except BackendError:
        shutil.rmtree(model, ignore_errors=True)
        raise


def _triton_type(spec: TensorSpec) -> str:
    """Return the name of a tensor's dtype in Triton's model configuration."""
    datatype = datatype_of(spec.dtype)
    if datatype.startswith(("COMPLEX", "FP8", "FP4")):
        raise BackendError(
            f"tensor {short(spec.name, 100)} is {datatype}, which other servers do not have; cut elsewhere"
        )
    return f"TYPE_{datatype}"


def _quoted(text: str) -> str:
    """Return a text as a string of protobuf's text format."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode()
    )
    return f'"{escaped}"'
