"""The best closed set of layers for given weights, as a minimum s-t cut (Picard, 1976)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Capacities are whole numbers of 32 bits in SciPy; finite ones add up to this at most, so that nothing overflows.
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
        return max(self.readers.bit_length() - 1, *(view.last_reader() for view in self.views), -1)


def minimum_cut(
    first: int,
    stop: int,
    needs: Sequence[int],
    costs: NDArray[np.float64],
    tensors: Sequence[Tensor],
    weights: NDArray[np.float64],
) -> int:
    """Return the cheapest closed set among those that hold all layers before ``first`` and none from ``stop`` on.

    ``needs`` are masks of layers, ``costs`` their device seconds, server seconds and joules, shape (layers, 3).
    ``weights`` are of device seconds, bytes, server seconds and joules. The device is the source: a layer on its side pays
    for the device, one on the sink's for the server, and a tensor with readers on the sink's side for its bytes, once.
    Costs are told apart down to 1e-8 of their sum.
    """
    layers = stop - first
    source, sink = layers, layers + 1
    ends: list[tuple[int, int]] = []
    prices: list[float] = []
    fresh = itertools.count(layers + 2)

    def edge(a: int, b: int, price: float) -> None:
        ends.append((a, b))
        prices.append(price)

    for i in range(layers):
        device_s, server_s, joules = costs[first + i]
        edge(i, sink, weights[0] * device_s + weights[3] * joules)
        edge(source, i, weights[2] * server_s)
        for j in bits(needs[first + i] >> first):
            edge(i, j, np.inf)

    def node(layer: int) -> int:
        return source if layer < first else sink if layer >= stop else layer - first

    def carry(origin: int, tensor: Tensor) -> None:
        own = next(fresh)
        edge(origin, own, weights[1] * tensor.size_bytes)
        for reader in {node(i) for i in bits(tensor.readers)}:
            edge(own, reader, np.inf)
        for view in tensor.views:
            carry(own, view)

    for tensor in tensors:
        carry(node(tensor.producer.bit_length() - 1), tensor)
    here = _source_side(np.array(ends), np.array(prices), source, sink)
    return (1 << first) - 1 | sum(1 << first + int(i) for i in here if i < layers)


def _source_side(ends: NDArray[np.int_], prices: NDArray[np.float64], source: int, sink: int) -> NDArray[np.int_]:
    """Return the nodes on the source's side of a minimum cut; of equal cuts the one with the fewest there."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    finite = np.isfinite(prices)
    total = prices[finite].sum()
    capacities = np.full(len(prices), _NEVER, dtype=np.int32)
    capacities[finite] = np.round(prices[finite] * (_SUM / total if total > 0 else 0.0))
    count = int(ends.max()) + 1
    graph = csr_array((capacities, ends.T), shape=(count, count))
    flow = maximum_flow(graph, source, sink).flow
    residual = graph - flow
    residual.eliminate_zeros()
    return np.asarray(breadth_first_order(residual, source, return_predecessors=False))


def bits(mask: int) -> list[int]:
    """Return the layers in a mask, in order."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
