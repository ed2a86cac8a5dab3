"""What every cut with every codec costs, before link and load are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.codec import CodecTable
from torchsurgeon.errors import ProfileError
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

Array = NDArray[np.float64]
_FAR = 1e3
_FACETS = 1024
_MOST = 1e18


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run a model: where it is cut and how what crosses is encoded, with its cost at load and slowdown 1.

    ``index`` and ``name`` are the partition point's; ``layers`` lists the device's layers where these are not the first
    ``index``. ``on_device`` is set when everything runs there and nothing crosses. ``head_s`` and ``encode_s`` are the
    device's seconds, ``tail_s`` and ``decode_s`` the server's, ``size_bytes`` what crosses the uplink. ``device_j`` are
    the device's joules for head and encoding, None where no meter told them. ``memory_bytes`` is what the head's
    weights and tensors take at most, None where it was not measured. ``raw_input`` says that an input of the model
    crosses.
    """

    index: int
    name: str
    codec: str
    head_s: float
    encode_s: float
    size_bytes: float
    tail_s: float
    decode_s: float
    device_j: float | None = None
    memory_bytes: int | None = None
    raw_input: bool = False
    lossless: bool = True
    on_device: bool = False
    layers: tuple[int, ...] | None = None

    def point(self, graph: LayerGraph) -> PartitionPoint:
        """Return where to cut ``graph``, for :func:`~torchsurgeon.cutting.cut`."""
        return graph.point(self.index) if self.layers is None else graph.point_of(self.layers)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        layers = data["layers"]
        row = Row(**{**data, "layers": None if layers is None else tuple(layers)})
        for name in ("index", "head_s", "encode_s", "size_bytes", "tail_s", "decode_s"):
            if not 0 <= getattr(row, name) < _MOST:
                raise ValueError(f"{name} is {getattr(row, name)}")
        if row.device_j is not None and not abs(row.device_j) < _MOST:
            raise ValueError(f"device_j is {row.device_j}")
        return row


class Costs:
    """The costs of a graph's layers on device and server, added up over any closed set of layers.

    Raises :class:`~torchsurgeon.errors.ProfileError` when a profile is of another graph or batch size.
    """

    def __init__(self, graph: LayerGraph, device: LayerProfile, server: LayerProfile) -> None:
        for what, profile in (("device", device), ("server", server)):
            profile.check(graph)
            if profile.batch != graph.batch:
                raise ProfileError(
                    f"the {what}'s profile is of batches of {profile.batch}, the graph of batches of {graph.batch}; "
                    "profile the graph that is planned for"
                )
        self.graph = graph
        self.head_s, self.tail_s = device.head_s, server.tail_s
        self.device_s, self.server_s = np.diff(self.head_s), -np.diff(self.tail_s)
        self.head_j = device.head_j
        if self.head_j is not None and not np.isfinite(self.head_j).all():
            self.head_j = None
        self.device_j = None if self.head_j is None else np.diff(self.head_j)
        self.power_w = None if self.head_j is None else float(self.head_j[-1]) / device.total_s
        self._memory = device.head_memory_bytes
        self._layer_memory = device.memory_bytes
        self._weights = np.cumsum([0, *(layer.parameter_bytes for layer in graph.layers)])
        self._inputs = {spec.name for spec in graph.inputs}

    def rows(self, codecs: CodecTable | None = None) -> list[Row]:
        """Return every partition point with every codec that may be used there, from all on the server on.

        Lossy codecs are left out unless they were measured to keep an accuracy budget. ``raw`` is always there.
        Raises :class:`~torchsurgeon.wire.CodecError` when ``codecs`` is of another graph.
        """
        measured: dict[int, list[tuple[str, float, float, float, bool]]] = {}
        if codecs is not None:
            codecs.check(self.graph)
            for entry in codecs.rows:
                cost = entry.cost
                if cost.within_budget:
                    way = (cost.codec, cost.size_bytes, cost.encode_s, cost.decode_s, cost.lossless)
                    measured.setdefault(entry.point, []).append(way)
        rows = []
        for point in self.graph.points:
            ways = measured.get(point.index, [])
            if point.index == len(self.graph.layers):
                ways = [("raw", 0.0, 0.0, 0.0, True)]
            elif all(way[0] != "raw" for way in ways):
                ways = [("raw", float(point.size_bytes), 0.0, 0.0, True), *ways]
            rows += [self._row(point, *way) for way in ways]
        return rows

    def row_of(self, layers: Collection[int]) -> Row:
        """Return the cut that runs exactly ``layers`` on the device, its tensors sent as they are.

        Raises :class:`~torchsurgeon.errors.PartitionError` when that is no cut.
        """
        point = self.graph.point_of(layers)
        return self._row(point, "raw", float(point.size_bytes), 0.0, 0.0, True)

    def _row(
        self, point: PartitionPoint, codec: str, size_bytes: float, encode_s: float, decode_s: float, lossless: bool
    ) -> Row:
        k = point.index
        all_here = k == len(self.graph.layers)
        chosen = None if point.layers is None else np.array(point.layers, dtype=np.intp)
        if chosen is None:
            head_s, tail_s = float(self.head_s[k]), float(self.tail_s[k])
            joules = None if self.head_j is None else float(self.head_j[k])
            memory = None if self._memory is None else int(self._memory[k] + self._weights[k])
        else:
            head_s = float(self.device_s[chosen].sum())
            tail_s = float(self.tail_s[0] - self.server_s[chosen].sum())
            joules = None if self.device_j is None else float(self.device_j[chosen].sum())
            weights = np.diff(self._weights)[chosen].sum()
            memory = None if self._layer_memory is None else int(self._layer_memory[chosen].max() + weights)
        if joules is not None and self.power_w is not None:
            joules += self.power_w * encode_s
        return Row(
            k,
            point.name,
            codec,
            head_s,
            encode_s,
            size_bytes,
            tail_s,
            decode_s,
            device_j=joules,
            memory_bytes=memory,
            raw_input=not all_here and any(spec.name in self._inputs for spec in point.tensors),
            lossless=lossless,
            on_device=all_here,
            layers=point.layers,
        )


def columns(rows: Iterable[Row]) -> Array:
    """Return the rows as numbers, shape (rows, 5): device seconds, bytes, server seconds, joules (0 where unknown), and
    whether anything crosses."""
    table = [
        (r.head_s + r.encode_s, r.size_bytes, r.tail_s + r.decode_s, r.device_j or 0.0, 0.0 if r.on_device else 1.0)
        for r in rows
    ]
    return np.array(table, dtype=np.float64).reshape(-1, 5)


def non_dominated(costs: Array) -> list[int]:
    """Return which rows of ``costs`` no other row is at most as large as in every column, in their order; of equal rows
    the first."""
    if not len(costs):
        return []
    order = np.lexsort(costs.T[::-1])
    # In this order no row undercuts an earlier one in the first column, which is not looked at again.
    rest = [column for column in costs.T[1:] if np.ptp(column) > 0]
    kept = [np.empty_like(column) for column in rest]
    indices: list[int] = []
    for i in order:
        count = len(indices)
        below = np.ones(count, dtype=bool)
        for column, known in zip(rest, kept, strict=True):
            below &= known[:count] <= column[i]
        if not below.any():
            for column, known in zip(rest, kept, strict=True):
                known[count] = column[i]
            indices.append(int(i))
    return sorted(indices)


def lower_hull(costs: Array) -> tuple[list[int], Array]:
    """Return the rows of ``costs`` of which each is the least under some weights of the columns, in their order, and
    the weights, shape (corners, columns), at which several of them are.

    Where no weights can tell more apart, as in a single column that varies, the weights are empty.
    """
    from scipy.spatial import ConvexHull

    used = np.flatnonzero(np.ptp(costs, axis=0) > 0)
    if len(used) < 2:
        return [int(costs[:, used].sum(axis=1).argmin())], np.empty((0, costs.shape[1]))
    low, scale = costs.min(axis=0)[used], np.ptp(costs, axis=0)[used]
    # Points far out along each axis close the hull. They lie above all others, or they would be the least where the
    # weight of their axis is small; so facets that end in one lean out of the lower side by the inverse of how far.
    points = np.concatenate([(costs[:, used] - low) / scale, 1.0 + _FAR * np.eye(len(used))])
    hull = ConvexHull(points, qhull_options="QJ")
    lower = (hull.equations[:, :-1] <= 4 / _FAR).all(axis=1)
    normals, offsets = hull.equations[lower, :-1], hull.equations[lower, -1]
    weights = np.zeros((len(normals), costs.shape[1]))
    weights[:, used] = -normals.clip(max=0)
    weights[:, used] /= weights[:, used].sum(axis=1, keepdims=True) * scale
    # Qhull joggles points so that any input has a hull: what lies as near to it as the corners do may belong to it.
    ends = points[hull.simplices[lower]]
    joggle = np.abs(np.einsum("fed,fd->fe", ends, normals) + offsets[:, None]).max()
    depth = np.full(len(costs), -np.inf)
    for at in range(0, len(normals), _FACETS):
        block = slice(at, at + _FACETS)
        np.maximum(depth, (points[: len(costs)] @ normals[block].T + offsets[block]).max(axis=1), out=depth)
    return [int(i) for i in np.flatnonzero(depth >= -4 * joggle)], weights
