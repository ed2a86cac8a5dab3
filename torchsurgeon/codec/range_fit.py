"""Tables for the entropy coder (``range_coder``), counted from samples of the integers that it will code."""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsurgeon.codec import range_coder
from torchsurgeon.codec.range_coder import LEVELS, MOST_MAGNITUDE, TOTAL, CoderTables
from torchsurgeon.errors import CodecError

# A sum is the magnitude that is expected, in these parts of one.
_UNIT = 64
_MOST_WEIGHTS = (65535 - 4095) // MOST_MAGNITUDE
_CHUNK = 128


def fit_tables(
    samples: Tensor,
    parents: NDArray[numpy.int32] | None = None,
    *,
    symbols: int = 16,
    tables: int = 16,
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
        smoothing: how many values' worth the average of all tables counts in a table's own probabilities.

    Raises:
        CodecError: the samples are not such integers, or the parents not such groups.
    """
    if samples.dim() != 4 or samples.dtype.is_floating_point or 0 in samples.shape:
        raise CodecError(f"samples must be integers [N, K, H, W]; got {samples.dtype} {list(samples.shape)}")
    samples = samples.to("cpu", torch.int32)
    groups = samples.shape[1]
    if parents is None:
        parents = numpy.zeros((groups, 0), numpy.int32)
    weights, bias = _regress(samples, parents)
    plain = CoderTables(
        cumulative=numpy.array([[0, *range(TOTAL - symbols + 1, TOTAL + 1)]], numpy.uint16),
        escape_bits=numpy.zeros(1, numpy.uint8),
        row_of=numpy.zeros((1, LEVELS), numpy.uint8),
        table_of=numpy.zeros(groups, numpy.uint16),
        parents=parents,
        weights=weights,
        bias=bias,
    )
    folded, level = range_coder.fold(samples), range_coder.levels(samples, plain).long()
    symbol = folded.clamp(max=symbols - 1)
    group = torch.arange(groups).view(1, -1, 1, 1)
    cells = ((group * LEVELS + level) * symbols + symbol).reshape(-1)
    counts = torch.bincount(cells, minlength=groups * LEVELS * symbols).double().view(groups, LEVELS, symbols)
    average = _averages(counts.sum(0))
    table_of = _cluster(counts.flatten(1), (smoothing * average).reshape(-1), tables)
    by_table = torch.zeros(int(table_of.max()) + 1, LEVELS, symbols, dtype=torch.float64)
    by_table.index_add_(0, table_of, counts)
    smoothed = (by_table + smoothing * average).flatten(0, 1)
    row_of = _cluster(smoothed, torch.full((symbols,), 1e-3), rows)
    by_row = torch.zeros(int(row_of.max()) + 1, symbols, dtype=torch.float64).index_add_(0, row_of, smoothed)
    row_of = row_of.view(-1, LEVELS)
    escaped = symbol == symbols - 1
    row = row_of[table_of.view(1, -1, 1, 1), level]
    return CoderTables(
        cumulative=_cumulative(by_row.numpy()),
        escape_bits=_escape_bits(folded[escaped] - symbols + 1, row[escaped], len(by_row)),
        row_of=row_of.numpy().astype(numpy.uint8),
        table_of=table_of.numpy().astype(numpy.uint16),
        parents=parents,
        weights=weights,
        bias=bias,
    )


def _regress(samples: Tensor, parents: NDArray[numpy.int32]) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint16]]:
    """Return weights and bias of each group: what predicts its magnitudes best, in parts of ``_UNIT``."""
    magnitudes = samples.abs().clamp(max=MOST_MAGNITUDE).float()
    padded = torch.nn.functional.pad(magnitudes, (1, 1, 1, 0))
    height, width = magnitudes.shape[2:]
    near = [
        padded[:, :, 1:, :width],
        padded[:, :, :height, 1:-1],
        padded[:, :, :height, :width],
        padded[:, :, :height, 2:],
    ]
    found = []
    for begin in range(0, magnitudes.shape[1], _CHUNK):
        these = slice(begin, begin + _CHUNK)
        of = torch.from_numpy(parents[these].astype(numpy.int64)).T
        at_parents = [magnitudes[:, p.clamp(min=0)] * (p >= 0).view(1, -1, 1, 1) for p in of]
        features = torch.stack([*(n[:, these] for n in near), *at_parents, torch.ones_like(magnitudes[:, these])])
        features = features.permute(2, 0, 1, 3, 4).flatten(2).double()
        found.append(_fit_scale(features, magnitudes[:, these].transpose(0, 1).flatten(1).double()))
    solution = torch.cat(found) * _UNIT
    weights = solution[:, :-1].round().clamp(0, 255)
    weights = (weights * (_MOST_WEIGHTS / weights.sum(1, keepdim=True).clamp(min=1)).clamp(max=1)).floor()
    bias = solution[:, -1].round().clamp(0, 4095)
    return weights.numpy().astype(numpy.uint8), bias.numpy().astype(numpy.uint16)


def _fit_scale(features: Tensor, targets: Tensor) -> Tensor:
    """Return the weights [K, F], at least 0, with which features [K, F, n] predict targets [K, n].

    The spread of a magnitude grows with its expectation, so after the first round errors count in units of that.
    """
    targets = targets[:, None]
    importance = torch.ones_like(targets)
    mean = targets.mean(2, keepdim=True)
    weights = torch.zeros(features.shape[:2], dtype=torch.float64)
    for _ in range(3):
        weighted = features * importance
        gram, right = weighted @ features.transpose(1, 2), (weighted @ targets.transpose(1, 2))[..., 0]
        # As much doubt as a few samples: a weight that they hardly speak for stays small.
        ridge = 2.0 * importance.mean(2) * torch.ones_like(right)
        ridge[:, -1] = 0
        gram = gram + torch.diag_embed(ridge + 1e-9)
        for _ in range(40):
            for f in range(weights.shape[1]):
                rest = right[:, f] - (gram[:, f] * weights).sum(1) + gram[:, f, f] * weights[:, f]
                weights[:, f] = (rest / gram[:, f, f]).clamp(min=0)
        expected = (weights[:, None] @ features).clamp(min=1 / _UNIT)
        importance = 1 / (expected * (1 + expected) + 0.01 * mean)
    return weights


def _averages(counts: Tensor) -> Tensor:
    """Return the probabilities [L, S] of all groups at each level, those of few values drawn towards levels nearby."""
    steps = torch.arange(LEVELS)
    near = torch.exp2(-2.0 * (steps[:, None] - steps).abs().double())
    smooth = near @ counts + 1e-3 * counts.sum(0) / counts.sum() + 1e-6
    return smooth / smooth.sum(1, keepdim=True)


def _cluster(counts: Tensor, prior: Tensor, most: int) -> Tensor:
    """Return a cluster for each line of counts [n, m], so that they take few bits by their cluster's probabilities.

    Lines hold one or several distributions of the symbols one after another; sums over a line's distributions need not
    be alike, since each is normalized by its own.
    """
    n, m = counts.shape
    symbols = prior.shape[0] if m == prior.shape[0] and m <= range_coder.MOST_SYMBOLS else m // LEVELS
    scale = torch.arange(symbols, dtype=torch.float64).repeat(m // symbols)
    order = torch.argsort((counts @ scale) / counts.sum(1).clamp(min=1e-9))
    found = torch.empty(n, dtype=torch.long)
    found[order] = torch.arange(n) * min(most, n) // n
    for _ in range(20):
        sums = torch.zeros(min(most, n), m, dtype=torch.float64).index_add_(0, found, counts) + prior
        spread = sums.view(len(sums), -1, symbols)
        lengths = -torch.log2(spread / spread.sum(2, keepdim=True)).flatten(1)
        better = (counts @ lengths.T).argmin(1)
        if torch.equal(better, found):
            break
        found = better
    used: Tensor = torch.unique(found, return_inverse=True)[1]
    return used


def _cumulative(counts: NDArray[numpy.float64]) -> NDArray[numpy.uint16]:
    """Return the probabilities of rows as cumulative 32,768ths, at least one for each symbol."""
    symbols = counts.shape[1]
    shares = counts / counts.sum(axis=1, keepdims=True) * (TOTAL - symbols)
    ends = numpy.rint(numpy.cumsum(shares, axis=1)) + numpy.arange(1, symbols + 1)
    return numpy.concatenate([numpy.zeros((len(counts), 1)), ends], axis=1).astype(numpy.uint16)


def _escape_bits(beyond: Tensor, row: Tensor, rows: int) -> NDArray[numpy.uint8]:
    """Return for each row the order of the Exp-Golomb code that is shortest for what was escaped in it."""
    lengths = [
        torch.bincount(row, weights=range_coder.escape_length(beyond, order).double(), minlength=rows)
        for order in range(13)
    ]
    return torch.stack(lengths).argmin(0).numpy().astype(numpy.uint8)
