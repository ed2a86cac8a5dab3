"""Measuring codecs at a model's partition points, on a user's own samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchsurgeon.codec.budget import Budget, Verdict, as_real_numbers, likeness
from torchsurgeon.codec.codec import Codec, codec_names, find_codec
from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable, Difference
from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import CodecError, short
from torchsurgeon.profiling.origin import device_of, provenance
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

# A median of fewer times is not worth much.
_LEAST_TIMES = 5
_MOST_POINTS = 24


def measure(
    graph: LayerGraph,
    samples: Sequence[Any],
    codecs: Sequence[str] | None = None,
    *,
    points: Sequence[int | str] | None = None,
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CodecTable:
    """Return size, time and error of every codec at the partition points where a cut can pay off.

    With a ``budget``, the tail runs on the tensors that each lossy codec decoded, for every point and sample. Without
    one, no lossy codec counts as within budget.

    Args:
        graph: the traced model.
        samples: calls like the traced example. Each is a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        codecs: names of the codecs; all by default. ``raw`` is always measured. A codec that encodes no tensor at a
            point (``int8`` on integers, ``jpeg`` on a feature map) has no row there.
        points: indices or layer names; those of ``promising()`` by default.
        budget: how much lossy codecs may change.
        device: where the model runs, and where values are packed and unpacked; the device of its parameters by default.
        progress: called as ``progress(done, total)`` after each point.

    Raises:
        CodecError: a codec is unknown, there are no samples, or a sample is not like the example.
        PartitionError: the graph has no such point.
    """
    if not samples:
        raise CodecError("codecs are measured on samples of your own, and samples is empty; give calls, [image, …]")
    target = device_of(graph, device)
    known = [find_codec(name) for name in dict.fromkeys(("raw", *(codec_names() if codecs is None else codecs)))]
    chosen = promising(graph) if points is None else [graph.point(ref) for ref in dict.fromkeys(points)]
    names = [spec.name for spec in graph.inputs]
    with torch.no_grad():
        calls = _inputs(graph, samples, target)
        whole = tail_for(graph, names, flat=True)
        references = [_outputs(graph, whole, call) for call in calls] if budget is not None else []
        rows: list[CodecRow] = []
        for done, point in enumerate(chosen):
            rows += _rows(graph, point, known, calls, references, budget, target)
            if progress is not None:
                progress(done + 1, len(chosen))
    measured = type(graph.model).__name__, graph.fingerprint, graph.batch, len(calls), str(budget or "")
    return CodecTable(*measured, tuple(rows), provenance(target))


def promising(graph: LayerGraph, most: int = _MOST_POINTS) -> list[PartitionPoint]:
    """Return the partition points at which a codec can pay off.

    These are the points at which no more bytes cross than at any point before. Where more bytes cross, an earlier cut
    is better. The last point, with everything on the device, is left out.

    Args:
        graph: the traced model.
        most: how many points of equal size to keep. Where a model keeps one size through many layers, as transformers
            do, the first point of each size is kept, and the others are thinned out evenly.
    """
    smaller: list[PartitionPoint] = []
    equal: list[PartitionPoint] = []
    least = float("inf")
    for point in graph.points[:-1]:
        if point.size_bytes < least:
            smaller.append(point)
        elif point.size_bytes == least:
            equal.append(point)
        least = min(least, point.size_bytes)
    room = max(0, most - len(smaller))
    if len(equal) > room:
        equal = [equal[(2 * k + 1) * len(equal) // (2 * room)] for k in range(room)]
    return sorted([*smaller, *equal], key=lambda point: point.index)


def _inputs(graph: LayerGraph, samples: Sequence[Any], device: torch.device) -> list[list[Tensor]]:
    calls = []
    for index, sample in enumerate(samples):
        args, kwargs = ((), sample) if isinstance(sample, Mapping) else (sample, {})
        args = args if isinstance(args, tuple) else (args,)
        try:
            tensors = graph.tensors_of_call(args, kwargs)
        except TypeError as error:
            raise CodecError(f"sample {index} is not a call like the traced example: {short(error)}") from None
        for spec, tensor in zip(graph.inputs, tensors, strict=True):
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise CodecError(
                    f"sample {index} has {tensor.dtype} of shape {list(tensor.shape)} as {short(spec.name, 100)}; the "
                    f"traced example has {spec.dtype} of shape {list(spec.shape)}. Give samples like the example"
                )
        calls.append([tensor.detach().to(device) for tensor in tensors])
    return calls


def _outputs(graph: LayerGraph, tail: Segment, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip((spec.name for spec in graph.outputs), tail(*tensors), strict=True))


class _Tried:
    """Collects what one codec does at one point, sample after sample."""

    def __init__(self, codec: Codec, verdict: Verdict | None) -> None:
        self.codec, self.verdict = codec, verdict
        self.sizes: list[int] = []
        self.encode_s: list[float] = []
        self.decode_s: list[float] = []
        self.lossless = True
        self._max_abs = self._squares = 0.0
        self._count, self._cosine = 0, 1.0

    def compare(self, boundary: Sequence[Tensor], decoded: Sequence[Tensor]) -> None:
        """Add the differences between the boundary tensors and the decoded ones."""
        for one, other in zip(boundary, decoded, strict=True):
            difference = as_real_numbers(one) - as_real_numbers(other)
            self._count += difference.numel()
            if difference.any():
                self._max_abs = max(self._max_abs, float(difference.abs().max()))
                self._squares += float(difference @ difference)
        self._cosine = min(self._cosine, likeness(list(boundary), list(decoded)))

    def row(self, point: PartitionPoint, raw_bytes: float) -> CodecRow:
        """Return the table's row."""
        verdict = None if self.lossless else self.verdict
        cost = CodecCost(
            self.codec.name,
            statistics.mean(self.sizes),
            statistics.median(self.encode_s),
            statistics.median(self.decode_s),
            self.lossless,
            self.lossless or (verdict is not None and verdict.kept),
        )
        rmse = (self._squares / max(1, self._count)) ** 0.5
        return CodecRow(
            point.index,
            point.name,
            raw_bytes,
            cost,
            None if self.lossless else Difference(self._max_abs, rmse, self._cosine),
            None if verdict is None else verdict.top1_change,
            None if verdict is None else verdict.cosine,
            None if verdict is None else verdict.accepted,
        )


def _rows(
    graph: LayerGraph,
    point: PartitionPoint,
    codecs: Sequence[Codec],
    calls: Sequence[Sequence[Tensor]],
    references: Sequence[Mapping[str, Tensor]],
    budget: Budget | None,
    device: torch.device,
) -> list[CodecRow]:
    head = cut(graph, point).head.get_submodule("segment")
    tail = tail_for(graph, [spec.name for spec in point.tensors], flat=True)
    suiting = [c for c in codecs if any(c.suits(spec.dtype, spec.shape) for spec in point.tensors)]
    tried = [_Tried(c, None if budget is None else Verdict(budget, graph.unflatten_output)) for c in suiting]
    raw_bytes = []
    for index, call in enumerate(calls):
        boundary = head(*call)
        raw_bytes.append(sum(tensor.nbytes for tensor in boundary))
        # "+zstd" compresses without loss, so a codec with it and the same codec without it give the same outputs.
        outputs: dict[str, dict[str, Tensor]] = {}
        for one in tried:
            # A codec's very first run is not timed, because it has to allocate memory that later runs reuse.
            repeats = -(-_LEAST_TIMES // len(calls)) + (index == 0)
            for repeat in range(repeats):
                decoded, exact = _there_and_back(one, boundary, device, timed=index > 0 or repeat > 0)
            if exact:
                continue
            one.lossless = False
            one.compare(boundary, decoded)
            if one.verdict is not None:
                changed_by = one.codec.name.removesuffix("+zstd")
                if changed_by not in outputs:
                    outputs[changed_by] = _outputs(graph, tail, decoded)
                one.verdict.add(references[index], outputs[changed_by])
    return [one.row(point, statistics.mean(raw_bytes)) for one in tried]


def _there_and_back(
    one: _Tried, boundary: Sequence[Tensor], device: torch.device, *, timed: bool
) -> tuple[list[Tensor], bool]:
    """Encode and decode a boundary; return the tensors as the server gets them, and whether they are exact."""
    _settle(device)
    begin_s = time.perf_counter()
    encoded = [one.codec.encode(tensor) for tensor in boundary]
    encoded_s = time.perf_counter()
    openers = [find_codec(e.codec) for e in encoded]
    decoded = [
        opener.decode(e.data, tensor.dtype, tensor.shape, e.order, max_bytes=tensor.nbytes, device=device)
        for opener, e, tensor in zip(openers, encoded, boundary, strict=True)
    ]
    _settle(device)
    if timed:
        one.encode_s.append(encoded_s - begin_s)
        one.decode_s.append(time.perf_counter() - encoded_s)
        one.sizes.append(sum(len(e.data) for e in encoded))
    return decoded, all(opener.lossless for opener in openers)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
