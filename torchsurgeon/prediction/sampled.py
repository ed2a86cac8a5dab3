"""Which operations a kind's samples cover, and how far outside of them another one lies.

Distances are octaves: a layer with twice the channels of the nearest sample is one octave from it. An operation is
outside where one of its sizes is beyond those of all samples of its variant, or where fewer than three of them are
near it although each size by itself is covered.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.prediction.kinds import Array
from torchsurgeon.prediction.samples import SampleTable

FEWEST_OF_VARIANT = 5
"""With fewer samples than this, a variant counts as one that was not sampled."""
# So many samples must be near an operation. The quantile is that of the samples' own distances to others, up to which
# one is near.
_COMPANY, _NEAR = 3, 0.99
# The quantile of the samples' work below which an operation is slight.
_SLIGHT = 0.1
# As many neighbors of a sample are searched for those of other networks.
_NEIGHBORS = 32


class SampledRange:
    """The operations that the samples of one kind cover.

    Args:
        table: the samples.
    """

    def __init__(self, table: SampleTable) -> None:
        self._kind = table.kind
        self._item_bytes = frozenset(table.item_bytes.tolist())
        self._names = (*table.kind.columns, "floating-point operations", "bytes read and written")
        self._variants = {
            variant: _Variant(table.take(table.variants == variant)) for variant in set(table.variants.tolist())
        }

    def samples_of(self, variant: str) -> int:
        """Return how many samples there are of a variant."""
        return len(self._variants[variant].table) if variant in self._variants else 0

    def has_items_of(self, item_bytes: int) -> bool:
        """Return whether there are samples of elements of so many bytes."""
        return item_bytes in self._item_bytes

    def outside(self, table: SampleTable) -> tuple[Array, NDArray[np.bool_]]:
        """Return how far each operation lies outside of the samples.

        Args:
            table: the operations, of variants that have samples; their seconds and joules are not read.

        Returns:
            By how many octaves, shape (operations,), 0 inside; and which operations have less work than nearly all
            samples, so that they take at most about as long as the shortest of these.
        """
        octaves, slight = np.zeros(len(table)), np.zeros(len(table), dtype=bool)
        if self._kind.columns:
            for variant in set(table.variants.tolist()):
                rows = table.variants == variant
                own, part = self._variants[variant], table.take(rows)
                octaves[rows] = np.maximum(own.beyond(part).max(axis=1), own.distance(part) - self._reach)
                slight[rows] = own.is_slight(part)
        return np.maximum(octaves, 0.0), slight

    def why(self, table: SampleTable, row: int) -> str:
        """Return in words why an operation is outside of the samples.

        Args:
            table: the operations.
            row: which of them is meant.
        """
        part = table.take(slice(row, row + 1))
        own = self._variants[str(part.variants[0])]
        beyond = own.beyond(part)[0]
        at = int(beyond.argmax())
        if beyond[at] <= 0:
            return f"sizes that fewer than {_COMPANY} samples come near"
        value, low, high = (2.0 ** ends[at] for ends in (_measures(part)[0], own.low, own.high))
        return f"{value:,.0f} {self._names[at].replace('_', ' ')}, where samples have {low:,.0f} to {high:,.0f}"

    @functools.cached_property
    def _reach(self) -> float:
        """How far nearly all samples are from the third nearest sample of another network.

        Samples of one network are alike. A layer of a new model has no such company.
        """
        known = [own.to_others() for own in self._variants.values() if len(own.table) >= FEWEST_OF_VARIANT]
        return float(np.quantile(np.concatenate(known), _NEAR)) if known else 0.0


class _Variant:
    """The samples of one variant."""

    def __init__(self, table: SampleTable) -> None:
        self.table = table
        measures = _measures(table)
        self.low, self.high = measures.min(axis=0), measures.max(axis=0)
        self._slight = np.quantile(measures, _SLIGHT, axis=0)

    def beyond(self, table: SampleTable) -> Array:
        """Return by how many octaves each size is beyond those of all samples, shape (operations, sizes)."""
        measures = _measures(table)
        return np.asarray(np.maximum(measures - self.high, 0) + np.maximum(self.low - measures, 0))

    def is_slight(self, table: SampleTable) -> NDArray[np.bool_]:
        """Return which operations have less work than nearly all samples, shape (operations,)."""
        work = slice(-2, None)
        return np.asarray((_measures(table)[:, work] <= self._slight[work]).all(axis=1))

    def distance(self, table: SampleTable) -> Array:
        """Return how far each operation is from the third nearest sample, shape (operations,)."""
        nearest = min(_COMPANY, len(self.table))
        return np.asarray(self._tree.query(_octaves(table), k=[nearest], p=np.inf)[0][:, 0])

    def to_others(self) -> Array:
        """Return how far each sample is from the third nearest one of another network, shape (samples,)."""
        count = min(_NEIGHBORS, len(self.table))
        distances, found = self._tree.query(_octaves(self.table), k=range(1, count + 1), p=np.inf)
        others = self.table.groups[found] != self.table.groups[:, None]
        others[:, -1] = True
        third = (others.cumsum(axis=1) >= min(_COMPANY, others.sum(axis=1).min())).argmax(axis=1)
        return np.asarray(distances[np.arange(len(distances)), third])

    @functools.cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(_octaves(self.table))


def _octaves(table: SampleTable) -> Array:
    return np.asarray(np.log2(np.maximum(table.sizes, 1.0)))


def _measures(table: SampleTable) -> Array:
    """Return the logarithms of sizes and work, shape (operations, columns of the kind + 2)."""
    flops, moved = table.kind.work(table.sizes)
    work = np.stack([flops, moved * table.item_bytes], axis=1)
    return np.hstack([_octaves(table), np.log2(np.maximum(work, 1.0))])
