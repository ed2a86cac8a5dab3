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
class CrossingTensor:
    """A tensor that crosses the link when its producer runs on the device and one of its readers on the server.

    Attributes:
        producer: the mask of the layer that computes it; 0 for an input of the model.
        readers: the mask of the layers that read it.
        size_bytes: its bytes.
        views: the tensors that are views of it. They need not cross beside it, since the server can take them again.
    """

    producer: int
    readers: int
    size_bytes: int
    views: tuple[CrossingTensor, ...] = ()

    def bytes_crossing(self, inside: int) -> int:
        """Return the bytes that cross for it and its views when the layers of the mask ``inside`` run on the device."""
        if self.producer & ~inside:
            return 0
        if self.readers & ~inside:
            return self.size_bytes
        return min(self.size_bytes, sum(view.bytes_crossing(inside) for view in self.views))

    def all_readers(self) -> list[int]:
        """Return the layers that read it or one of its views."""
        return [*bits(self.readers), *(reader for view in self.views for reader in view.all_readers())]

    def last_reader(self) -> int:
        """Return the last layer that reads it or one of its views."""
        return max(self.all_readers(), default=-1)


class MinimumCut:
    """The closed sets that hold all layers before ``first`` and none from ``stop`` on, as cuts of a network.

    The device is the network's source and the server its sink. A layer on the source's side pays for the device, one on
    the sink's side for the server, and a tensor pays for its bytes, once, if any reader is on the sink's side. Edges
    that may never be cut make the sets closed.

    Args:
        first: the first layer that may lie on either side.
        stop: the layer after the last one.
        needs: for each layer, the mask of the layers it reads from.
        costs: device seconds, server seconds and joules of each layer, shape (layers, 3).
        tensors: the tensors that may cross.
        inside: the mask of the layers that every set must hold.
    """

    def __init__(
        self,
        first: int,
        stop: int,
        needs: Sequence[int],
        costs: Array,
        tensors: Sequence[CrossingTensor],
        inside: int = 0,
    ) -> None:
        self._first, self._layers = first, stop - first
        self._source, self._sink = self._layers, self._layers + 1
        fresh = itertools.count(self._layers + 2)
        ends: list[tuple[int, int]] = []
        prices: list[tuple[float, float, float, float]] = []
        closing: list[tuple[int, int]] = []

        def node(layer: int) -> int:
            return self._source if layer < first else self._sink if layer >= stop else layer - first

        def carry(origin: int, tensor: CrossingTensor) -> None:
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
        closing += [(self._source, i) for i in bits(inside >> first)]
        for tensor in tensors:
            carry(node(tensor.producer.bit_length() - 1), tensor)
        self._ends, self._prices, self._free = np.array(ends + closing).T, np.array(prices), len(closing)
        self._nodes = next(fresh)

    def best(self, weights: Array) -> int:
        """Return the cheapest set as a mask; of equal ones the smallest.

        Sets whose costs differ by less than about 1e-8 of the sum of all costs count as equal.

        Args:
            weights: of device seconds, bytes, server seconds and joules, shape (4,).
        """
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        prices = self._prices @ weights
        total = prices.sum()
        scaled = np.round(prices * (_SUM / total if total > 0 else 0.0))
        capacities = np.concatenate([scaled, np.full(self._free, _NEVER)]).astype(np.int32)
        network = csr_array((capacities, self._ends), shape=(self._nodes, self._nodes))
        residual = network - maximum_flow(network, self._source, self._sink).flow
        residual.eliminate_zeros()
        # What the source still reaches beside the maximum flow is the source's side of the minimum cut.
        reached = breadth_first_order(residual, self._source, return_predecessors=False)
        return (1 << self._first) - 1 | sum(1 << self._first + int(i) for i in reached if i < self._layers)


def bits(mask: int) -> list[int]:
    """Return the layers in a mask, in order."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
