"""``fit_codec()``: a codec made for one cut of one model, from a sample of its inputs, without training."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from torchsurgeon import _native
from torchsurgeon.accuracy.sample import check_calls, inputs_of
from torchsurgeon.codec import quantize, range_coder
from torchsurgeon.codec.fitted.answers import AnswerKind, Answers
from torchsurgeon.codec.fitted.codec import FittedCodec
from torchsurgeon.codec.fitted.rates import ZERO_STEPS
from torchsurgeon.codec.fitted.statistics import Statistics
from torchsurgeon.codec.fitted.student import Student
from torchsurgeon.codec.fitted.tensor import FittedTensor
from torchsurgeon.codec.fitted.transform import TensorGrid, Transform, block_side
from torchsurgeon.codec.range_fit import fit_tables
from torchsurgeon.codec.range_tables import CoderTables
from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import CodecError, is_whole, short
from torchsurgeon.models.weights import weight_digests
from torchsurgeon.profiling.origin import device_of, provenance
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec

# A few draws for each input say as much as many, since inputs differ more than draws do.
DRAWS = 3
# Each quantization step is this many times finer than the next. At the coarsest, this share of values is not 0; finer
# ones follow until the highest rate is reached, at which a codec is hardly smaller than ``int8+zstd``.
_FINER, _MOST_STEPS, _LEAST_NONZERO, _HIGHEST_RATE = 1.6, 24, 0.01, 4.0
# Where few values take almost all bits, steps that are much finer follow until the others count.
_LEAST_GROWTH, _MUCH_FINER = 1.1, 4.0
# A quantile is known well enough from so many values.
_MOST_SORTED = 1 << 20
# One input of so many is for the entropy coder's tables.
_TABLES_EACH = 4
# Inputs that run together, where the batch is free.
_BATCH = 16
# The metric of what hardly counts is raised to this share of the mean, and each band's matrices are drawn towards
# those of all bands by this share, or more where the sample is small. Measured on EfficientNet-Lite0: 0.02 to 0.3 of
# the latter, and 0.001 to 0.1 of the former, give the same bytes to 2 %.
_FLOOR, _SHRINK = 1e-2, 0.1
# The time to fit grows with the cube of the channels.
_MOST_CHANNELS = 4096
# As many coefficients are kept to fit the entropy coder to.
_MOST_KEPT = 1 << 22
_UNLIKE_NAME = re.compile(r"[^A-Za-z0-9._-]+")


# Whatever mode the caller is in: inference mode would leave no gradients.
@torch.inference_mode(mode=False)
def fit_codec(
    graph: LayerGraph,
    point: int | str | PartitionPoint,
    sample: Sequence[Any],
    *,
    name: str | None = None,
    answers: AnswerKind | None = None,
    classes_at: int = 1,
    channels_at: Mapping[str, int] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    device: str | torch.device | None = None,
    student: Student | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FittedCodec:
    """Fit a codec to a cut, and make its name known to this process.

    Args:
        graph: the traced model.
        point: the partition point.
        sample: calls like the traced example, as ``measure()`` takes them; 200 or more inputs are good.
        name: the first part of the codec's name; that of the point by default.
        answers: what the outputs are: ``"classes"``, of which the first output holds the logits, or ``"values"``, such
            as boxes or an embedding. By default a model with one output (N, classes) answers with classes.
        classes_at: the dimension of classes.
        channels_at: the dimension of channels, for tensors by name. By default it is dimension 1 of images and of what
            one-dimensional convolutions work on, else the last.
        draws: how many answers are drawn for each input.
        seed: of what is drawn.
        device: where the model runs; the device of its parameters by default.
        student: what computes the boundary tensors in place of the model's own layers; ``distill()`` makes one.
        progress: called as ``progress(done, total)`` after each batch and after each rate.

    Raises:
        CodecError: the sample is empty or unlike the example, nothing at this point can be fitted, or an argument is
            not valid.
        PartitionError: the graph has no such point.
        NativeUnavailableError: the compiled extension is missing.
    """
    _native.operators("fitting a codec")
    place = graph.point(point)
    check_calls(sample)
    if not sample:
        raise CodecError("a codec is fitted to a sample of your own, and sample is empty; give calls, [image, …]")
    if answers not in (None, "classes", "values"):
        raise CodecError(f'answers must be "classes" or "values"; got {short(answers)}')
    if not (is_whole(draws) and 1 <= draws <= 64):
        raise CodecError(f"draws must be from 1 to 64; got {short(draws)}")
    names = [spec.name for spec in place.tensors]
    unknown = [name for name in channels_at or {} if name not in names]
    if unknown:
        raise CodecError(
            f"channels_at names tensors of the point, of which there are {short(', '.join(names), quote=False)}; got "
            f"{short(unknown[0])}"
        )
    target = device_of(graph, device)
    label = _UNLIKE_NAME.sub("-", name or place.name).strip("-._")[:48] or "cut"
    grids = {spec.name: _grid(graph, spec, (channels_at or {}).get(spec.name)) for spec in place.tensors}
    fitted = {name: Statistics(grid) for name, grid in grids.items() if grid is not None}
    if not fitted or place.index == len(graph.layers):
        crossing = short(", ".join(map(str, place.tensors)), quote=False)
        raise CodecError(
            f"a codec is fitted to floating-point tensors with at most {_MOST_CHANNELS} channels, before the model's "
            f"output; at this point cross {crossing}; choose another point"
        )
    # Autograd refuses what was made in inference mode, but takes a copy of it.
    calls = [[one.clone() if one.is_inference() else one for one in call] for call in inputs_of(graph, sample, target)]
    # The tables are fitted to other inputs than the transform, whose components are smaller on its own.
    apart = len(calls) >= 2 * _TABLES_EACH
    setup = [call for k, call in enumerate(calls) if not apart or (k + 1) % _TABLES_EACH]
    others = list(batches_of(graph, calls[_TABLES_EACH - 1 :: _TABLES_EACH] if apart else calls))
    batches = list(batches_of(graph, setup))
    total = len(batches) + len(others) + _MOST_STEPS
    done = 0

    def advance(most: int = 1) -> None:
        nonlocal done
        done = min(done + most, total)
        if progress is not None:
            progress(done, total)

    head = _Head(graph, place, list(fitted), student)
    _add_up(graph, head, batches, fitted, Answers(graph, answers, classes_at, draws, seed), advance)
    if not any(statistics.varies() for statistics in fitted.values()):
        raise CodecError("the tensors at this point are the same for the whole sample; give varied inputs")
    transforms = {name: _transform(statistics) for name, statistics in fitted.items()}
    coefficients: dict[str, list[Tensor]] = {name: [] for name in fitted}
    count = 0
    for inputs in others:
        boundary = head.wanted(inputs) if count < _MOST_KEPT else {}
        for tensor, values in boundary.items():
            grid = transforms[tensor].grid
            found = transforms[tensor].forward(values).cpu()
            # As one input after the other, which is how they are encoded.
            coefficients[tensor] += found.view(len(found), grid.sizes(values.shape)[0], -1, found.shape[2]).unbind(1)
            count += found.numel()
        advance()
    tensors, steps, rates = _tables(transforms, coefficients, _coarsest(coefficients), advance)
    if done < total:
        advance(total)
    origin = provenance(target)
    return FittedCodec(
        label,
        type(graph.model).__name__,
        graph.fingerprint,
        weight_digests(graph.model).combined,
        (place.index, place.name),
        tensors,
        steps,
        rates,
        {**origin, "inputs": len(calls), "draws": int(draws), "seed": seed},
        student,
    ).use()


def _grid(graph: LayerGraph, spec: TensorSpec, channels_at: int | None) -> TensorGrid | None:
    """Return how a boundary tensor is seen; None for one that is not fitted, which crosses without loss."""
    rank, shape = len(spec.shape), spec.shape
    if channels_at is not None and not (is_whole(channels_at) and 1 <= channels_at < rank):
        raise CodecError(f"channels_at of {short(spec.name)} must be from 1 to {rank - 1}; got {short(channels_at)}")
    if rank < 2 or 0 in shape or not quantize.packs("int8", spec.dtype):
        return None
    if channels_at is None:
        channels_at = _usual_channels(graph, spec)
    if spec.batch_step[channels_at]:
        return None
    images = channels_at == 1 and rank > 2
    rest = [size for dim, size in enumerate(shape) if dim not in (0, channels_at)]
    block = (1, 1)
    if images:
        block = (block_side(math.prod(rest[:-1])) if len(rest) > 1 else 1, block_side(rest[-1]))
    if shape[channels_at] > _MOST_CHANNELS:
        return None
    return TensorGrid(rank, channels_at, shape[channels_at], block)


def _usual_channels(graph: LayerGraph, spec: TensorSpec) -> int:
    rank, shape = len(spec.shape), spec.shape
    if rank == 4 and shape[1] == shape[2] != shape[3]:
        return 3
    if rank == 3:
        return 1 if any(kind.endswith("1d") for kind in _kinds_near(graph, spec)) else 2
    return 1


def _kinds_near(graph: LayerGraph, spec: TensorSpec) -> set[str]:
    """Return the types of the layers that give a tensor or read it, also through others that keep its shape."""
    same, kinds = {spec.name}, set()
    for layers, reads in ((reversed(graph.layers), False), (graph.layers, True)):
        for layer in layers:
            near, far = (layer.inputs, layer.outputs) if reads else (layer.outputs, layer.inputs)
            if any(tensor.name in same for tensor in near):
                kinds.add(layer.type)
                same |= {tensor.name for tensor in far if tensor.shape == spec.shape}
    return kinds


def batches_of(graph: LayerGraph, calls: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Return the calls, several of them in one where the batch is free."""
    together = max(1, _BATCH // graph.batch) if joined(graph) else 1
    for begin in range(0, len(calls), together):
        these = calls[begin : begin + together]
        yield [torch.cat(list(parts)) if len(these) > 1 else parts[0] for parts in zip(*these, strict=True)]


def joined(graph: LayerGraph) -> bool:
    """Return whether several calls of a model can be one call with a larger batch."""
    return graph.batch_free and not graph.value_dependent and all(spec.batch_step[:1] == (1,) for spec in graph.inputs)


class _Head:
    """Computes boundary tensors.

    Args:
        graph: the traced model.
        place: the partition point.
        fitted: the names of the tensors that are fitted.
        student: what computes them; the model's own layers by default.

    Attributes:
        names: the names of all boundary tensors.
    """

    def __init__(
        self, graph: LayerGraph, place: PartitionPoint, fitted: Sequence[str], student: Student | None
    ) -> None:
        self.names = [spec.name for spec in place.tensors]
        own = cut(graph, place).head.get_submodule("segment")
        self._head = own if student is None else student.segment(graph, place.index)
        self._fitted = fitted

    def all(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return all boundary tensors of a call by name."""
        with torch.no_grad():
            return dict(zip(self.names, self._head(*inputs), strict=True))

    def wanted(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return those of a call that are fitted. Raise ``CodecError`` where one is not finite."""
        return self.fitted_of(self.all(inputs))

    def fitted_of(self, boundary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of a boundary that are fitted. Raise ``CodecError`` where one is not finite."""
        found = {name: boundary[name].detach() for name in self._fitted}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
            raise CodecError("the sample must give finite values at this point; it gives NaN or infinity")
        return found


def _add_up(
    graph: LayerGraph,
    head: _Head,
    batches: Sequence[Sequence[Tensor]],
    fitted: Mapping[str, Statistics],
    answers: Answers,
    advance: Callable[[], None],
) -> None:
    """Run the model on a sample, and add up the statistics of its boundary tensors and their gradients."""
    tail = differentiable(tail_for(graph, head.names, flat=True))
    for inputs in batches:
        boundary = head.all(inputs)
        for name, tensor in head.fitted_of(boundary).items():
            fitted[name].add_values(tensor)
        for gradients in _gradients(tail, boundary, list(fitted), answers):
            for name, gradient in gradients.items():
                fitted[name].add_gradient(gradient)
        advance()


def differentiable(segment: Segment) -> Segment:
    """Return a part of a model, or a copy of it where the model was made in inference mode, which autograd refuses."""
    weights = (*segment.parameters(), *segment.buffers())
    return copy.deepcopy(segment) if any(one.is_inference() for one in weights) else segment


def _gradients(
    tail: Segment, boundary: Mapping[str, Tensor], wanted: Sequence[str], answers: Answers
) -> Iterator[dict[str, Tensor]]:
    """Return the gradients of several draws with respect to the wanted tensors; none where the tail has none."""
    with torch.enable_grad():
        leaves = {name: one.detach().clone().requires_grad_(name in wanted) for name, one in boundary.items()}
        # The tail may overwrite its inputs, and a leaf that needs a gradient must not be overwritten.
        inputs = tuple(one * 1 if name in wanted else one for name, one in leaves.items())
        outputs = tail(*inputs)
        for draw in range(answers.draws):
            scalar = answers.scalar(outputs)
            if scalar is None:
                return
            found = torch.autograd.grad(
                scalar, [leaves[name] for name in wanted], retain_graph=draw + 1 < answers.draws, allow_unused=True
            )
            yield {
                name: one.detach()
                for name, one in zip(wanted, found, strict=True)
                if one is not None and bool(torch.isfinite(one).all())
            }


def _transform(statistics: Statistics) -> Transform:
    """Return the transform that gives independent components, of which an error counts alike in the metric."""
    channels = statistics.grid.channels
    covariances = _shrunk(statistics.covariances(), statistics.places / channels)
    fisher = _shrunk(statistics.fisher(), statistics.gradients / channels)
    identity = torch.eye(channels, dtype=torch.float64)
    mean = float(fisher.diagonal(dim1=1, dim2=2).mean())
    # Without gradients, or where the answer does not depend on the tensor, all channels count alike.
    if not mean > 0:
        mean = 1 / max(float(covariances.diagonal(dim1=1, dim2=2).mean()), 1e-30)
        fisher = mean * identity.expand_as(fisher)
    matrices = []
    for metric, covariance in zip(fisher, covariances, strict=True):
        floor = _FLOOR * max(float(metric.trace()) / channels, 1e-3 * mean)
        values, vectors = torch.linalg.eigh(metric + floor * identity)
        root = (vectors * values.clamp(min=floor).sqrt()) @ vectors.T
        components = torch.linalg.eigh(root @ covariance @ root)[1].flip(1)
        matrices.append((components.T @ root).float())
    scales = statistics.shares().sqrt()[:, None].expand(-1, channels)
    return Transform(
        statistics.grid,
        torch.stack(matrices).numpy(),
        statistics.band_of.numpy().astype(numpy.uint16),
        scales.contiguous().float().numpy(),
        statistics.means().float().numpy(),
    )


def _shrunk(matrices: Tensor, samples_each: float) -> Tensor:
    """Return the bands' matrices, drawn towards their mean in shape, more so where each rests on few samples."""
    traces = matrices.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)
    mean = matrices.mean(0)
    towards = mean / mean.trace().clamp(min=1e-300) * traces[:, None, None]
    share = min(0.9, max(_SHRINK, 1 / (1 + samples_each)))
    return (1 - share) * matrices + share * towards


def _tables(
    transforms: Mapping[str, Transform],
    coefficients: Mapping[str, Sequence[Tensor]],
    coarsest: float,
    advance: Callable[[], None],
) -> tuple[list[FittedTensor], list[float], list[float]]:
    """Return what the codec holds of each tensor, its steps from the finest, and the bits per value at each."""
    tables: dict[str, list[CoderTables]] = {name: [] for name in transforms}
    steps: list[float] = []
    rates: list[float] = []
    step = coarsest
    for _ in range(_MOST_STEPS):
        made, rate = _coded(transforms, coefficients, step)
        advance()
        grown = not rates or rate > _LEAST_GROWTH * rates[0]
        if grown:
            steps.insert(0, step)
            rates.insert(0, rate)
            for name, one in made.items():
                tables[name].insert(0, one)
        if rate > _HIGHEST_RATE:
            break
        step /= _FINER if grown else _MUCH_FINER
    fitted = [
        FittedTensor(name, transform, _largest(coefficients[name]), tuple(tables[name]))
        for name, transform in transforms.items()
    ]
    return fitted, steps, rates


def _coarsest(coefficients: Mapping[str, Sequence[Tensor]]) -> float:
    """Return the step at which few coefficients do not become 0.

    The mean square says nothing of most of them where a few are 100,000 times larger.
    """
    magnitudes = torch.cat([one.abs().flatten() for some in coefficients.values() for one in some])
    some = magnitudes[:: -(-magnitudes.numel() // _MOST_SORTED)]
    rank = min(int((1 - _LEAST_NONZERO) * some.numel()) + 1, some.numel())
    return max(float(some.kthvalue(rank).values) / ZERO_STEPS, 1e-30)


def _coded(
    transforms: Mapping[str, Transform], coefficients: Mapping[str, Sequence[Tensor]], step: float
) -> tuple[dict[str, CoderTables], float]:
    """Return the entropy coder's tables for one step, and the bits per value."""
    tables, bits, values = {}, 0.0, 0
    for name, found in coefficients.items():
        scaled = [one / step for one in found]
        whole = [(one + torch.sign(one) * (1 - ZERO_STEPS)).to(torch.int32) for one in scaled]
        # Where sizes differ from call to call, the tables are fitted to as far as all go.
        rows, columns = (min(one.shape[dim] for one in whole) for dim in (1, 2))
        alike = torch.stack([one[:, :rows, :columns] for one in whole])
        made = tables[name] = fit_tables(alike, transforms[name].grid.parents())
        bits += sum(float(range_coder.bits(one, made).sum()) for one in whole)
        values += sum(one.numel() for one in whole)
    return tables, bits / values


def _largest(coefficients: Sequence[Tensor]) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
    largest = torch.stack([one.abs().amax((1, 2)) for one in coefficients]).amax(0)
    return largest.float().numpy()
