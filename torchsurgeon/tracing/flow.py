"""What flows where in a traced model: which values a cut must carry, and where no cut may be.

Four things make this more than liveness on a graph:

* Memory. An in-place layer overwrites a tensor that other names may still refer to. ``settle`` makes later readers of
  an overwritten tensor read the value of the step that overwrote it. After that, the order of reads and writes follows
  from the values alone. Where this is impossible, because a tensor is overwritten through one view and read through
  another, no cut is offered while both views are alive.
* Views. Taking a view again costs nothing. So if several boundary tensors share memory, only the tensor that they are
  views of crosses, and the far side of the cut takes the views from it.
* What cannot cross, such as sparse tensors (see ``crossing``). No cut is offered while a later layer reads it.
* Numbers that the model reads off tensors, mostly sizes. They cross as tiny tensors, and only where the far side cannot
  read them off the tensors that it receives.
"""

from __future__ import annotations

import builtins
import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.crossing import obstacle
from torchsurgeon.tracing.settle import settle
from torchsurgeon.tracing.shapes import Shapes
from torchsurgeon.tracing.step import Environment, Key, Ref, Step, number_to_tensor, restorer
from torchsurgeon.tracing.structure import LeafPath, flatten, leaf_name


@dataclasses.dataclass(frozen=True)
class Value:
    """Something that may cross a boundary: a tensor, or a number read off one.

    Attributes:
        name: the name of the tensor on the wire.
        step: the index of the step that gives it.
        path: where it lies in that step's value.
        restore: for a number, what makes it one again from the tensor it crosses as; None for a tensor.
    """

    name: str
    step: int
    path: LeafPath = ()
    restore: Callable[[torch.Tensor], Any] | None = None

    def leaf(self, values: Environment) -> torch.Tensor:
        """Return this value out of an environment, as the tensor that crosses."""
        value = values[self.step]
        if self.path:
            value = dict(flatten(value)[0])[self.path]
        return value if isinstance(value, torch.Tensor) else number_to_tensor(value)


class DataFlow:
    """The data flow of a program.

    A *layer* is a step that computes tensors; its *rank* is its place among the layers. A step that only takes a nested
    value apart, or only reads a number off a tensor, is no layer and is repeated on whichever side needs it.

    Attributes:
        steps: the program; creating the flow settles it, see ``settle()``.
        settled: what the steps read and overwrite, and which of them are live.
        layers: the index of the step of every layer, in the order the model runs them.
        rank: by step index, the rank of the layer.
        constant: by step, whether it computes from the model's weights alone. Head and tail each compute
            these values themselves.
        selected: by step, the part of a nested value that it takes, where it does nothing else.
        values: every value that may cross, in the order in which the model makes them.
        by_key: the same values by key.
        obstacles: by key, what a layer gives that cannot cross: what it is.
        withheld: by index, the points that are not offered because what would have to cross there cannot; and why.
            Filled by ``boundaries()``.
        crossing: by step, the keys of the values that have to cross for the step's value to be known beyond a cut.
        views: for every tensor that is only a view of another: the key of that other; None where the other depends on
            the model's weights alone, so that both sides have it.
    """

    def __init__(self, steps: Sequence[Step], shapes: Shapes, model: nn.Module) -> None:
        self.steps, self._given = steps, shapes.values
        self.settled = settle(steps, shapes, model)
        self._classify()
        self._number_values()
        self.values: list[Value] = list(self.by_key.values())

    # --- what the steps are ---

    def _classify(self) -> None:
        """Find the layers, the constant steps, and those that only take a nested value apart."""
        settled = self.settled
        overwritten = frozenset().union(*settled.overwrites)
        self.constant = [False] * len(self.steps)
        self.selected: dict[int, Key] = {}
        self.layers: list[int] = []
        for step in self.steps:
            i = step.index
            if step.kind not in ("attr", "call") or not settled.live[i]:
                continue
            memory = {settled.storages[key] for key in settled.tensors[i]}
            fixed = step.kind == "attr" or all(self.constant[j] for j in settled.uses[i])
            self.constant[i] = fixed and not memory & overwritten and not settled.overwrites[i]
            if step.kind == "attr":
                continue
            source = self._selection(step)
            if source is not None:
                self.selected[i] = source
            elif settled.tensors[i]:
                self.layers.append(i)
        self.rank = {index: rank for rank, index in enumerate(self.layers)}

    def _selection(self, step: Step) -> Key | None:
        """Return the part of a nested value that this step takes, if that is all it does."""
        if step.target not in (operator.getitem, builtins.getattr) or not isinstance(step.args[0], Ref):
            return None
        # ``y[0][1]`` is two steps; both are named by the step that made ``y``, so that its leaves cross once.
        root, at = self.selected.get(step.args[0].step, (step.args[0].step, ()))
        if not self.settled.tensors[root]:
            # What divmod or stride() give holds numbers only, each of which crosses by itself.
            return None
        structure = self.steps[root].structure.at(at)
        key = step.args[1]
        if isinstance(key, int) and key < 0:
            key += len(structure.keys)
        if structure.kind is None or isinstance(key, (slice, Ref)) or str(key) not in map(str, structure.keys):
            return None
        return root, (*at, str(key))

    # --- what crosses ---

    def _number_values(self) -> None:
        """Find every value that may cross, after which layer it exists, and which layer reads it last."""
        self.by_key: dict[Key, Value] = {}
        self.obstacles: dict[Key, str] = {}
        self.withheld: dict[int, str] = {}
        # Both by rank: -1 is the model's inputs, the number of layers is the model's result.
        self._made_by: dict[Key, int] = {}
        self._last_read_by: dict[Key, int] = {}
        self.crossing: list[tuple[Key, ...]] = []
        live = self.settled.live
        for step in self.steps:
            self.crossing.append((live[step.index] and self._crossing_of(step)) or ())
        self.views = self._find_views()
        for step in self.steps:
            i = step.index
            if not live[i] or (self.constant[i] and i not in self.rank):
                continue
            if i in self.rank:
                at = self.rank[i]
            elif step.kind == "output":
                at = len(self.layers)
            elif (i, ()) in self.by_key:
                at = self._made_by[(i, ())]
            else:
                continue
            for key in self.crossing_into(step):
                self._last_read_by[key] = max(at, self._last_read_by.get(key, -1))

    def crossing_into(self, step: Step) -> list[Key]:
        """Return what has to cross for a step to run beyond a cut while the steps it reads run before it."""
        return [key for j in self.settled.uses[step.index] for key in self.crossing[j]]

    def _crossing_of(self, step: Step) -> tuple[Key, ...]:
        """Return the values that have to cross for this step's value to be known beyond a cut."""
        i = step.index
        if self.constant[i] or step.kind == "output":
            return ()
        if i in self.selected:
            root, path = self.selected[i]
            return tuple(key for key in self.crossing[root] if key[1][: len(path)] == path)
        if step.kind == "input" or i in self.rank:
            own = []
            for path, leaf in flatten(self._given[i])[0]:
                restore = None if isinstance(leaf, torch.Tensor) else restorer(leaf)
                if leaf is None:
                    continue
                why = obstacle(leaf) if restore is None else None
                if why is None:
                    self.by_key[(i, path)] = Value(leaf_name(step.name, path), i, path, restore)
                else:
                    self.obstacles[(i, path)] = f"{leaf_name(step.name, path)!r} is {why}"
                self._made_by[(i, path)] = self.rank.get(i, -1)
                own.append((i, path))
            return tuple(own)
        # All other steps read a number off a tensor, or make something from numbers. A number may cross itself.
        # Anything else, such as a slice, is made again beyond the cut, so what it is made from has to cross.
        restore = restorer(self._given[i])
        sources = self.crossing_into(step)
        if restore is None:
            return tuple(dict.fromkeys(sources))
        self.by_key[(i, ())] = Value(step.name, i, (), restore)
        since = [self._made_by[key] for key in sources] + [self.rank.get(j, -1) for j in step.after]
        self._made_by[(i, ())] = max(since, default=-1)
        return ((i, ()),)

    def _find_views(self) -> dict[Key, Key | None]:
        """Return what the attribute ``views`` holds."""
        settled = self.settled
        views: dict[Key, Key | None] = {}
        for i in self.layers:
            if settled.overwrites[i] or self.constant[i]:
                continue
            sources = [j for j in settled.uses[i] if settled.tensors[j]]
            if len(sources) != 1 or len(settled.tensors[sources[0]]) != 1:
                continue
            source = next(iter(settled.tensors[sources[0]]))
            if source in self.obstacles:
                continue
            for key in settled.tensors[i]:
                if settled.storages[key] == settled.storages[source] and key not in self.obstacles:
                    views[key] = self.selected.get(source[0], source) if not self.constant[source[0]] else None
        return views

    def boundaries(self, sizes: Mapping[str, int]) -> dict[int, list[Value]]:
        """Return the values that cross at each partition point.

        Args:
            sizes: bytes of each value by name.

        Returns:
            By index of the point, from 0 (before the first layer) to the number of layers. Left out are points that
            memory forbids, and those at which something would have to cross that cannot.
        """
        count = len(self.layers)
        begins: list[list[Key]] = [[] for _ in range(count + 2)]
        for key, last in self._last_read_by.items():
            if last > self._made_by[key]:
                begins[self._made_by[key] + 1].append(key)
        written = {
            storage: min(self.rank.get(i, 0) for i in steps)
            for storage, steps in self.settled.overwritten_out_of_sight.items()
        }
        alive: dict[Key, None] = {}
        result: dict[int, list[Value]] = {}
        for k in range(count + 1):
            for key in begins[k]:
                alive[key] = None
            for key in [key for key in alive if self._last_read_by[key] < k]:
                del alive[key]
            if k in (0, count):
                result[k] = []
                continue
            stuck = [self.obstacles[key] for key in alive if key in self.obstacles]
            if stuck:
                self.withheld[k] = stuck[0]
                continue
            crossing = self.lighten(list(alive), sizes)
            if not written or self._allowed(crossing, written, k):
                result[k] = [self.by_key[key] for key in sorted(crossing)]
        return result

    def _allowed(self, crossing: Iterable[Key], written: Mapping[int, int], k: int) -> bool:
        """Return whether a cut is safe although memory is overwritten out of sight (see ``Settled``).

        It is where only one of the tensors that share the memory crosses, and all overwriting happens beyond the cut.
        """
        shared: dict[int, int] = {}
        for key in crossing:
            storage = self.settled.storages.get(key)
            if storage is not None and storage in written:
                shared[storage] = shared.get(storage, 0) + 1
        return all(n == 1 and written[storage] >= k for storage, n in shared.items())

    def lighten(self, keys: list[Key], sizes: Mapping[str, int]) -> list[Key]:
        """Return the values that cross instead of ``keys``, with as few bytes as possible.

        Views are replaced by the tensor that they are views of, unless that one has more bytes. Numbers are left out
        where the far side can read them off the tensors that it receives.

        Args:
            keys: the values that cross.
            sizes: bytes of each value by name.
        """
        tensors = {key for key in keys if self.by_key[key].restore is None}
        numbers = {key for key in keys if self.by_key[key].restore is not None}
        kept = set(tensors)
        # The views that cross, by the tensor they all come from (None: one of the model's own, which both sides have).
        groups: dict[Key | None, list[Key]] = {}
        for key in tensors:
            root: Key | None = key
            while root is not None and root in self.views:
                root = self.views[root]
            if root != key:
                groups.setdefault(root, []).append(key)
        for root, members in groups.items():
            bytes_of_root = 0 if root is None else sizes[self.by_key[root].name]
            if root not in tensors and bytes_of_root > sum(sizes[self.by_key[key].name] for key in members):
                continue
            # One view as large as its root saves nothing by being taken again; it crosses under its own name.
            alone = root is not None and root not in tensors and len(members) == 1
            if alone and bytes_of_root == sizes[self.by_key[members[0]].name]:
                continue
            kept.difference_update(members)
            if root is not None:
                kept.add(root)
            numbers.update(n for key in members for n in self._numbers_to_view(key))
        known = tensors | kept
        needed = {n for n in numbers if not self._sources(n) <= known}
        return list(kept | needed)

    def _numbers_to_view(self, key: Key) -> set[Key]:
        """Return the numbers that are arguments of the calls that take this view, and the views it is taken of."""
        numbers: set[Key] = set()
        view: Key | None = key
        while view is not None and view in self.views:
            crossing = self.crossing_into(self.steps[view[0]])
            numbers.update(filter(self._is_number, crossing))
            view = self.views[view]
        return numbers

    def _sources(self, number: Key) -> frozenset[Key]:
        """Return the tensors a number is read off."""
        if number[1]:
            return frozenset([number])
        found: set[Key] = set()
        for key in self.crossing_into(self.steps[number[0]]):
            found.update(self._sources(key) if self._is_number(key) else [key])
        return frozenset(found)

    def is_tensor(self, key: Key) -> bool:
        """Return whether what is at ``key`` is a tensor that may cross."""
        return key in self.by_key and self.by_key[key].restore is None

    def _is_number(self, key: Key) -> bool:
        return key in self.by_key and self.by_key[key].restore is not None

    # --- what the graph says of its layers ---

    def running(self) -> list[Step]:
        """Return the steps whose values the output depends on, or that overwrite memory."""
        return [step for step in self.steps if self.settled.live[step.index]]

    def gives(self, index: int) -> list[Value]:
        """Return the tensors that the layer at a step gives."""
        keys = [(index, path) for path in self.steps[index].structure.paths()]
        if self.constant[index]:
            name = self.steps[index].name
            given = self.settled.tensors[index]
            return [Value(leaf_name(name, key[1]), *key) for key in keys if key in given and not obstacle(given[key])]
        return [self.by_key[key] for key in keys if self.is_tensor(key)]

    def reads(self, step: Step) -> list[Value]:
        """Return the tensors a layer reads that were computed from the model's inputs."""
        keys = dict.fromkeys(self.crossing_into(step))
        return [self.by_key[key] for key in keys if self.is_tensor(key)]

    def attributes_of(self, step: Step, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters a step reads as arguments."""
        uses = self.settled.uses[step.index]
        targets = [self.steps[j].target for j in uses if self.steps[j].kind == "attr"]
        found = [operator.attrgetter(target)(model) for target in targets if isinstance(target, str)]
        return [value for value in found if isinstance(value, nn.Parameter)]
