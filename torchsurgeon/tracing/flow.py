"""What flows where in a traced model: which values a cut must carry, and which steps turn given values into others.

Three things make this more than liveness on a graph:

* Memory. In-place layers overwrite tensors that other names may still show. Later readers of an overwritten tensor are
  made to read the overwriting step's value, so that the data flow alone orders reads and writes. Where a tensor is
  overwritten through one view and read again through another, no cut is offered while both are alive.
* Views are free to take again, so of several boundary tensors that share memory only the one they are views of crosses.
* Numbers read off tensors (sizes, mostly) cross as tiny tensors only where the other side cannot read them itself.
"""

from __future__ import annotations

import builtins
import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.shapes import Shapes, drifting, storage_of
from torchsurgeon.tracing.step import Constant, Environment, ModelDevice, Ref, Step, number_to_tensor, restorer
from torchsurgeon.tracing.structure import LEAF, Path, flatten, leaf_name

Key = tuple[int, Path]


@dataclasses.dataclass(frozen=True)
class Value:
    """Something that may cross a boundary: a tensor, or a number read off one (``restore`` makes it a number again)."""

    name: str
    step: int
    path: Path = ()
    restore: Callable[[torch.Tensor], Any] | None = None

    def leaf(self, values: Environment) -> torch.Tensor:
        """Return this value out of an environment, as the tensor that crosses."""
        value = values[self.step]
        if self.path:
            value = dict(flatten(value)[0])[self.path]
        return value if isinstance(value, torch.Tensor) else number_to_tensor(value)


class Flow:
    """The data flow of a program. May rewrite the steps it is given, keeping what they compute."""

    def __init__(self, steps: Sequence[Step], shapes: Shapes, model: nn.Module) -> None:
        self.steps, self._shapes = steps, shapes
        self._count = len(steps)
        for step in steps:
            value = shapes.values[step.index]
            step.structure = flatten(value)[1] if step.kind == "call" else LEAF
        self._keys = [self._tensor_keys(step) for step in steps]
        self._storage = {key: storage_of(leaf) for keys in self._keys for key, leaf in keys.items()}
        self._settle_constants(model)
        self._irregular = self._settle_overwrites()
        self._uses = [step.uses() for step in steps]
        for step, uses in zip(steps, self._uses, strict=True):
            step.reads = tuple(uses)
        self._prune()
        self._classify()
        self._number_values()
        self.values: list[Value] = list(self._values.values())

    # --- what the steps are ---

    def _tensor_keys(self, step: Step) -> dict[Key, torch.Tensor]:
        if step.kind == "output":
            return {}
        leaves, _ = flatten(self._shapes.values[step.index])
        return {(step.index, path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}

    def _settle_constants(self, model: nn.Module) -> None:
        """Dtypes, strings and None read off tensors become constants; devices are read off the model itself, since the
        other side may run on another one."""
        for step in self.steps:
            value = self._shapes.values[step.index]
            if step.kind != "call" or not (value is None or isinstance(value, (str, torch.dtype, torch.device))):
                continue
            if isinstance(value, torch.device):
                step.target, step.args, step.kwargs = ModelDevice(model), (), {}
            elif not self._shapes.overwrites[step.index]:
                for later in self.steps[step.index + 1 :]:
                    later.replace(step.index, value)

    def _settle_overwrites(self) -> dict[int, list[int]]:
        """Make later readers of an overwritten tensor read what overwrote it. Returns, by storage, the steps that
        overwrite it where that was not possible."""
        sharing: dict[int, list[Key]] = {}
        for key, storage in self._storage.items():
            sharing.setdefault(storage, []).append(key)
        readers: dict[int, set[int]] = {}
        for step in self.steps:
            for used in step.uses():
                readers.setdefault(used, set()).add(step.index)
        irregular: dict[int, list[int]] = {}
        for step in self.steps:
            for storage in self._shapes.overwrites[step.index]:
                keys = sharing.get(storage, [])
                owner = next((self.steps[i] for i, _ in keys if self.steps[i].kind == "attr"), None)
                if owner is not None:
                    what = f"the model's own {owner.target!r}"
                    if isinstance(owner.target, Constant):
                        what = "a tensor made in forward that is the same in every call"
                    raise drifting(step, what)
                for key in [k for k in keys if k[0] < step.index]:
                    i = key[0]
                    for reader in sorted(r for r in readers.get(i, ()) if r > step.index):
                        if self._same_view(key, (step.index, ())):
                            self.steps[reader].replace(i, Ref(step.index))
                            readers[i].discard(reader)
                            readers.setdefault(step.index, set()).add(reader)
                        elif not _reads_no_element(self.steps[reader]):
                            self.steps[reader].after += (step.index,)
                            irregular.setdefault(storage, []).append(step.index)
        return irregular

    def _same_view(self, key: Key, other: Key) -> bool:
        if key[1] or self._storage.get(key) != self._storage.get(other):
            return False
        a, b = self._keys[key[0]][key], self._keys[other[0]][other]
        return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())

    def _prune(self) -> None:
        """Forget calls whose result nobody reads and that overwrite nothing."""
        used = [False] * self._count
        used[-1] = True
        for step in reversed(self.steps):
            i = step.index
            if used[i] or step.kind == "input" or self._shapes.overwrites[i]:
                used[i] = True
                for j in (*self._uses[i], *step.after):
                    used[j] = True
        self._live = used

    def _classify(self) -> None:
        overwritten = frozenset().union(*self._shapes.overwrites)
        self._constant = [False] * self._count
        self._select: dict[int, Key] = {}
        self.layers: list[int] = []
        for step in self.steps:
            i = step.index
            if step.kind not in ("attr", "call") or not self._live[i]:
                continue
            mine = {self._storage[key] for key in self._keys[i]}
            fixed = step.kind == "attr" or all(self._constant[j] for j in self._uses[i])
            self._constant[i] = fixed and not mine & overwritten and not self._shapes.overwrites[i]
            if step.kind == "attr":
                continue
            source = self._selection(step)
            if source is not None:
                self._select[i] = source
            elif self._keys[i]:
                self.layers.append(i)
        self._rank = {index: rank for rank, index in enumerate(self.layers)}

    def _selection(self, step: Step) -> Key | None:
        """The part of a nested value that this step takes, if that is all it does."""
        if step.target not in (operator.getitem, builtins.getattr) or not isinstance(step.args[0], Ref):
            return None
        root, at = self._select.get(step.args[0].step, (step.args[0].step, ()))
        structure = self.steps[root].structure.at(at)
        key = step.args[1]
        if isinstance(key, int) and key < 0:
            key += len(structure.keys)
        if structure.kind is None or isinstance(key, (slice, Ref)) or str(key) not in map(str, structure.keys):
            return None
        return root, (*at, str(key))

    # --- what crosses ---

    def _number_values(self) -> None:
        """Find every value that may cross, where it comes to be, and how far along the layers it is read."""
        self._values: dict[Key, Value] = {}
        self._born: dict[Key, int] = {}
        self._crossing: list[tuple[Key, ...]] = []
        for step in self.steps:
            self._crossing.append((self._live[step.index] and self._crossing_of(step)) or ())
        self._last: dict[Key, int] = {}
        self._views = self._find_views()
        for step in self.steps:
            i = step.index
            if not self._live[i] or (self._constant[i] and i not in self._rank):
                continue
            if i in self._rank:
                at = self._rank[i]
            elif step.kind == "output":
                at = len(self.layers)
            elif (i, ()) in self._values:
                at = self._born[(i, ())]
            else:
                continue
            for key in self._crossing_in(step):
                self._last[key] = max(at, self._last.get(key, -1))

    def _crossing_in(self, step: Step) -> list[Key]:
        return [key for j in self._uses[step.index] for key in self._crossing[j]]

    def _crossing_of(self, step: Step) -> tuple[Key, ...]:
        """The values that have to cross for this step's value to be known beyond a cut."""
        i = step.index
        if self._constant[i] or step.kind == "output":
            return ()
        if i in self._select:
            root, path = self._select[i]
            return tuple(key for key in self._crossing[root] if key[1][: len(path)] == path)
        if step.kind == "input" or i in self._rank:
            mine = []
            for path, leaf in flatten(self._shapes.values[i])[0]:
                restore = None if isinstance(leaf, torch.Tensor) else restorer(leaf)
                if isinstance(leaf, torch.Tensor) or restore is not None:
                    self._values[(i, path)] = Value(leaf_name(step.name, path), i, path, restore)
                    self._born[(i, path)] = self._rank.get(i, -1)
                    mine.append((i, path))
            return tuple(mine)
        restore = restorer(self._shapes.values[i])
        sources = self._crossing_in(step)
        if restore is None:
            return tuple(dict.fromkeys(sources))
        self._values[(i, ())] = Value(step.name, i, (), restore)
        since = [self._born[key] for key in sources] + [self._rank.get(j, -1) for j in step.after]
        self._born[(i, ())] = max(since, default=-1)
        return ((i, ()),)

    def _find_views(self) -> dict[Key, Key | None]:
        """For every tensor that is only a view of another: that other, or None when it is one of the model's own."""
        views: dict[Key, Key | None] = {}
        for i in self.layers:
            if self._shapes.overwrites[i] or self._constant[i]:
                continue
            uses = self._uses[i]
            tensors = [j for j in uses if self._keys[j]]
            if len(tensors) != 1 or len(self._keys[tensors[0]]) != 1:
                continue
            source = next(iter(self._keys[tensors[0]]))
            for key in self._keys[i]:
                if self._storage[key] == self._storage[source]:
                    views[key] = self._select.get(source[0], source) if not self._constant[source[0]] else None
        return views

    def boundaries(self, sizes: Mapping[str, int]) -> dict[int, list[Value]]:
        """Return, for each partition point, the values that cross there. Points that memory forbids are left out.

        ``sizes`` gives each value's bytes by name.
        """
        count = len(self.layers)
        begins: list[list[Key]] = [[] for _ in range(count + 2)]
        for key, last in self._last.items():
            if last > self._born[key]:
                begins[self._born[key] + 1].append(key)
        written = {storage: min(self._rank.get(i, 0) for i in steps) for storage, steps in self._irregular.items()}
        alive: dict[Key, None] = {}
        result: dict[int, list[Value]] = {}
        for k in range(count + 1):
            for key in begins[k]:
                alive[key] = None
            for key in [key for key in alive if self._last[key] < k]:
                del alive[key]
            if k in (0, count):
                result[k] = []
                continue
            crossing = self._lighten(list(alive), sizes)
            if not written or self._allowed(crossing, written, k):
                result[k] = [self._values[key] for key in sorted(crossing)]
        return result

    def _allowed(self, crossing: Iterable[Key], written: Mapping[int, int], k: int) -> bool:
        shared: dict[int, int] = {}
        for key in crossing:
            storage = self._storage.get(key)
            if storage is not None and storage in written:
                shared[storage] = shared.get(storage, 0) + 1
        return all(n == 1 and written[storage] >= k for storage, n in shared.items())

    def _lighten(self, keys: list[Key], sizes: Mapping[str, int]) -> list[Key]:
        """Replace views by what they are views of where that is no heavier, and drop numbers the other side can
        read."""
        tensors = {key for key in keys if self._values[key].restore is None}
        numbers = {key for key in keys if self._values[key].restore is not None}
        kept = set(tensors)
        groups: dict[Key | None, list[Key]] = {}
        for key in tensors:
            root: Key | None = key
            while root is not None and root in self._views:
                root = self._views[root]
            if root != key:
                groups.setdefault(root, []).append(key)
        for root, members in groups.items():
            bytes_of_root = 0 if root is None else sizes[self._values[root].name]
            if root not in tensors and bytes_of_root > sum(sizes[self._values[key].name] for key in members):
                continue
            alone = root is not None and root not in tensors and len(members) == 1
            if alone and bytes_of_root == sizes[self._values[members[0]].name]:
                continue
            kept.difference_update(members)
            if root is not None:
                kept.add(root)
            numbers.update(n for key in members for n in self._numbers_to_view(key))
        known = tensors | kept
        needed = {n for n in numbers if not self._sources(n) <= known}
        return list(kept | needed)

    def _numbers_to_view(self, key: Key) -> set[Key]:
        numbers: set[Key] = set()
        here: Key | None = key
        while here is not None and here in self._views:
            crossing = self._crossing_in(self.steps[here[0]])
            numbers.update(n for n in crossing if self._values[n].restore is not None)
            here = self._views[here]
        return numbers

    def _sources(self, number: Key) -> frozenset[Key]:
        """The tensors a number is read off."""
        if number[1]:
            return frozenset([number])
        found: set[Key] = set()
        for key in self._crossing_in(self.steps[number[0]]):
            found.update([key] if self._values[key].restore is None else self._sources(key))
        return frozenset(found)

    # --- questions of the graph and the cut ---

    def running(self) -> list[Step]:
        """Return the steps whose values the output depends on, or that overwrite memory."""
        return [step for step in self.steps if self._live[step.index]]

    def gives(self, index: int) -> list[Value]:
        """Return the tensors a layer gives."""
        keys = [(index, path) for path in self.steps[index].structure.paths()]
        if self._constant[index]:
            return [Value(leaf_name(self.steps[index].name, key[1]), *key) for key in keys if key in self._storage]
        return [self._values[key] for key in keys if key in self._values and self._values[key].restore is None]

    def reads(self, step: Step) -> list[Value]:
        """Return the tensors a layer reads that were computed from the model's inputs."""
        keys = dict.fromkeys(self._crossing_in(step))
        return [self._values[key] for key in keys if self._values[key].restore is None]

    def attributes_of(self, step: Step, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters a step reads as arguments."""
        targets = [self.steps[j].target for j in self._uses[step.index] if self.steps[j].kind == "attr"]
        found = [operator.attrgetter(target)(model) for target in targets if isinstance(target, str)]
        return [value for value in found if isinstance(value, nn.Parameter)]

    def overwrites(self, steps: Iterable[int], value: Value) -> bool:
        """Return whether any of ``steps`` overwrites the memory of ``value``."""
        storage = self._storage.get((value.step, value.path))
        return any(storage in self._shapes.overwrites[i] for i in steps)

    def torn(self, given: Iterable[Value], included: Iterable[int]) -> list[str]:
        """Return the names in ``given`` whose memory the ``included`` steps would overwrite or read through another
        name, which they have a copy of their own under."""
        found: list[str] = []
        if not self._irregular:
            return found
        steps = set(included)
        given = list(given)
        for value in given:
            storage = self._storage.get((value.step, value.path), None)
            if storage not in self._irregular:
                continue
            others = any(v is not value and self._storage.get((v.step, v.path)) == storage for v in given)
            made_again = any(self._storage[key] == storage for i in steps if i < value.step for key in self._keys[i])
            if others or made_again or value.step >= min(self._irregular[storage]):
                found.append(value.name)
        return found

    def reach(self, given: Iterable[Value], wanted: Iterable[Key] | None) -> tuple[list[int], list[str]]:
        """Return the steps that turn ``given`` into the ``wanted`` parts of steps' values (the model's output when
        None), and the names of model inputs that are also needed for that but not given."""
        provided = {(value.step, value.path) for value in given}
        demands: dict[int, set[Key]] = {}
        whole: set[int] = set()
        passed: set[int] = set()
        if wanted is None:
            whole.add(self._count - 1)
        for key in wanted or ():
            demands.setdefault(key[0], set()).add(key)
        included: list[int] = []
        missing: list[str] = []
        for i in range(self._count - 1, -1, -1):
            if i not in demands and i not in whole:
                if i in passed:
                    included.append(i)
                    passed.update(j for j in self._uses[i] if j in self._select)
                continue
            step = self.steps[i]
            needed = set(self._leaves(i)) if i in whole else demands[i]
            if needed and needed <= provided and i not in self._select:
                continue
            if step.kind == "input":
                missing.append(step.name)
                continue
            included.append(i)
            if i in self._select:
                root, path = self._select[i]
                demands.setdefault(root, set()).update(key for key in self._leaves(root) if key[1][: len(path)] == path)
                # The selecting steps in between run on what the root is rebuilt to: they need no more of it.
                passed.update(j for j in self._uses[i] if j in self._select)
            else:
                whole.update(self._uses[i])
            whole.update(step.after)
        return included[::-1], missing

    def _leaves(self, i: int) -> list[Key]:
        if i in self._select:
            root, path = self._select[i]
            return [key for key in self._leaves(root) if key[1][: len(path)] == path]
        if self._constant[i]:
            return []
        if self.steps[i].structure.kind is None:
            return [(i, ())]
        return [key for key in self._crossing[i] if key[0] == i]


_OF_NO_ELEMENT = frozenset(
    ("shape", "size", "ndim", "dim", "numel", "nelement", "dtype", "device", "stride", "is_contiguous", "element_size")
)


def _reads_no_element(step: Step) -> bool:
    """Return whether a step looks only at a tensor's shape and the like, which no overwriting changes."""
    if step.target is builtins.getattr:
        return step.args[1] in _OF_NO_ELEMENT
    return step.target is builtins.len or (step.is_method and step.target in _OF_NO_ELEMENT)
