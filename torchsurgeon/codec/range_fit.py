"""Tables for the entropy coder (``range_coder``), counted from samples of the integers that it will code."""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsurgeon.codec import range_coder
from torchsurgeon.codec.range_tables import (
    LEVELS,
    MOST_BY_WINDOWS,
    MOST_IN_WINDOW,
    MOST_MAGNITUDE,
    MOST_SYMBOLS,
    NEIGHBOURS,
    OWN_WEIGHTS,
    TOTAL,
    WINDOWS,
    CoderTables,
)
from torchsurgeon.errors import CodecError

# A sum is the magnitude that is expected, in these parts of one.
_UNIT = 64
_MOST_BIAS = 4095
_MOST_WEIGHTS = (65535 - MOST_BY_WINDOWS - _MOST_BIAS) // MOST_MAGNITUDE
# So many groups are looked at together, which bounds the memory that is taken beside the samples.
_TOGETHER = 128
# So many values of a group tell its bias and weights as well as more do.
_ENOUGH = 4096
# More of either saved not one byte in a thousand.
_ROUNDS, _SWEEPS = 2, 8
_MOST_ORDER = 12


def fit_tables(
    samples: Tensor,
    parents: NDArray[numpy.int32] | None = None,
    *,
    symbols: int = 32,
    tables: int = 8,
    rows: int = 128,
    smoothing: float = 16.0,
) -> CoderTables:
    """Return tables for values such as the samples.

    Each group's bias and weights are a regression of its magnitudes on those that are coded before. Then groups with
    like probabilities at each level share a table, and levels of tables with like probabilities share a row.

    Args:
        samples: integers [N, K, H, W] of N inputs.
        parents: ``int32 [K, P]``, the earlier groups that say most about each group, -1 for none.
        symbols: S, how many symbols there are with the escape: magnitudes below S // 2 take no escape.
        tables: T, the most tables.
        rows: R, the most rows, up to 256.
        smoothing: how many values' worth the average of all groups counts in a table's own probabilities.

    Raises:
        CodecError: the samples are not such integers, or the parents not such groups.
        NativeUnavailableError: the compiled extension is missing.
    """
    if samples.dim() != 4 or samples.dtype.is_floating_point or 0 in samples.shape:
        raise CodecError(f"samples must be integers [N, K, H, W]; got {samples.dtype} {list(samples.shape)}")
    if not (2 <= symbols <= MOST_SYMBOLS and tables >= 1 and 1 <= rows <= 256 and smoothing > 0):
        raise CodecError(
            f"tables need 2 to {MOST_SYMBOLS} symbols, at least one table, 1 to 256 rows and smoothing above 0; got "
            f"{symbols}, {tables}, {rows} and {smoothing}"
        )
    samples = samples.to("cpu", torch.int32)
    groups = samples.shape[1]
    if parents is None:
        parents = numpy.zeros((groups, 0), numpy.int32)
    # It checks the parents, too.
    plain = _without_contexts(groups, parents, symbols)
    weights, bias = _regress(samples, parents)
    level = range_coder.levels(samples, replace(plain, weights=weights, bias=bias))
    counts = torch.cat([_counts(samples[:, these], level[:, these], symbols) for these in _chunks(groups)])
    average = _average(counts.sum(0))
    table_of = _cluster(counts, smoothing * average, tables)
    by_table = torch.zeros(int(table_of.max()) + 1, LEVELS, symbols).index_add_(0, table_of, counts)
    cells = (by_table + smoothing * average).flatten(0, 1)[:, None]
    row_of = _cluster(cells, torch.zeros(1, symbols), rows)
    by_row = torch.zeros(int(row_of.max()) + 1, 1, symbols).index_add_(0, row_of, cells)[:, 0]
    row_of = row_of.view(-1, LEVELS)
    escaped = [
        _escaped(samples[:, these], row_of[table_of[these].view(1, -1, 1, 1), level[:, these].long()], symbols)
        for these in _chunks(groups)
    ]
    beyond, row = (torch.cat(parts) for parts in zip(*escaped, strict=True))
    return CoderTables(
        cumulative=_cumulative(by_row.double().numpy()),
        escape_bits=_escape_bits(beyond, row, len(by_row)),
        row_of=row_of.numpy().astype(numpy.uint8),
        table_of=table_of.numpy().astype(numpy.uint16),
        parents=parents,
        weights=weights,
        bias=bias,
    )


def _without_contexts(groups: int, parents: NDArray[numpy.int32], symbols: int) -> CoderTables:
    return CoderTables(
        cumulative=numpy.array([[0, *range(TOTAL - symbols + 1, TOTAL + 1)]], numpy.uint16),
        escape_bits=numpy.zeros(1, numpy.uint8),
        row_of=numpy.zeros((1, LEVELS), numpy.uint8),
        table_of=numpy.zeros(groups, numpy.uint16),
        parents=parents,
        weights=numpy.zeros((groups, OWN_WEIGHTS + numpy.shape(parents)[-1]), numpy.uint8),
        bias=numpy.zeros(groups, numpy.uint16),
    )


def _chunks(groups: int) -> list[slice]:
    return [slice(begin, begin + _TOGETHER) for begin in range(0, groups, _TOGETHER)]


def _regress(samples: Tensor, parents: NDArray[numpy.int32]) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint16]]:
    """Return weights and bias of each group, in parts of ``_UNIT``: what predicts its magnitudes best.

    The spread of a magnitude grows with its expectation, so after the first round errors count in units of that.
    """
    groups, features = samples.shape[1], OWN_WEIGHTS + parents.shape[1] + 1
    every = -(-samples[:, 0].numel() // _ENOUGH)
    solution = torch.zeros(groups, features)
    for these in _chunks(groups):
        seen, target = _features(samples[::every], parents, these)
        importance = torch.ones_like(target)
        for _ in range(_ROUNDS):
            weighted = seen * importance
            gram, right = weighted @ seen.mT, (weighted @ target.mT)[..., 0]
            # As much doubt as a few samples: a weight that they hardly speak for stays small.
            doubt = 2 * importance.mean(2) * (torch.arange(features) < features - 1)
            _solve(gram + torch.diag_embed(doubt + 1e-6), right, solution[these])
            expected = (solution[these, None] @ seen).clamp(min=1 / _UNIT)
            importance = 1 / (expected * (1 + expected) + 0.01 * target.mean(2, keepdim=True))
    weights = solution[:, :-1] * _UNIT
    weights[:, NEIGHBOURS:OWN_WEIGHTS] *= torch.tensor([divisor for _, divisor in WINDOWS])
    weights = weights.round().clamp(0, 255)
    weights = (weights * (_MOST_WEIGHTS / weights.sum(1, keepdim=True).clamp(min=1)).clamp(max=1)).floor()
    bias = (solution[:, -1] * _UNIT).round().clamp(0, _MOST_BIAS)
    return weights.numpy().astype(numpy.uint8), bias.numpy().astype(numpy.uint16)


def _features(samples: Tensor, parents: NDArray[numpy.int32], these: slice) -> tuple[Tensor, Tensor]:
    """Return what is known of each value [k, F, n], and its magnitude [k, 1, n]."""
    own = _magnitudes(samples[:, these])
    height, width = own.shape[2:]
    padded = torch.nn.functional.pad(own, (1, 1, 1, 0))
    left, above = padded[:, :, 1:, :width], padded[:, :, :height, 1:-1]
    above_left, above_right = padded[:, :, :height, :width], padded[:, :, :height, 2:]
    at_parents = [
        _magnitudes(samples[:, parent.clamp(min=0)]) * (parent >= 0).view(1, -1, 1, 1)
        for parent in torch.from_numpy(parents[these].astype(numpy.int64)).T
    ]
    near = left, above, above_left, above_right
    seen = torch.stack([*near, *_windows(samples, these), *at_parents, torch.ones_like(own)])
    return seen.permute(2, 0, 1, 3, 4).flatten(2), own.transpose(0, 1).reshape(own.shape[1], 1, -1)


def _windows(samples: Tensor, these: slice) -> list[Tensor]:
    """Return for each window the sums of the magnitudes in it, [N, k, H, W]."""
    begin = max(0, these.start - max(size for size, _ in WINDOWS))
    found = []
    # The sum of all groups before each, and zeros in front of the first.
    before = torch.nn.functional.pad(_magnitudes(samples[:, begin : these.stop]).cumsum(1), (0, 0, 0, 0, 1, 0))[:, :-1]
    group = torch.arange(these.start - begin, before.shape[1])
    for size, _ in WINDOWS:
        sums = before[:, group] - before[:, (group - size).clamp(min=0)]
        found.append(sums.clamp(max=MOST_IN_WINDOW))
    return found


def _magnitudes(values: Tensor) -> Tensor:
    return values.clamp(-MOST_MAGNITUDE, MOST_MAGNITUDE).abs().float()


def _solve(gram: Tensor, right: Tensor, solution: Tensor) -> None:
    """Improve solutions [k, F] of ``gram @ solution = right`` by coordinate descent; none gets below 0."""
    for _ in range(_SWEEPS):
        for f in range(solution.shape[1]):
            rest = right[:, f] - (gram[:, f] * solution).sum(1) + gram[:, f, f] * solution[:, f]
            solution[:, f] = (rest / gram[:, f, f]).clamp(min=0)


def _counts(values: Tensor, level: Tensor, symbols: int) -> Tensor:
    """Return how often each symbol is found at each level of each group, [k, L, S]."""
    groups = values.shape[1]
    group = torch.arange(groups).view(1, -1, 1, 1)
    cell = (group * LEVELS + level) * symbols + range_coder.fold(values).clamp(max=symbols - 1)
    counts = torch.bincount(cell.reshape(-1), minlength=groups * LEVELS * symbols)
    return counts.view(groups, LEVELS, symbols).float()


def _average(counts: Tensor) -> Tensor:
    """Return the probabilities [L, S] of all groups at each level; levels with few values are like those nearby."""
    steps = torch.arange(LEVELS)
    near = torch.exp2(-2.0 * (steps[:, None] - steps).abs())
    smooth = near @ counts + 1e-3 * counts.sum(0) / counts.sum() + 1e-6
    return smooth / smooth.sum(1, keepdim=True)


def _cluster(counts: Tensor, prior: Tensor, most: int) -> Tensor:
    """Return a cluster for each of n items, so that they take few bits by the probabilities of their clusters.

    Args:
        counts: how often each symbol is found in each of an item's distributions, [n, d, S].
        prior: what is added to the counts of a cluster, [d, S].
        most: the most clusters. The result numbers those that are used from 0.
    """
    items, _, symbols = counts.shape
    most = min(most, items)
    flat = counts.flatten(1)
    mean = (counts.sum(1) @ torch.arange(symbols).float()) / flat.sum(1).clamp(min=1e-9)
    found = torch.empty(items, dtype=torch.long)
    found[torch.argsort(mean)] = torch.arange(items) * most // items
    for _ in range(20):
        shares = torch.zeros(most, *prior.shape).index_add_(0, found, counts) + prior + 1e-9
        lengths = -torch.log2(shares / shares.sum(2, keepdim=True)).flatten(1)
        nearest = (flat @ lengths.T).argmin(1)
        if torch.equal(nearest, found):
            break
        found = nearest
    used: Tensor = torch.unique(found, return_inverse=True)[1]
    return used


def _cumulative(counts: NDArray[numpy.float64]) -> NDArray[numpy.uint16]:
    """Return the probabilities of rows as cumulative 32,768ths, at least one for each symbol."""
    symbols = counts.shape[1]
    shares = counts / counts.sum(axis=1, keepdims=True) * (TOTAL - symbols)
    ends = numpy.rint(numpy.cumsum(shares, axis=1)) + numpy.arange(1, symbols + 1)
    return numpy.concatenate([numpy.zeros((len(counts), 1)), ends], axis=1).astype(numpy.uint16)


def _escaped(values: Tensor, row: Tensor, symbols: int) -> tuple[Tensor, Tensor]:
    """Return how far escaped values lie beyond the escape, and their rows."""
    beyond = range_coder.fold(values) - (symbols - 1)
    return beyond[beyond >= 0], row[beyond >= 0]


def _escape_bits(beyond: Tensor, row: Tensor, rows: int) -> NDArray[numpy.uint8]:
    """Return for each row the order of the Exp-Golomb code that is shortest for what was escaped in it."""
    lengths = [
        torch.bincount(row, weights=range_coder.escape_length(beyond, order).double(), minlength=rows)
        for order in range(_MOST_ORDER + 1)
    ]
    # Where hardly anything was escaped in a row, what all rows need decides.
    total = torch.stack(lengths)
    return (total + total.sum(1, keepdim=True) / max(len(row), 1)).argmin(0).numpy().astype(numpy.uint8)
