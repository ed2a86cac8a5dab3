"""Which layers need which, and what crosses when any closed set of layers runs on the device.

At a partition point, the device runs the first layers in the order in which the model runs them. Where branches are
parallel, other sets make sense too: one branch on the device, the other on the server. A set of layers is *closed*, and
a cut, when it holds everything its layers need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torchsurgeon._cached import cached_property
from torchsurgeon.tracing.flow import DataFlow, Value
from torchsurgeon.tracing.step import Key


@dataclasses.dataclass(frozen=True)
class Carried:
    """A tensor that may cross. Numbers read off tensors, a few bytes each, are not listed.

    Attributes:
        name: its name.
        producer: the layer that gives it, -1 for a model input.
        consumers: the layers that read it; the number of layers stands for the model's result.
        view_of: the tensor it is a view of, which may cross instead; None when it is no view.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]
    view_of: str | None = None


class Closure:
    """The order that a program's data flow puts on its layers.

    Attributes:
        needs: for each layer, those that must run on the device when it does. What these need in turn may be listed
            too, or not.
        constants: the layers that compute from the model's weights alone.
        prefixes_only: whether memory is overwritten through one view and read through another, or a layer reads what
            cannot cross. Then only the graph's own points are known to be safe.
    """

    def __init__(self, flow: DataFlow) -> None:
        self._flow = flow
        self._rank = flow.rank
        self.prefixes_only = bool(flow.settled.overwritten_out_of_sight or flow.withheld)
        self.constants = frozenset(rank for index, rank in self._rank.items() if flow.constant[index])
        self._needs_of_step: list[frozenset[int]] = []
        for step in flow.steps:
            needs: set[int] = set()
            for j in (*flow.settled.uses[step.index], *step.after):
                needs |= {self._rank[j]} if j in self._rank else self._needs_of_step[j]
            self._needs_of_step.append(frozenset(needs))
        found = [set(self._needs_of_step[index]) for index in flow.layers]
        for rank, earlier in self._overwritten():
            found[rank] |= earlier
        self.needs = tuple(tuple(sorted(layers - {rank})) for rank, layers in enumerate(found))

    def _overwritten(self) -> list[tuple[int, set[int]]]:
        """Return the layers that overwrite a tensor, each with the layers that read it before.

        A layer that reads a tensor must run on the device when one that overwrites it later does: on the server, it
        would read what was written.
        """
        settled = self._flow.settled
        readers: dict[int, list[int]] = {}
        found = []
        for rank, index in enumerate(self._flow.layers):
            earlier = {reader for storage in settled.overwrites[index] for reader in readers.get(storage, ())}
            if earlier:
                found.append((rank, earlier))
            read = {settled.storages[key] for j in settled.uses[index] for key in settled.tensors[j]}
            for storage in read:
                readers.setdefault(storage, []).append(rank)
        return found

    def carried(self) -> list[Carried]:
        """Return every tensor that may cross, in the order in which the model makes them."""
        flow, end = self._flow, len(self._flow.layers)
        readers: dict[Key, set[int]] = {}
        for step, keys in self._readers:
            at = self._rank.get(step, end if flow.steps[step].kind == "output" else None)
            for key in keys:
                if at is not None and flow.is_tensor(key):
                    readers.setdefault(key, set()).add(at)
        found = []
        for key, at_layers in sorted(readers.items()):
            root = flow.views.get(key)
            view_of = None if root is None else flow.by_key[root].name
            producer = self._rank.get(key[0], -1)
            found.append(Carried(flow.by_key[key].name, producer, tuple(sorted(at_layers)), view_of))
        return found

    def crossing(self, layers: Collection[int], sizes: Mapping[str, int]) -> list[Value] | None:
        """Return the values that cross when exactly ``layers`` run on the device.

        Args:
            layers: the layers on the device, by rank.
            sizes: bytes of each value by name.

        Returns:
            The values, or None where a layer needs one that is not in ``layers``, or something that cannot cross.
        """
        flow, inside = self._flow, set(layers)
        if any(not inside.issuperset(self.needs[i]) for i in inside):
            return None

        def runs_on_device(step: int) -> bool:
            if step in self._rank:
                return self._rank[step] in inside
            return flow.steps[step].kind != "output" and inside.issuperset(self._needs_of_step[step])

        # What crosses is read on the server and made on the device.
        on_server = [keys for step, keys in self._readers if not runs_on_device(step)]
        crossing = {key for keys in on_server for key in keys if runs_on_device(key[0])}
        if any(key in flow.obstacles for key in crossing):
            return None
        return [flow.by_key[key] for key in sorted(flow.lighten(sorted(crossing), sizes))]

    @cached_property
    def _readers(self) -> list[tuple[int, list[Key]]]:
        """The steps that read values which may cross, each with those values."""
        flow = self._flow
        return [
            (step.index, flow.crossing_into(step))
            for step in flow.steps
            if flow.settled.live[step.index]
            and (step.index in self._rank or step.kind == "output" or (step.index, ()) in flow.by_key)
        ]
