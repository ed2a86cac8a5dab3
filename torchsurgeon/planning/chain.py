"""The best partition points for more than two machines in a row (device, edge, cloud), by dynamic programming.

The boundary tensors go from machine to machine over the links between them, each time encoded by a codec, and the
answer comes back the same way. A machine may run no layer at all: one in the middle then only passes on what it gets,
and the last ones are not asked.

Where codecs lose something at several links, all of them together must keep the accuracy budget. What each of them
changes is known from a measurement of it alone. So the shares of the budget that they use are added, and only a sum of
at most 1 is allowed. That makes sense for the share of predictions that change, since an answer that differs in the end
differs after one of the codecs. It makes none for means, so there at most one link has a codec that loses something.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.codec import CodecTable
from torchsurgeon.errors import PlanError, is_finite, short
from torchsurgeon.link import Link
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.row import Array, Row, non_dominated
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

# Shares of the budget are counted in so many parts, rounded up.
_PARTS = 100
# So many pairs of ways are compared at once, which bounds memory.
_PAIRS = 1 << 20


@dataclasses.dataclass(frozen=True)
class ChainPlan:
    """Where to cut for a row of machines.

    Attributes:
        points: one partition point for each link that is used. The first machine runs the layers up to the first
            point, the second those up to the second, and so on. Machines beyond the last point are not asked.
        rows: how what crosses is encoded, for each link that is used, with what a sample showed of this codec alone.
        compute_s: seconds of computing on each machine that is used, with decoding what it gets and encoding what it
            sends.
        link_s: seconds on each link that is used, in both directions.
        interval_s: seconds between the answers of a stream of inferences: the longest of all computing and of each
            direction of each link.
        value: the objective's value.
        objective: what was minimized.
    """

    points: tuple[PartitionPoint, ...]
    rows: tuple[Row, ...]
    compute_s: tuple[float, ...]
    link_s: tuple[float, ...]
    interval_s: float
    value: float
    objective: Objective

    @property
    def latency_s(self) -> float:
        """Seconds from call to answer."""
        return sum(self.compute_s) + sum(self.link_s)

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codec of each link that is used."""
        return tuple(row.codec for row in self.rows)

    @property
    def budget_used(self) -> float:
        """How much of the accuracy budget the codecs use together, as the sum of what each uses alone."""
        return sum(row.budget_used for row in self.rows)

    def explain(self) -> str:
        """Return the chain machine by machine, as text."""
        lines = [f"{self.objective}: {self.value:.6g} {self.objective.unit}".rstrip()]
        for i, seconds in enumerate(self.compute_s):
            lines.append(f"  machine {i}: {seconds * 1e3:.2f} ms computing")
            if i < len(self.points):
                row = self.rows[i]
                where = "before the first layer" if row.index == 0 else f"after {row.name}"
                encoded = "" if row.codec == "raw" else f" as {row.codec}"
                lines.append(
                    f"  link {i}: {self.link_s[i] * 1e3:.2f} ms, cut {where}{encoded}, {row.size_bytes:.0f} bytes up"
                )
                lines += [f"    {finding.measure}: {finding}" for finding in row.findings]
        if self.budget_used:
            lines.append(f"  the codecs use {self.budget_used:.0%} of the accuracy budget")
        if sum(row.budget_used > 0 for row in self.rows) > 1:
            lines.append(
                "  that is the sum of what each uses alone; codec.measure_together() measures what they change together"
            )
        return "\n".join(lines)


def plan_chain(
    graph: LayerGraph,
    stages: Sequence[LayerProfile],
    links: Sequence[Link | str],
    objective: str | Mapping[str, float] | Objective = "latency",
    loads: Sequence[float] | None = None,
    codecs: CodecTable | None = None,
) -> ChainPlan:
    """Return the best partition points for a row of machines, and the codec of each link.

    The cuts are among the graph's points. Of equal plans the one with the least work on the earlier machines is
    returned, and of these the one that uses least of the accuracy budget at the earlier links.

    Args:
        graph: the traced model.
        stages: what each layer costs on each machine, the device first.
        links: ``links[i]`` lies between the machines ``i`` and ``i + 1``; a link, or what ``Link.parse()`` understands.
        objective: what to minimize, as ``Objective.of()`` takes it.
        loads: for each machine, the factor by which it is slower than its profile says; 1 by default. It also counts
            for encoding and decoding there.
        codecs: measured codecs; without them, tensors are sent as they are.

    Raises:
        PlanError: the numbers of stages, links and loads do not fit each other, a load is not positive, the objective
            adds throughput to something else or bounds what is in flight, or it counts energy and no joules are known.
        LinkError: the text of a link means none.
        CodecError: ``codecs`` is of another graph.
    """
    wanted = Objective.of(objective)
    for name, value in (("stages", stages), ("links", links), ("loads", () if loads is None else loads)):
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise PlanError(f"{name} must be a list, with one entry for each machine or link; got {short(value, 100)}")
    between = [Link.parse(link) if isinstance(link, str) else link for link in links]
    for link in between:
        if not isinstance(link, Link):
            raise PlanError(f'each of links must be a Link, or a text such as "lte"; got {short(link, 100)}')
    factors = list(loads) if loads is not None else [1.0] * len(stages)
    if not stages or len(links) != len(stages) - 1 or len(factors) != len(stages):
        raise PlanError(
            f"{len(stages)} stages need {max(len(stages) - 1, 0)} links and as many loads as stages, "
            f"not {len(links)} links and {len(factors)} loads"
        )
    if not all(is_finite(factor) and factor > 0 for factor in factors):
        raise PlanError(f"loads must be positive numbers; got {short(factors)}")
    if wanted.throughput and (wanted.latency or wanted.energy or wanted.server_time):
        raise PlanError("over several machines, throughput must be the only objective; it was combined with others")
    if wanted.in_flight is not None:
        raise PlanError("over several machines, in_flight is not counted; leave it out")
    return _Chain(graph, stages, between, wanted, factors, codecs).plan()


class _Chain:
    """The costs of one row of machines for every way to cross a link, and the search for the best ways.

    A way is a cut with a codec. The last way is to run everything that is left, and to send nothing.
    """

    def __init__(
        self,
        graph: LayerGraph,
        stages: Sequence[LayerProfile],
        links: Sequence[Link],
        objective: Objective,
        loads: Sequence[float],
        codecs: CodecTable | None,
    ) -> None:
        self.graph, self.links, self.objective, self.loads = graph, links, objective, loads
        costs = [LayerCosts(graph, profile, profile) for profile in stages]
        # A student takes the model's input, which only the first machine has, so none is among the ways.
        self.rows = _ways([row for row in costs[0].rows(codecs) if not row.student])
        self.at = np.array([row.index for row in self.rows])
        # Seconds of each machine up to the cut of each way, at a load of 1.
        self.reached = [c.head_s[self.at] if i == 0 else (c.tail_s[0] - c.tail_s)[self.at] for i, c in enumerate(costs)]
        self.encode_s, self.decode_s, self.up = (
            np.array([getattr(row, name) for row in self.rows]) for name in ("encode_s", "decode_s", "size_bytes")
        )
        self.used = np.array([_parts_used(row) for row in self.rows])
        self.answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
        if objective.energy and costs[0].head_j is None:
            raise PlanError(
                "the energy of the model on the device is unknown: its profile has no joules for some layers; "
                "profile it where a meter exists, or choose another objective"
            )

    def plan(self) -> ChainPlan:
        """Return the best plan.

        From the last machine back to the first, ``onward`` holds for each part of the budget that may be left, and
        each way in which a machine can have been reached, the least cost of everything from this machine on.
        """
        onward: dict[int, Array] = {}
        steps: list[dict[int, NDArray[np.intp]]] = []
        for i, lefts in reversed(list(enumerate(self._lefts()))):
            found = {left: self._from(i, left, onward) for left in lefts}
            onward = {left: costs for left, (costs, _) in found.items()}
            steps.append({left: chosen for left, (_, chosen) in found.items()})
        left, way = _PARTS, 0
        ways = []
        for chosen in reversed(steps):
            way = int(chosen[left][way])
            ways.append(way)
            if way == len(self.rows) - 1:
                break
            left -= int(self.used[way])
        return self._planned(float(onward[_PARTS][0]) * (self.objective.throughput or 1.0), ways)

    def _lefts(self) -> list[set[int]]:
        """Return for each machine the parts of the budget that may be left when it is reached."""
        lefts = [{_PARTS}]
        for _ in self.links:
            lefts.append({left - int(used) for left in lefts[-1] for used in np.unique(self.used) if used <= left})
        return lefts

    def _from(self, i: int, left: int, onward: Mapping[int, Array]) -> tuple[Array, NDArray[np.intp]]:
        """Return the least cost from machine ``i`` on for each way in which it is reached, and the way it goes on."""
        goal, last = self.objective, len(self.rows) - 1
        beyond = np.full(len(self.rows), np.inf)
        beyond[last] = 0.0
        if i < len(self.links):
            link = self.links[i]
            for used in np.unique(self.used[:last]):
                if used <= left:
                    ways = np.flatnonzero(self.used[:last] == used)
                    beyond[ways] = onward[left - int(used)][ways]
            up_s, down_s = self.up * 8 / link.uplink_bit_s, link.downlink_s(self.answer_bytes)
            if goal.throughput:
                beyond[:last] = np.maximum(beyond, np.maximum(up_s, down_s))[:last]
            else:
                crossing = goal.latency * (up_s + link.request_s(0, self.answer_bytes))
                if i == 0 and goal.energy:
                    crossing = crossing + goal.energy * np.array(
                        [link.request_j(size, self.answer_bytes) for size in self.up]
                    )
                beyond[:last] += crossing[:last]
        if i == 0 and goal.energy:
            beyond = beyond + goal.energy * np.array([row.device_j for row in self.rows], dtype=np.float64)
        # The first machine is reached in one way only: with the model's inputs, which are there as they are.
        starts = np.zeros(1) if i == 0 else self.reached[i]
        decode_s = np.zeros(1) if i == 0 else self.decode_s
        at = np.zeros(1, dtype=np.intp) if i == 0 else self.at
        weight = goal.latency * self.loads[i] + (goal.server_time if i else 0.0)
        costs, chosen = [], []
        for some in np.array_split(np.arange(len(starts)), max(1, len(starts) * len(self.rows) // _PAIRS)):
            seconds = (self.reached[i] + self.encode_s)[None] + (decode_s - starts)[some, None]
            if goal.throughput:
                total = np.maximum(seconds * self.loads[i], beyond[None])
            else:
                total = seconds * weight + beyond[None]
            total[self.at[None] < at[some, None]] = np.inf
            chosen.append(total.argmin(axis=1))
            costs.append(total.min(axis=1))
        return np.concatenate(costs), np.concatenate(chosen)

    def _planned(self, value: float, ways: list[int]) -> ChainPlan:
        """Return the plan that goes ``ways``, of which the last sends nothing, and reaches ``value``."""
        compute_s = []
        for i, (before, way) in enumerate(zip([None, *ways[:-1]], ways, strict=True)):
            seconds = self.reached[i][way] + self.encode_s[way]
            if before is not None:
                seconds += self.decode_s[before] - self.reached[i][before]
            compute_s.append(float(seconds * self.loads[i]))
        crossed = [(link, self.rows[way]) for link, way in zip(self.links, ways[:-1], strict=False)]
        one_way_s = [
            seconds
            for link, row in crossed
            for seconds in (link.uplink_s(row.size_bytes), link.downlink_s(self.answer_bytes))
        ]
        return ChainPlan(
            points=tuple(row.point(self.graph) for _, row in crossed),
            rows=tuple(row for _, row in crossed),
            compute_s=tuple(compute_s),
            link_s=tuple(link.request_s(row.size_bytes, self.answer_bytes) for link, row in crossed),
            interval_s=max([*compute_s, *one_way_s]),
            value=value,
            objective=self.objective,
        )


def _ways(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the graph's own points, without those that another one at the same point undercuts."""
    ways: list[Row] = []
    own = [row for row in rows if row.layers is None]
    for _, some in itertools.groupby(own, key=lambda row: row.index):
        here = sorted(some, key=lambda row: row.budget_used)
        costs = [(_parts_used(row), row.encode_s, row.size_bytes, row.decode_s) for row in here]
        ways += [here[i] for i in non_dominated(np.array(costs, dtype=np.float64))]
    return ways


def _parts_used(row: Row) -> int:
    """Return how many parts of the budget a row uses; all of them where what it changes cannot be added to others."""
    if not row.budget_used:
        return 0
    adds = bool(row.findings) and all(finding.measure == "top-1 changed" for finding in row.findings)
    return min(int(np.ceil(row.budget_used * _PARTS - 1e-6)), _PARTS) if adds else _PARTS
