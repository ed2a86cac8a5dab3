"""Which layers need which, and what crosses when any closed set of layers runs on the device.

A partition point's device layers are the first ones of the order the model runs them in. Of parallel branches, other
sets make sense too: one branch here, the other there. Any set that holds everything its layers need is a cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping

from torchsurgeon.tracing.flow import Flow, Value
from torchsurgeon.tracing.step import Key


@dataclasses.dataclass(frozen=True)
class Carried:
    """A tensor that may cross.

    ``producer`` is the layer that gives it, -1 for a model input; ``consumers`` are the layers that read it, where the
    number of layers stands for the model's result. Where it is a view of another tensor (``view_of``), that one may
    cross instead. Numbers read off tensors, a few bytes each, are not listed.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]
    view_of: str | None = None


class Closure:
    """The order that a program's data flow puts on its layers.

    ``needs[i]`` are the layers that must run on the device when layer ``i`` does; among them may be some that these
    need in turn. ``constants`` are layers that compute from the model's weights alone. ``prefixes_only`` is set where
    memory is overwritten through one view and read through another: there only the graph's own points are known to be
    safe.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._rank = flow.rank
        self.prefixes_only = bool(flow.settled.overwritten_out_of_sight)
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
        """For each layer that overwrites a tensor, the layers that read it before: left to the other side, they would
        get it too late."""
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
        """Return every tensor that may cross, in the order they come to be."""
        flow, end = self._flow, len(self._flow.layers)
        readers: dict[Key, set[int]] = {}
        for step, keys in self._readers:
            at = self._rank.get(step, end if flow.steps[step].kind == "output" else None)
            for key in keys:
                if at is not None and flow.by_key[key].restore is None:
                    readers.setdefault(key, set()).add(at)
        found = []
        for key, at_layers in sorted(readers.items()):
            root = flow.views.get(key)
            view_of = None if root is None else flow.by_key[root].name
            producer = self._rank.get(key[0], -1)
            found.append(Carried(flow.by_key[key].name, producer, tuple(sorted(at_layers)), view_of))
        return found

    def crossing(self, layers: Collection[int], sizes: Mapping[str, int]) -> list[Value] | None:
        """Return the values that cross when exactly ``layers`` run on the device; None where that is no cut.

        ``sizes`` gives each value's bytes by name.
        """
        flow, inside = self._flow, set(layers)
        if any(not inside.issuperset(self.needs[i]) for i in inside):
            return None

        def runs_here(step: int) -> bool:
            if step in self._rank:
                return self._rank[step] in inside
            return flow.steps[step].kind != "output" and inside.issuperset(self._needs_of_step[step])

        crossing = {key for step, keys in self._readers if not runs_here(step) for key in keys if runs_here(key[0])}
        return [flow.by_key[key] for key in sorted(flow.lighten(sorted(crossing), sizes))]

    @functools.cached_property
    def _readers(self) -> list[tuple[int, list[Key]]]:
        """The steps that read values which may cross, with those values."""
        flow = self._flow
        return [
            (step.index, flow.crossing_into(step))
            for step in flow.steps
            if flow.settled.live[step.index]
            and (step.index in self._rank or step.kind == "output" or (step.index, ()) in flow.by_key)
        ]
