"""The best partition points for more than two machines in a row (device, edge, cloud), by dynamic programming.

The boundary tensors go from machine to machine over the links between them, and the answer comes back the same way. A
machine may run no layer at all: one in the middle then only passes on what it gets, and the last ones are not asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from torchsurgeon.errors import PlanError
from torchsurgeon.link import Link
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.rows import Array, LayerCosts
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint


@dataclasses.dataclass(frozen=True)
class ChainPlan:
    """Where to cut for a row of machines.

    Attributes:
        points: one partition point for each link that is used. The first machine runs the layers up to the first
            point, the second those up to the second, and so on. Machines beyond the last point are not asked.
        compute_s: seconds of computing on each machine that is used.
        link_s: seconds on each link that is used, in both directions.
        interval_s: seconds between the answers of a stream of inferences: the longest of all computing and of each
            direction of each link.
        value: the objective's value.
        objective: what was minimized.
    """

    points: tuple[PartitionPoint, ...]
    compute_s: tuple[float, ...]
    link_s: tuple[float, ...]
    interval_s: float
    value: float
    objective: Objective

    @property
    def latency_s(self) -> float:
        """Seconds from call to answer."""
        return sum(self.compute_s) + sum(self.link_s)

    def explain(self) -> str:
        """Return the chain machine by machine, as text."""
        lines = [f"{self.objective}: {self.value:.6g} {self.objective.unit}".rstrip()]
        for i, seconds in enumerate(self.compute_s):
            lines.append(f"  machine {i}: {seconds * 1e3:.2f} ms computing")
            if i < len(self.points):
                point = self.points[i]
                where = "before the first layer" if point.index == 0 else f"after {point.name}"
                lines.append(f"  link {i}: {self.link_s[i] * 1e3:.2f} ms, cut {where}, {point.size_bytes} bytes up")
        return "\n".join(lines)


def plan_chain(
    graph: LayerGraph,
    stages: Sequence[LayerProfile],
    links: Sequence[Link],
    objective: str | Mapping[str, float] | Objective = "latency",
    loads: Sequence[float] | None = None,
) -> ChainPlan:
    """Return the best partition points for a row of machines.

    Tensors are sent as they are, and the cuts are among the graph's points. Of equal plans the one with the least work
    on the earlier machines is returned.

    Args:
        graph: the traced model.
        stages: what each layer costs on each machine, the device first.
        links: ``links[i]`` lies between the machines ``i`` and ``i + 1``.
        objective: what to minimize, as ``Objective.of()`` takes it.
        loads: for each machine, the factor by which it is slower than its profile says; 1 by default.

    Raises:
        PlanError: the numbers of stages, links and loads do not fit each other, a load is not positive, the objective
            adds throughput to something else, or it counts energy and no joules are known.
    """
    wanted = Objective.of(objective)
    factors = list(loads) if loads is not None else [1.0] * len(stages)
    if not stages or len(links) != len(stages) - 1 or len(factors) != len(stages):
        raise PlanError(
            f"{len(stages)} stages need {max(len(stages) - 1, 0)} links and as many loads as stages, "
            f"not {len(links)} links and {len(factors)} loads"
        )
    if not all(0.0 < factor < np.inf for factor in factors):
        raise PlanError(f"loads must be positive numbers; got {factors}")
    if wanted.throughput and (wanted.latency or wanted.energy or wanted.server_time):
        raise PlanError("over several machines, throughput must be the only objective; it was combined with others")
    chain = _Chain(graph, stages, links, wanted, factors)
    return chain.plan(*(chain.slowest() if wanted.throughput else chain.sum()))


class _Chain:
    """The costs of one row of machines at every point, and the searches for the best points."""

    def __init__(
        self,
        graph: LayerGraph,
        stages: Sequence[LayerProfile],
        links: Sequence[Link],
        objective: Objective,
        loads: Sequence[float],
    ) -> None:
        self.graph, self.links, self.objective = graph, links, objective
        self.points = graph.points
        at = [point.index for point in self.points]
        costs = [LayerCosts(graph, profile, profile) for profile in stages]
        # Seconds of each machine up to each point: unloaded, as server_time counts them, and at its load.
        self.unloaded = [c.head_s[at] if i == 0 else (c.tail_s[0] - c.tail_s)[at] for i, c in enumerate(costs)]
        self.reached = [seconds * factor for seconds, factor in zip(self.unloaded, loads, strict=True)]
        self.up = np.array([point.size_bytes for point in self.points], dtype=np.float64)
        self.answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
        self.joules = None
        if objective.energy:
            head_j = costs[0].head_j
            if head_j is None:
                raise PlanError(
                    "the energy of the model on the device is unknown: its profile has no joules for some layers; "
                    "profile it where a meter exists, or choose another objective"
                )
            self.joules = head_j[at]

    def sum(self) -> tuple[float, list[int]]:
        """Return the least weighted sum, and the positions of the points that reach it.

        From the last machine back to the first, ``onward`` holds the least cost of everything after each point.
        """
        goal = self.objective
        onward = np.full(len(self.points), np.inf)
        steps: list[list[int]] = []
        for i in reversed(range(len(self.reached))):
            cost = goal.latency * self.reached[i]
            if i:
                cost = cost + goal.server_time * self.unloaded[i]
            elif self.joules is not None:
                cost = cost + goal.energy * self.joules
            if i < len(self.links):
                onward = onward + self._crossing(i)
            onward[-1] = 0.0
            onward, chosen = _suffix_least(cost + onward)
            onward = onward - cost
            steps.append(chosen)
        return float(onward[0]), _follow(steps[::-1])

    def slowest(self) -> tuple[float, list[int]]:
        """Return the least seconds of the slowest stage, and the positions of the points that reach it."""
        onward = np.full(len(self.points), np.inf)
        steps: list[list[int]] = []
        for i in reversed(range(len(self.reached))):
            if i < len(self.links):
                link = self.links[i]
                onward = np.maximum(
                    onward, np.maximum(self.up * 8 / link.uplink_bit_s, link.downlink_s(self.answer_bytes))
                )
            onward[-1] = 0.0
            parts = np.maximum(self.reached[i][None] - self.reached[i][:, None], onward[None])
            parts[np.tril_indices(len(self.points), -1)] = np.inf
            steps.append([int(k) for k in parts.argmin(axis=1)])
            onward = parts.min(axis=1)
        return float(onward[0]), _follow(steps[::-1])

    def _crossing(self, i: int) -> Array:
        """Return what link ``i`` adds to the objective at each point: its tensors up, and the answer down."""
        link, goal = self.links[i], self.objective
        cost = goal.latency * (self.up * 8 / link.uplink_bit_s + link.request_s(0, self.answer_bytes))
        if i == 0 and goal.energy:
            cost = cost + goal.energy * np.array([link.request_j(size, self.answer_bytes) for size in self.up])
        return np.asarray(cost)

    def plan(self, value: float, positions: list[int]) -> ChainPlan:
        """Return the plan that cuts at ``positions``, and reaches ``value``."""
        last = len(self.points) - 1
        used = positions[: positions.index(last) + 1]
        compute_s = [
            float(self.reached[i][b] - self.reached[i][a])
            for i, (a, b) in enumerate(zip([0, *used[:-1]], used, strict=True))
        ]
        crossed = list(zip(self.links, used[:-1], strict=False))
        one_way_s = [(link.uplink_s(self.up[k]), link.downlink_s(self.answer_bytes)) for link, k in crossed]
        return ChainPlan(
            points=tuple(self.points[k] for _, k in crossed),
            compute_s=tuple(compute_s),
            link_s=tuple(link.request_s(self.up[k], self.answer_bytes) for link, k in crossed),
            interval_s=max([*compute_s, *(seconds for pair in one_way_s for seconds in pair)]),
            value=value,
            objective=self.objective,
        )


def _suffix_least(costs: Array) -> tuple[Array, list[int]]:
    """Return, for each position, the least cost from there on and where it is; of equal ones the first."""
    least, chosen = costs.copy(), list(range(len(costs)))
    for k in range(len(costs) - 2, -1, -1):
        if least[k + 1] < costs[k]:
            least[k], chosen[k] = least[k + 1], chosen[k + 1]
    return least, chosen


def _follow(steps: list[list[int]]) -> list[int]:
    positions = []
    position = 0
    for chosen in steps:
        position = chosen[position]
        positions.append(position)
    return positions
