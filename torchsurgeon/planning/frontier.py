"""The cuts that can be the best under some link and load, and the choice among them in microseconds.

Every cost of an inference is a sum of device seconds, bytes, server seconds and joules, each multiplied by something
that is not negative. So a cut never wins if another one is better in all four, and uses no more of the accuracy budget.
The cuts that remain are the frontier. It is computed once, from a model, the profiles of both sides and the measured
codecs. A decision then only multiplies the small matrix of their costs by weights that follow from link and load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from torchsurgeon._cached import cached_property
from torchsurgeon.codec import CodecTable
from torchsurgeon.errors import PlanError
from torchsurgeon.link import Link
from torchsurgeon.planning.costs import CostTable
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.row import Array, Row, columns_and_losses, non_dominated
from torchsurgeon.planning.rows import LayerCosts, lower_hull
from torchsurgeon.planning.sets import across_branches
from torchsurgeon.planning.sides import Profiles
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier(CostTable):
    """The rows that can win under some link and load, from the least work on the device to the most.

    Of a codec at several rates each rate is a row, unless another row costs no more and uses no more of the budget.
    Rows of the same cut stand in the order of what they use of it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self._linear[1])
        assert len(self._cheapest[1])

    @staticmethod
    def build(
        graph: LayerGraph,
        device: Profiles,
        server: Profiles,
        codecs: CodecTable | None = None,
    ) -> Frontier:
        """Return the frontier of a model.

        Args:
            graph: the traced model.
            device: what each layer costs on the device. With several profiles, each of another backend, every head
                counts with the backend that runs it quickest.
            server: what each layer costs on the server, likewise.
            codecs: measured codecs; without them, tensors are sent as they are.

        Raises:
            ProfileError: a profile is of another graph or batch size, or two of one machine are of the same backend.
            CodecError: ``codecs`` is of another graph.
            PartitionError: ``codecs`` were measured at a cut that the graph does not have.
        """
        costs = LayerCosts(graph, device, server)
        rows = costs.rows(codecs)
        branches, exact = across_branches(costs, rows)
        return Frontier.of(graph, rows + branches, exact=exact)

    @staticmethod
    def of(graph: LayerGraph, rows: list[Row], *, exact: bool = True) -> Frontier:
        """Return the frontier of given rows.

        Args:
            graph: the traced model.
            rows: the rows to choose from.
            exact: what the frontier's attribute of this name says.
        """
        answer_bytes = sum(spec.size_bytes for spec in graph.outputs)
        ends = [i for i, row in enumerate(rows) if row.on_device or row.index == 0]
        # Both ends stay even if a cut undercuts them, since every choice is compared with them.
        best_ends = {ends[i] for i in non_dominated(columns_and_losses(rows[i] for i in ends))}
        places = {*non_dominated(columns_and_losses(rows)), *best_ends}
        kept = [rows[i] for i in sorted(places, key=lambda i: (rows[i].index, rows[i].budget_used, i))]
        name = type(graph.model).__name__
        return Frontier(name, graph.fingerprint, graph.batch, len(graph.layers), answer_bytes, tuple(kept), exact)

    def across(self, graph: LayerGraph) -> list[PartitionPoint]:
        """Return its cuts across parallel branches, for ``measure(…, across=…)``.

        Args:
            graph: the model that it is of.

        Raises:
            PlanError: it is of another model.
        """
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"this frontier is of {self.model[:100]} (fingerprint {self.fingerprint[:12]}), not of "
                f"{type(graph.model).__name__} ({graph.fingerprint[:12]}); build it for that model"
            )
        return list(dict.fromkeys(row.point(graph) for row in self.rows if row.layers is not None))

    @cached_property
    def _cheapest(self) -> tuple[Array, list[Row]]:
        """The rows that no other one undercuts in costs alone, as a matrix and as rows. Only they can cost least."""
        # The rows of a cut stand in the order of what they use of the budget, and of equal ones the first is kept.
        places = non_dominated(self._columns)
        return np.asfortranarray(self._columns[places]), [self.rows[i] for i in places]

    @cached_property
    def _linear(self) -> tuple[Array, list[Row]]:
        """The few rows that minimize some weighted sum of the columns, as a matrix and as rows."""
        crossing = [i for i, row in enumerate(self.rows) if not row.on_device]
        corners = {crossing[i] for i in lower_hull(self._columns[crossing, :4])[0]} if crossing else set()
        few = [i for i, row in enumerate(self.rows) if row.on_device or i in corners]
        return np.asfortranarray(self._columns[few]), [self.rows[i] for i in few]

    def best(
        self,
        link: Link,
        load: float = 1.0,
        slowdown: float = 1.0,
        objective: str | Mapping[str, float] | Objective = "latency",
        scale: float = 1.0,
    ) -> Row:
        """Return the row that costs least; of equal ones the one with the least work on the device.

        Args:
            link: the link between device and server.
            load: the factor by which the server is slower than its profile says.
            slowdown: the factor by which the device is slower than its profile says.
            objective: what to minimize, as ``Objective.of()`` takes it.
            scale: how many times as large as the traced example the call is, as ``costs()`` takes it.

        Raises:
            PlanError: load, slowdown or scale is not positive, the objective is unknown, or it counts energy and no
                joules are known.
        """
        wanted = objective if objective == "latency" else Objective.of(objective)
        # A throughput objective takes the maximum of several stages, so a row off the lower hull can win it.
        table, rows = self._cheapest if _has_stages(wanted) else self._linear
        return rows[self._costs(table, link, load, slowdown, wanted, scale).argmin()]


def _has_stages(objective: str | Mapping[str, float] | Objective) -> bool:
    return isinstance(objective, Objective) and objective.throughput > 0
