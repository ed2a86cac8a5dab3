"""What every cut with every codec costs, before link and load are known, and which of these can be the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from torchsurgeon.codec import CodecRow, CodecTable
from torchsurgeon.planning.row import Array, Row
from torchsurgeon.planning.sides import Cost, Profiles, Side
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.held import Holdings, layer_holdings
from torchsurgeon.tracing.specs import PartitionPoint

# How far out the points lie that bound the hull, with costs scaled to 0 … 1.
_FAR = 1e3
# Facets looked at together, which bounds memory.
_FACETS = 1024


class LayerCosts:
    """The costs of a graph's layers on device and server, added up over any closed set of layers.

    A set of layers is closed if it holds every layer that its members read from, so that the device can run it alone.

    Args:
        graph: the traced model.
        device: what each layer costs on the device; with several profiles, by each of its backends.
        server: what each layer costs on the server, likewise.

    Each head and each tail counts with the backend that runs it quickest.

    Raises:
        ProfileError: a profile is of another graph or batch size, or two of one machine are of the same backend.
    """

    def __init__(self, graph: LayerGraph, device: Profiles, server: Profiles) -> None:
        self.graph = graph
        self._device = heads = Side(graph, device, "device", tails=False)
        self._server = tails = Side(graph, server, "server", tails=True)
        # Where layers are added up, as for cuts across branches, they are those of the usual backends.
        self.head_s, self.device_s = heads.reach_s[heads.usual], heads.layer_s[heads.usual]
        self.tail_s, self.server_s = tails.reach_s[tails.usual], tails.layer_s[tails.usual]
        self._joules = [_known(profile.head_j) for profile in heads.profiles]
        self.head_j = joules = self._joules[heads.usual]
        self.device_j = None if joules is None else np.diff(joules)
        profile = heads.profiles[heads.usual]
        self._memory = profile.head_memory_bytes
        self._layer_memory = profile.memory_bytes
        self._held = layer_holdings(graph.flow, graph.model)
        self._weights = _running_bytes(self._held)
        # A view of an input shows the same values, so it is an input, too.
        self._inputs = {spec.name for spec in graph.inputs}
        for tensor in graph.closure.carried():
            if tensor.view_of in self._inputs:
                self._inputs.add(tensor.name)

    def rows(self, codecs: CodecTable | None = None) -> list[Row]:
        """Return a row for every cut and every codec, and rate of a codec, that may be used there.

        The graph's own points come first, in their order, and then the cuts across branches at which codecs were
        measured.

        Args:
            codecs: measured codecs. A lossy one is used only where it was measured to keep an accuracy budget; ``raw``
                is always used.

        Raises:
            CodecError: ``codecs`` is of another graph.
            PartitionError: a cut of ``codecs`` is none of the graph.
        """
        measured: dict[tuple[int, tuple[int, ...] | None], list[CodecRow]] = {}
        if codecs is not None:
            codecs.check(self.graph)
            for entry in codecs.rows:
                if entry.cost.within_budget:
                    measured.setdefault((entry.point, entry.layers), []).append(entry)
        across = [self.graph.point_of(layers) for _, layers in measured if layers is not None]
        rows = []
        for point in (*self.graph.points, *across):
            entries = measured.get((point.index, point.layers), [])
            if point.index == len(self.graph.layers):
                rows.append(self._row(point, "raw", 0.0, 0.0, 0.0, True))
                continue
            if all(entry.cost.codec != "raw" for entry in entries):
                rows.append(self._row(point, "raw", float(point.size_bytes), 0.0, 0.0, True))
            rows += [self._measured_row(point, entry) for entry in entries]
        return rows

    def rows_at(self, point: PartitionPoint, codecs: CodecTable | None = None) -> list[Row]:
        """Return the rows of one cut, as ``rows()`` does."""
        found = [row for row in self.rows(codecs) if (row.index, row.layers) == (point.index, point.layers)]
        return found or [self._row(point, "raw", float(point.size_bytes), 0.0, 0.0, True)]

    def _measured_row(self, point: PartitionPoint, entry: CodecRow) -> Row:
        cost = entry.cost
        row = self._row(point, cost.codec, cost.size_bytes, cost.encode_s, cost.decode_s, cost.lossless)
        if cost.head_share is not None:
            # Its share of the whole model was measured in eager PyTorch. By another backend it is taken to be the same.
            place = self._device.usual
            head_s, power_w = cost.head_share * float(self._device.reach_s[place, -1]), self._power_w(place)
            joules = None if power_w is None else power_w * (head_s + cost.encode_s)
            # Of memory, the model's own layers count, since the device falls back to them.
            row = dataclasses.replace(
                row, student=True, head_s=head_s, device_j=joules, backend=self._device.backend(place)
            )
        return dataclasses.replace(row, findings=entry.findings) if entry.findings else row

    def row_of(self, layers: Collection[int]) -> Row:
        """Return the row of the cut that runs exactly ``layers`` on the device, with its tensors sent as they are.

        Raises:
            PartitionError: the layers are not closed, or share memory with others.
        """
        point = self.graph.point_of(layers)
        return self._row(point, "raw", float(point.size_bytes), 0.0, 0.0, True)

    def memory_of(self, layers: Sequence[int]) -> int | None:
        """Return the bytes that some layers take on the device; None where they were not measured."""
        if self._layer_memory is None:
            return None
        weights = _running_bytes([self._held[i] for i in layers])[-1]
        return int(self._layer_memory[np.array(layers, dtype=np.intp)].max() + weights)

    def _row(
        self, point: PartitionPoint, codec: str, size_bytes: float, encode_s: float, decode_s: float, lossless: bool
    ) -> Row:
        k = point.index
        on_device = k == len(self.graph.layers)
        if point.layers is None:
            head, tail = self._device.at(k), self._server.at(k)
        else:
            head, tail = self._device.of(point.layers), self._server.of(point.layers)
        return Row(
            k,
            point.name,
            codec,
            head.seconds,
            encode_s,
            size_bytes,
            tail.seconds,
            decode_s,
            device_j=self._joules_of(point, head, encode_s),
            memory_bytes=self._memory_of(point),
            raw_input=not on_device and any(spec.name in self._inputs for spec in point.tensors),
            lossless=lossless,
            on_device=on_device,
            layers=point.layers,
            backend=self._device.backend(head.place) if k else "eager",
            server_backend="eager" if on_device else self._server.backend(tail.place),
        )

    def _joules_of(self, point: PartitionPoint, head: Cost, encode_s: float) -> float | None:
        reached, power_w = self._joules[head.place], self._power_w(head.place)
        if reached is None or power_w is None:
            return None
        chosen = point.layers
        joules = reached[point.index] if chosen is None else np.diff(reached)[np.array(chosen, dtype=np.intp)].sum()
        return float(joules) + power_w * encode_s

    def _power_w(self, place: int) -> float | None:
        reached = self._joules[place]
        return None if reached is None else float(reached[-1]) / self._device.profiles[place].total_s

    def _memory_of(self, point: PartitionPoint) -> int | None:
        if point.layers is not None:
            return self.memory_of(point.layers)
        return None if self._memory is None else int(self._memory[point.index] + self._weights[point.index])


def _known(joules: Array | None) -> Array | None:
    return joules if joules is not None and np.isfinite(joules).all() else None


def _running_bytes(held: Iterable[Holdings]) -> list[int]:
    """Return the bytes that the first layers hold together, for none, one, two and so on, each tensor once."""
    known: Holdings = {}
    sums = [0]
    for one in held:
        sums.append(sums[-1] + sum(size for key, size in one.items() if key not in known))
        known |= one
    return sums


def lower_hull(costs: Array) -> tuple[list[int], Array]:
    """Return the rows that minimize some weighted sum of the columns, and the weights at which the minimum changes.

    These rows are the corners of the lower convex hull of all rows, and the weights are the normals of its facets.

    Args:
        costs: shape (rows, columns).

    Returns:
        The indices of the rows, in order, and the weights, shape (facets, columns); empty where a single column varies,
        since then one row is the least under all weights.
    """
    from scipy.spatial import ConvexHull

    used = np.flatnonzero(np.ptp(costs, axis=0) > 0)
    if len(used) < 2:
        return [int(costs[:, used].sum(axis=1).argmin())], np.empty((0, costs.shape[1]))
    low, scale = costs.min(axis=0)[used], np.ptp(costs, axis=0)[used]
    # One far point per axis bounds the hull from above. Facets that touch one of them tilt by about 1/_FAR, hence the
    # tolerance with which facets are taken for the lower side.
    points = np.concatenate([(costs[:, used] - low) / scale, 1.0 + _FAR * np.eye(len(used))])
    hull = ConvexHull(points, qhull_options="QJ")
    lower = (hull.equations[:, :-1] <= 4 / _FAR).all(axis=1)
    normals, offsets = hull.equations[lower, :-1], hull.equations[lower, -1]
    weights = np.zeros((len(normals), costs.shape[1]))
    weights[:, used] = -normals.clip(max=0)
    weights[:, used] /= weights[:, used].sum(axis=1, keepdims=True) * scale
    # Qhull moves points a little ("joggles" them) so that any input has a hull. A row that lies as near to a facet as
    # the moved corners do may be a corner itself, so it is kept.
    ends = points[hull.simplices[lower]]
    joggle = np.abs(np.einsum("fed,fd->fe", ends, normals) + offsets[:, None]).max()
    depth = np.full(len(costs), -np.inf)
    for at in range(0, len(normals), _FACETS):
        block = slice(at, at + _FACETS)
        np.maximum(depth, (points[: len(costs)] @ normals[block].T + offsets[block]).max(axis=1), out=depth)
    return [int(i) for i in np.flatnonzero(depth >= -4 * joggle)], weights
