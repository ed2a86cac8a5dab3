"""The best closed set of layers for given weights, as a minimum s-t cut (Picard, 1976)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Capacities are whole numbers of 32 bits in SciPy; the finite ones add up to this at most, so that nothing overflows.
_SUM = 1 << 29
_NEVER = 1 << 30


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that may cross: masks of its layer (0 for a model input) and its readers, its bytes, and its views."""

    producer: int
    readers: int
    size_bytes: int
    views: tuple[Tensor, ...] = ()

    def bytes_crossing(self, inside: int) -> int:
        """Bytes that cross for this tensor and its views when the layers of ``inside`` run on the device."""
        if self.producer & ~inside:
            return 0
        if self.readers & ~inside:
            return self.size_bytes
        return min(self.size_bytes, sum(view.bytes_crossing(inside) for view in self.views))

    def last_reader(self) -> int:
        """The last layer that reads it or one of its views."""
        return max([self.readers.bit_length() - 1, *(view.last_reader() for view in self.views)])


class MinimumCut:
    """The closed sets that hold all layers before ``first`` and none from ``stop`` on, as cuts of a network.

    ``needs`` are masks of layers, ``costs`` their device seconds, server seconds and joules, shape (layers, 3). The
    device is the source: a layer on its side pays for the device, one on the sink's for the server, and a tensor with
    readers on the sink's side for its bytes, once.
    """

    def __init__(self, first: int, stop: int, needs: Sequence[int], costs: Array, tensors: Sequence[Tensor]) -> None:
        self._first, self._layers = first, stop - first
        self._source, self._sink = self._layers, self._layers + 1
        fresh = itertools.count(self._layers + 2)
        ends: list[tuple[int, int]] = []
        prices: list[tuple[float, float, float, float]] = []
        closing: list[tuple[int, int]] = []

        def node(layer: int) -> int:
            return self._source if layer < first else self._sink if layer >= stop else layer - first

        def carry(origin: int, tensor: Tensor) -> None:
            own = next(fresh)
            ends.append((origin, own))
            prices.append((0.0, float(tensor.size_bytes), 0.0, 0.0))
            closing.extend((own, reader) for reader in {node(i) for i in bits(tensor.readers)})
            for view in tensor.views:
                carry(own, view)

        for i, (device_s, server_s, joules) in enumerate(costs[first:stop]):
            ends += [(i, self._sink), (self._source, i)]
            prices += [(device_s, 0.0, 0.0, joules), (0.0, 0.0, server_s, 0.0)]
            closing += [(i, j) for j in bits(needs[first + i] >> first)]
        for tensor in tensors:
            carry(node(tensor.producer.bit_length() - 1), tensor)
        self._ends, self._prices, self._free = np.array(ends + closing).T, np.array(prices), len(closing)
        self._nodes = next(fresh)

    def best(self, weights: Array) -> int:
        """Return the cheapest set as a mask for weights of device seconds, bytes, server seconds and joules; of equal
        ones the smallest. Costs are told apart down to some 1e-8 of their sum."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        prices = self._prices @ weights
        total = prices.sum()
        scaled = np.round(prices * (_SUM / total if total > 0 else 0.0))
        capacities = np.concatenate([scaled, np.full(self._free, _NEVER)]).astype(np.int32)
        network = csr_array((capacities, self._ends), shape=(self._nodes, self._nodes))
        residual = network - maximum_flow(network, self._source, self._sink).flow
        residual.eliminate_zeros()
        here = breadth_first_order(residual, self._source, return_predecessors=False)
        return (1 << self._first) - 1 | sum(1 << self._first + int(i) for i in here if i < self._layers)


def bits(mask: int) -> list[int]:
    """Return the layers in a mask, in order."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
