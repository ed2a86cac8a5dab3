"""Requests at different cuts of one model, joined where the later cut lies: which may be, and from which step on.

The layers between the earlier cut and the later one run for the requests of the earlier one. Then the tensors of the
later cut are there for all of them, and the layers behind it run once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from torchsurgeon.cutting.reach import overwrites
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.serve.recent import Recent
from torchsurgeon.serve.tails import RequestPlan
from torchsurgeon.tracing.graph import LayerGraph

# So many pairs of cuts are remembered.
_MOST_PAIRS = 4096
_UNKNOWN = -2

Group = Sequence[Sequence[Tensor]]
"""The tensors of several requests at one cut."""


class Joining:
    """Which requests of one model at different cuts may run together. Thread-safe: each operation on a dict is one.

    Args:
        graph: the traced model.
        capacity: how many plans are remembered by what requests begin with. Each keeps its tail alive.
    """

    def __init__(self, graph: LayerGraph, capacity: int) -> None:
        self._graph = graph
        self._plans: Recent[object, RequestPlan] = Recent(capacity)
        self._pairs: dict[tuple[tuple[str, ...], tuple[str, ...]], int | None] = {}

    def learn(self, kind: object, plan: RequestPlan) -> None:
        """Take notice of how requests of a kind are run."""
        self._plans.put(kind, plan)

    def joins(self, kind: object, other: object) -> bool:
        """Return whether requests of two kinds may run together, as far as is known."""
        one, two = self._plans.get(kind), self._plans.get(other)
        if one is None or two is None:
            return False
        earlier, later = _in_order((one, two))
        return self.meets(earlier, later) is not None

    def meets(self, earlier: RequestPlan, later: RequestPlan) -> int | None:
        """Return up to which step only requests at the earlier cut run.

        Returns:
            The step's index; -1 where the cuts are the same; None where the requests cannot run together.
        """
        if earlier.tail is None or later.tail is None or earlier.seam is None or later.seam is None:
            return None
        key = (earlier.names, later.names)
        # Looked up once, and never read back: another thread may empty the table at any moment.
        found = self._pairs.get(key, _UNKNOWN)
        if found == _UNKNOWN:
            found = self._meeting(*key, earlier.tail)
            if len(self._pairs) >= _MOST_PAIRS:
                self._pairs.clear()
            self._pairs[key] = found
        return found

    def order(self, plans: Sequence[RequestPlan]) -> list[RequestPlan] | None:
        """Return plans from the earliest cut to the latest; None where the requests cannot all run together."""
        ordered = _in_order(plans)
        together = all(self.meets(one, two) is not None for one, two in itertools.pairwise(ordered))
        return ordered if together else None

    def advance(
        self, plans: Sequence[RequestPlan], groups: Sequence[Group], over: Callable[[], bool]
    ) -> list[Tensor] | None:
        """Run what lies before the last of several cuts, and return the tensors of all requests there as one batch.

        Args:
            plans: how the requests of each group are run, from the earliest cut to the latest.
            groups: their tensors.
            over: whether nobody waits for the answers any more; asked before each layer.

        Returns:
            The tensors; None where they cannot be joined after all, or ``over()`` has said that nobody waits.
        """
        assert plans[0].seam is not None
        joined = plans[0].seam.join(groups[0])
        for (before, after), group in zip(itertools.pairwise(plans), groups[1:], strict=True):
            last = self.meets(before, after)
            if joined is None or last is None or before.tail is None or after.seam is None:
                return None
            if last >= 0:
                environment = before.tail.begin(last, over, joined)
                if environment is None:
                    return None
                joined = [self._graph.value(name).leaf(environment) for name in after.names]
            joined = after.seam.join([joined, *group])
        return joined

    def _meeting(self, names: tuple[str, ...], later: tuple[str, ...], tail: Segment) -> int | None:
        if names == later:
            return -1
        graph, ran = self._graph, set(tail.steps)
        values = [graph.value(name) for name in later]
        made = [value for value, name in zip(values, later, strict=True) if name not in names]
        if not made or any(value.step not in ran for value in made) or any(value.restore for value in values):
            return None
        last = max(value.step for value in made)
        if not tail.holds([value.step for value in values], last):
            return None
        # A value that a step of the earlier part overwrites is another by then.
        for value in values:
            between = [i for i in tail.steps if value.step < i <= last]
            if overwrites(graph.flow, between, value):
                return None
        return last


def _in_order(plans: Sequence[RequestPlan]) -> list[RequestPlan]:
    """Return plans in the order of their cuts: the earlier a cut, the more steps lie behind it."""
    return sorted(plans, key=lambda plan: 0 if plan.tail is None else -len(plan.tail.steps))
