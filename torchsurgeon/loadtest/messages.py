"""The requests that a load test sends: the tensors of some cuts of a model under some codecs, ready to be written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.codec import find_codec
from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import LoadTestError, ProtocolError, short
from torchsurgeon.loadtest.target import Target
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.wire.tensors import dtype_of

WHOLE = "server"
"""The name of the cut before the first layer, at which the server runs the whole model."""
EVERY = "all"
"""Stands for every cut at which the server runs anything."""


@dataclass(frozen=True)
class LoadRequest:
    """One kind of request, which is sent again and again.

    Attributes:
        model: the model's name on the server.
        cut: where the model is cut: ``"server"``, or the name of the last layer on the device.
        codec: what its tensors are really sent under. That is another codec than was asked for where this one does not
            take a tensor.
        data: the whole request.
        size_bytes: the length of its body.
    """

    model: str
    cut: str
    codec: str
    data: bytes
    size_bytes: int


def cut_requests(
    target: Target,
    model: str,
    graph: LayerGraph,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cuts: Sequence[int | str] = (WHOLE,),
    codecs: Sequence[str] = ("raw",),
) -> list[LoadRequest]:
    """Return a request for each cut and codec, with the tensors that cross there when the model is called.

    Args:
        target: the server.
        model: the model's name on the server.
        graph: the traced model.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        cuts: partition indices, names of layers, ``"server"`` for the whole model, or ``"all"``.
        codecs: the codecs' names.

    Raises:
        PartitionError: the model has no such cut.
        CodecError: there is no such codec.
        LoadTestError: at a cut nothing is sent, because the device runs every layer.
    """
    requests = []
    for point in _points(graph, cuts):
        with torch.no_grad():
            sent = cut(graph, point).head(*args, **(kwargs or {}))
        tensors = dict(zip([spec.name for spec in point.tensors], sent, strict=True))
        label = WHOLE if point.index == 0 else point.name
        requests += _under(target, model, label, tensors, codecs)
    return requests


def whole_requests(
    target: Target, model: str, metadata: Mapping[str, Any], codecs: Sequence[str] = ("raw",)
) -> list[LoadRequest]:
    """Return a request for the whole model and each codec, with random inputs as the server's metadata describes them.

    Numbers with a point are between 0 and 1, and whole numbers are 0, which every table of embeddings has.

    Args:
        target: the server.
        model: the model's name on the server.
        metadata: what the server answers to ``GET /v2/models/NAME``.
        codecs: the codecs' names.

    Raises:
        CodecError: there is no such codec.
        ProtocolError: the metadata is of another form, or names a datatype that is not known here.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    try:
        for described in metadata["inputs"]:
            dtype = dtype_of(described["datatype"])
            shape = [1 if size == -1 else size for size in described["shape"]]
            values = torch.rand(shape, generator=generator)
            tensors[described["name"]] = (
                values.to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
            )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ProtocolError(
            f"the inputs of model {short(model)} must have name, datatype and shape; the server told "
            f"{short(metadata, 200)}; give a SPEC of the model"
        ) from error
    return _under(target, model, WHOLE, tensors, codecs)


def _points(graph: LayerGraph, cuts: Sequence[int | str]) -> list[PartitionPoint]:
    found: dict[int, PartitionPoint] = {}
    for name in cuts:
        if name == EVERY:
            points = [point for point in graph.points if point.index < len(graph.layers)]
        else:
            points = [graph.point(name)]
        for point in points:
            if point.index == len(graph.layers):
                raise LoadTestError(
                    f"at the cut {short(name)} the device runs every layer, and nothing is sent; name an earlier one"
                )
            found[point.index] = point
    return list(found.values())


def _under(
    target: Target, model: str, label: str, tensors: Mapping[str, Tensor], codecs: Sequence[str]
) -> list[LoadRequest]:
    """Return the tensors under each codec, once for each codec that is really used."""
    found: dict[str, LoadRequest] = {}
    for name in codecs:
        codec = find_codec(name)
        encoded = wire.encode_request(tensors, codecs=dict.fromkeys(tensors, codec), crc32=True)  # as a SplitModule
        body = b"".join(bytes(part) for part in encoded.buffers)
        told = json.loads(body[: encoded.header_bytes])["inputs"]
        used = [entry.get("parameters", {}).get("codec", "raw") for entry in told]
        really = " ".join(key for key, _ in itertools.groupby(sorted(used)))
        data = target.post(f"/v2/models/{model}/infer", body, encoded.header_bytes)
        found.setdefault(really, LoadRequest(model, label, really, data, len(body)))
    return list(found.values())
