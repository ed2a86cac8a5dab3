"""Cuts across parallel branches: closed sets of layers that are not simply the first ones in the model's order.

A set of layers is closed if it holds every layer that its members read from, so that the device can run it alone.

Some layers depend on all earlier layers, and all later layers depend on them. Such a layer splits the problem. A closed
set that holds it also holds all layers before it; a closed set that does not hold it holds no layer after it. The
layers between two of these form a block, and each block can be searched by itself:

* In a small block all closed sets are tried.
* In a large block the best set is found by a minimum s-t cut, for given weights of device seconds, bytes, server
  seconds and joules. The weights are taken from the facets of the lower hull of the costs known so far. When no facet
  gives a better set any more, every set that is the best under some weights has been found.

A set is left out only for another one that costs no more, and that keeps every constraint which the first one keeps.
So memory, the number of layers and whether an input leaves the device count like costs where a constraint asks for
them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from torchsurgeon.planning.mincut import CrossingTensor, MinimumCut, bits
from torchsurgeon.planning.objective import NO_LIMITS, Constraints, Objective
from torchsurgeon.planning.row import Array, Row, columns, non_dominated
from torchsurgeon.planning.rows import LayerCosts, lower_hull

# A block with more closed sets than this is searched by minimum cuts.
_MOST_SETS = 2000
# Beyond this many rows across branches, only those on the lower hull are kept.
_MOST_ROWS = 200
# Bounds on the minimum cuts asked for in one block: in number, and in number times layers.
_MOST_CUTS = 1000
_MOST_LAYER_CUTS = 200_000


class Block:
    """The units between two that split the graph, which can be searched by themselves.

    Sets of units are bit masks throughout: bit ``i`` stands for unit ``i``.

    Args:
        units: the units of the graph.
        first: the first unit of the block.
        stop: the unit after its last one.

    Attributes:
        before: the mask of the units before the block, which every closed set of the block holds.
        tensors: the tensors that exist in the block and may have to cross.
    """

    def __init__(self, units: Units, first: int, stop: int) -> None:
        self.units, self.first, self.stop = units, first, stop
        self.before = (1 << first) - 1
        self.tensors = [t for t in units.tensors if t.producer < 1 << stop and t.last_reader() >= first]

    def sets(self, most: int) -> list[int] | None:
        """Return all closed sets that end within the block, as masks; None when there are more than ``most``."""
        found = [self.before]
        for unit in range(self.first, self.stop):
            needs = self.units.needs[unit]
            found += [inside | 1 << unit for inside in found if not needs & ~inside]
            if len(found) > most:
                return None
        return found

    def costs(self, masks: Iterable[int]) -> Array:
        """Return device seconds, bytes, server seconds and joules of each set, shape (sets, 4)."""
        units, table = self.units, []
        before = units.costs[: self.first].sum(axis=0) if self.first else np.zeros(3)
        for mask in masks:
            chosen = [i for i in range(self.first, self.stop) if mask >> i & 1]
            device_s, server_s, joules = before + units.costs[chosen].sum(axis=0)
            size_bytes = sum(tensor.bytes_crossing(mask) for tensor in self.tensors)
            table.append((device_s, size_bytes, units.tail_s - server_s, joules))
        return np.array(table).reshape(-1, 4)


class Units:
    """The layers of a graph that depend on its inputs, in order.

    A layer that computes a constant belongs to the unit that reads it first, since it can run on either side.

    Attributes:
        layers: for each unit, its layers.
        needs: for each unit, the mask of the units that it reads from.
        costs: device seconds, server seconds and joules of each unit, shape (units, 3).
        tensors: the tensors between units.
        tail_s: the server's seconds for the whole model.
        reading_inputs: the mask of the units that read an input of the model, a view of one, or what these depend on.
            No input leaves the device exactly where all of them run on it.
    """

    def __init__(self, costs: LayerCosts) -> None:
        closure, graph = costs.graph.closure, costs.graph
        self.tail_s = float(costs.tail_s[0])
        self.layers: list[list[int]] = []
        unit_of: dict[int, int] = {}
        for layer in range(len(graph.layers)):
            if layer in closure.constants:
                continue
            own = [i for i in _constants_behind(layer, closure.needs, closure.constants) if i not in unit_of]
            unit_of |= dict.fromkeys((*own, layer), len(self.layers))
            self.layers.append([*own, layer])
        self.needs = [
            sum(1 << n for n in {unit_of[j] for layer in unit for j in closure.needs[layer]} - {i})
            for i, unit in enumerate(self.layers)
        ]
        joules = np.zeros(len(graph.layers)) if costs.device_j is None else costs.device_j
        of_layers = np.stack([costs.device_s, costs.server_s, joules], axis=1)
        self.costs = np.stack([of_layers[unit].sum(axis=0) for unit in self.layers])
        end = len(self.layers)
        carried = {c.name: c for c in closure.carried()}
        views: dict[str, list[CrossingTensor]] = {}
        self.tensors: list[CrossingTensor] = []
        for tensor in reversed(carried.values()):
            readers = {end if i == len(graph.layers) else unit_of.get(i, end) for i in tensor.consumers}
            made = CrossingTensor(
                1 << unit_of[tensor.producer] if tensor.producer >= 0 else 0,
                sum(1 << i for i in readers),
                graph.values[tensor.name].size_bytes,
                tuple(views.get(tensor.name, ())),
            )
            if tensor.view_of in carried:
                views.setdefault(str(tensor.view_of), []).append(made)
            else:
                self.tensors.append(made)
        self.reading_inputs = self._behind(
            sum({1 << reader for tensor in self.tensors if not tensor.producer for reader in tensor.all_readers()})
        )

    def _behind(self, mask: int) -> int:
        """Return ``mask`` with everything that its units depend on."""
        for unit in reversed(range(len(self.layers))):
            if mask >> unit & 1:
                mask |= self.needs[unit]
        return mask

    def blocks(self) -> list[Block]:
        """Return the blocks that hold two units or more, in order."""
        # For each unit, everything it depends on, directly or not.
        behind: list[int] = []
        for needs in self.needs:
            mask = needs
            for i in bits(needs):
                mask |= behind[i]
            behind.append(mask)
        splitting, common = [], -1
        for i in range(len(behind) - 1, -1, -1):
            if common >> i & 1 and behind[i] == (1 << i) - 1:
                splitting.append(i)
            common &= behind[i]
        edges = [-1, *reversed(splitting), len(behind)]
        return [Block(self, a + 1, b) for a, b in itertools.pairwise(edges) if b - a > 2]

    def layers_of(self, mask: int) -> list[int]:
        """Return the graph's layers in a set of units."""
        return sorted(layer for i in bits(mask) for layer in self.layers[i])


def across_branches(
    costs: LayerCosts, rows: Sequence[Row], limits: Constraints = NO_LIMITS, objective: Objective | None = None
) -> tuple[list[Row], bool]:
    """Return the cuts across branches that can win against ``rows``, with their tensors sent as they are.

    There are none in a model without parallel branches, nor in one that ignores its input, nor where shared memory
    allows only the graph's own points.
    Where very many cuts remain, and neither ``limits`` nor a throughput objective says otherwise, only those on the
    lower hull of the costs are returned.

    Args:
        costs: what the layers cost.
        rows: the graph's own points, and cuts across branches at which codecs were measured. These are not returned.
        limits: constraints. The rows returned hold the best that keeps them, and the best that keeps all but one.
        objective: what is minimized; None where that is not known yet.

    Returns:
        The rows, and whether none is missing that is better under the objective, or under any where there is none.
    """
    closure = costs.graph.closure
    if closure.prefixes_only or len(closure.constants) == len(costs.graph.layers):
        return [], True
    units = Units(costs)
    measured = {row.layers for row in rows if row.layers is not None}
    masks: list[int] = []
    small: list[tuple[int, Block]] = []
    large: list[Block] = []
    for block in units.blocks():
        found = block.sets(_MOST_SETS)
        if found is None:
            large.append(block)
        else:
            across = [mask for mask in found if mask & (mask + 1)]
            if measured:
                across = [mask for mask in across if tuple(units.layers_of(mask)) not in measured]
            small += [(mask, block) for mask in across]
    # The best of a weighted sum lies on the hull; that of a slowest stage need not.
    summed = objective is not None and not objective.throughput
    on_hull = (objective is None or summed) and not set(limits.given()) - {"server_allowed", "raw_input"}
    exact = not large
    if small:
        # Codecs are left out of the comparison, so that what remains holds the best without them, too.
        plain = [row for row in rows if row.codec == "raw"]
        known = np.concatenate([columns(plain)[:, :4], _limited(plain, limits)], axis=1)
        of_sets = np.concatenate([block.costs([mask]) for mask, block in small])
        of_limits = _limited([_Limited(costs, units, mask) for mask, _ in small], limits)
        tried = np.concatenate([known, np.concatenate([of_sets, of_limits], axis=1)])
        kept = [i - len(known) for i in non_dominated(tried) if i >= len(known)]
        if len(kept) > _MOST_ROWS and on_hull:
            exact = False
            # Once among all, and once among those that keep the input on the device, if that is asked for.
            groups = [np.arange(len(tried))]
            if not limits.raw_input:
                groups.append(np.flatnonzero(tried[:, -1] == 0))
            corners = {int(group[i]) for group in groups for i in lower_hull(tried[group, :4])[0]}
            kept = [i - len(known) for i in sorted(corners) if i >= len(known)]
        masks += [small[i][0] for i in kept]
    exact = exact or (summed and on_hull)
    for block in large:
        for inside in {0, 0 if limits.raw_input else units.reading_inputs}:
            found, searched = _on_hulls(costs, block, inside)
            masks += found
            exact = exact and any(used.issuperset(_columns_of(objective)) for used in searched)
    sets = [tuple(units.layers_of(mask)) for mask in dict.fromkeys(masks)]
    return [costs.row_of(layers) for layers in sets if layers not in measured], exact


@dataclasses.dataclass(frozen=True)
class _Limited:
    """What constraints ask about a set of layers, under the names of a ``Row``, and computed only when it is asked."""

    costs: LayerCosts
    units: Units
    mask: int

    @property
    def index(self) -> int:
        return len(self.units.layers_of(self.mask))

    @property
    def raw_input(self) -> bool:
        return bool(self.units.reading_inputs & ~self.mask)

    @property
    def memory_bytes(self) -> int | None:
        return self.costs.memory_of(self.units.layers_of(self.mask))


def _limited(found: Sequence[Row | _Limited], limits: Constraints) -> Array:
    """Return what the constraints ask for, each as a column of which less is better, shape (rows, constraints)."""
    asked: list[list[float]] = []
    if limits.memory_bytes is not None:
        asked.append([np.inf if one.memory_bytes is None else one.memory_bytes for one in found])
    if limits.min_layers:
        asked.append([-one.index for one in found])
    if not limits.raw_input:
        asked.append([one.raw_input for one in found])
    return np.array(asked, dtype=np.float64).reshape(len(asked), len(found)).T


def _columns_of(objective: Objective | None) -> set[int]:
    """Return the columns of costs that a weighted sum counts."""
    if objective is None:
        return {0, 1, 2, 3}
    timed = {0, 1, 2} if objective.latency else {2} if objective.server_time else set()
    return timed | ({1, 3} if objective.energy else set())


def _on_hulls(costs: LayerCosts, block: Block, inside: int) -> tuple[list[int], list[set[int]]]:
    """Return the sets of a block that minimize some weighted sum of its costs.

    Returns:
        The sets as masks, and the sets of columns of whose weighted sums none is missing.
    """
    of_layers = block.units.costs[block.first : block.stop]
    watts = costs.head_j[-1] / costs.head_s[-1] if costs.head_j is not None and costs.head_s[-1] else 0.0
    if np.allclose(of_layers[:, 2], watts * of_layers[:, 0], rtol=1e-9, atol=0):
        # Joules are seconds in another unit, so whatever counts them is a weighted sum of the other columns.
        found, complete = _on_the_hull(costs, block, [0, 1, 2], inside, [])
        return found, [{0, 1, 2, 3}] if complete else []
    # Time and energy alone are searched before all four columns, which may need more cuts than are asked for.
    masks: list[int] = []
    searched = []
    for used in ([0, 1, 2], [1, 3], [0, 1, 2, 3]):
        found, complete = _on_the_hull(costs, block, used, inside, masks)
        masks += found
        searched += [set(used)] if complete else []
    return masks, searched


def _on_the_hull(
    costs: LayerCosts, block: Block, used: list[int], inside: int, found_before: Sequence[int]
) -> tuple[list[int], bool]:
    """Return the sets of a block that minimize some weighted sum of the ``used`` columns of its costs.

    Args:
        costs: what the layers cost.
        block: the block.
        used: the columns.
        inside: the mask of the units that every set must hold.
        found_before: sets that are known already.

    Returns:
        The other sets as masks, and whether all of them were found within the bounded number of minimum cuts.
    """
    if inside >> block.stop:
        return [], True
    rows = [row for row in costs.rows() if not (inside and row.raw_input)]
    known = columns(rows)[:, :4]
    known[-1, 1] = sum(spec.size_bytes for spec in costs.graph.outputs)
    network = MinimumCut(block.first, block.stop, block.units.needs, block.units.costs, block.tensors, inside)
    budget = min(_MOST_CUTS, _MOST_LAYER_CUTS // (block.stop - block.first))
    asked: set[bytes] = set()
    found: dict[int, None] = {}
    points = np.concatenate([known, block.costs(found_before)])[:, used]
    while True:
        corners, weights = lower_hull(points)
        points = points[corners]
        better: list[Array] = []
        for weight in weights:
            key = (weight / weight.max()).round(9).tobytes()
            if key in asked:
                continue
            if len(asked) >= budget:
                return list(found), False
            asked.add(key)
            full = np.zeros(4)
            full[used] = weight
            mask = network.best(full)
            cost = block.costs([mask])[0, used]
            if cost @ weight < (points @ weight).min() * (1 - 1e-9):
                better.append(cost)
                found[mask] = None
        if not better:
            return list(found), True
        points = np.concatenate([points, np.stack(better)])


def _constants_behind(layer: int, needs: tuple[tuple[int, ...], ...], constants: frozenset[int]) -> list[int]:
    """Return the layers computing constants that ``layer`` reads, directly or through other constants."""
    found: list[int] = []
    open_layers = [layer]
    while open_layers:
        fresh = [j for j in needs[open_layers.pop()] if j in constants and j not in found]
        found += fresh
        open_layers += fresh
    return found
