"""Which steps turn given values into others: what a head, a tail or a part between two cuts has to run."""

from __future__ import annotations

from collections.abc import Iterable

from torchsurgeon.tracing.flow import DataFlow, Value
from torchsurgeon.tracing.step import Key
from torchsurgeon.tracing.structure import LeafPath


def reach(flow: DataFlow, given: Iterable[Value], wanted: Iterable[Key] | None) -> tuple[list[int], list[str]]:
    """Find the steps that turn ``given`` into ``wanted``.

    Args:
        flow: the traced model's data flow.
        given: the values that are known.
        wanted: the parts of steps' values that are asked for; None for the model's output.

    Returns:
        The indices of the steps, in the order they run, and the names of model inputs that are also needed but are not
        given. Without any of these the given values determine the wanted ones.
    """
    uses, selected = flow.settled.uses, flow.selected
    provided = {(value.step, value.path) for value in given}
    # Going backwards, every step's readers are met before it. ``demands`` holds the leaves of its value they need,
    # ``whole`` the steps whose values they need as they are, ``passed`` the selecting steps that only hand leaves on.
    demands: dict[int, set[Key]] = {}
    whole: set[int] = set()
    passed: set[int] = set()
    if wanted is None:
        whole.add(len(flow.steps) - 1)
    for key in wanted or ():
        demands.setdefault(key[0], set()).add(key)
    included: list[int] = []
    missing: list[str] = []
    for i in range(len(flow.steps) - 1, -1, -1):
        if i not in demands and i not in whole:
            if i in passed:
                included.append(i)
                passed.update(j for j in uses[i] if j in selected)
            continue
        step = flow.steps[i]
        needed = set(_leaves(flow, i)) if i in whole else demands[i]
        if needed and needed <= provided and i not in selected:
            continue
        if step.kind == "input":
            missing.append(step.name)
            continue
        included.append(i)
        if i in selected:
            root, path = selected[i]
            demands.setdefault(root, set()).update(_under(path, _leaves(flow, root)))
            # The selecting steps in between run on what the root is rebuilt to: they need no more of it.
            passed.update(j for j in uses[i] if j in selected)
        else:
            whole.update(uses[i])
        whole.update(step.after)
    return included[::-1], missing


def _leaves(flow: DataFlow, i: int) -> list[Key]:
    """Return what has to be known of a step's value for the step not to run; nothing for a constant, which runs."""
    if i in flow.selected:
        root, path = flow.selected[i]
        return _under(path, _leaves(flow, root))
    if flow.constant[i]:
        return []
    if flow.steps[i].structure.kind is None:
        return [(i, ())]
    return [key for key in flow.crossing[i] if key[0] == i]


def _under(path: LeafPath, keys: Iterable[Key]) -> list[Key]:
    return [key for key in keys if key[1][: len(path)] == path]


def overwrites(flow: DataFlow, steps: Iterable[int], value: Value) -> bool:
    """Return whether any of ``steps`` overwrites the memory of ``value``."""
    storage = flow.settled.storages.get((value.step, value.path))
    return any(storage in flow.settled.overwrites[i] for i in steps)


def torn(flow: DataFlow, given: Iterable[Value], included: Iterable[int]) -> list[str]:
    """Return which given tensors would come apart from memory they share in the whole model.

    In the whole model a step overwrites the memory through one name, and another step reads it through a second. Given
    under only one of the names, or as a copy under each, the second would not show what was written.

    Args:
        flow: the traced model's data flow.
        given: the values that are known.
        included: the steps that run on them, as ``reach()`` found.

    Returns:
        The names of those tensors; empty when the steps give what the whole model gives.
    """
    found: list[str] = []
    out_of_sight, storages = flow.settled.overwritten_out_of_sight, flow.settled.storages
    if not out_of_sight:
        return found
    steps = set(included)
    given = list(given)
    for value in given:
        storage = storages.get((value.step, value.path), None)
        if storage not in out_of_sight:
            continue
        others = any(v is not value and storages.get((v.step, v.path)) == storage for v in given)
        tensors = flow.settled.tensors
        made_again = any(storages[key] == storage for i in steps if i < value.step for key in tensors[i])
        if others or made_again or value.step >= min(out_of_sight[storage]):
            found.append(value.name)
    return found
