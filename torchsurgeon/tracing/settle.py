"""Rewrite a traced model's steps so that their arguments alone say in which order they must run.

A traced model reads and writes memory: an in-place layer overwrites a tensor that another name may still show. Once a
program is settled, a cut needs to follow values only, not memory:

* A step that reads an overwritten tensor is made to read the value of the step that overwrote it.
* Sometimes that is impossible, because the tensor is overwritten through one view and read again through another. Then
  the reading step lists the overwriting step in ``after``, so that it still runs later. The memory is recorded in
  ``Settled.overwritten_out_of_sight``, so that no cut separates the two views.
* A dtype, string or None that the model reads off a tensor becomes a constant.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from torchsurgeon.tracing.shapes import Shapes, drifting, storage_of
from torchsurgeon.tracing.step import Constant, Key, ModelDevice, Ref, Step
from torchsurgeon.tracing.structure import LEAF, flatten


@dataclasses.dataclass(frozen=True)
class Settled:
    """What is known of the memory and the reads of a settled program. Lists are indexed by step.

    Attributes:
        tensors: the tensors each step gives, by key.
        storages: the identity of the memory behind every tensor, by key; tensors that share memory have the same.
        overwrites: the storages that each step overwrites.
        overwritten_out_of_sight: by storage, the steps that overwrite it although a later step reads it through
            another view. Between the first and the last of these no cut may separate the views.
        uses: the steps whose values each step reads.
        live: whether the output depends on a step, or the step is an input or overwrites memory.
    """

    tensors: list[dict[Key, torch.Tensor]]
    storages: dict[Key, int]
    overwrites: list[frozenset[int]]
    overwritten_out_of_sight: dict[int, list[int]]
    uses: list[list[int]]
    live: list[bool]


def settle(steps: Sequence[Step], shapes: Shapes, model: nn.Module) -> Settled:
    """Rewrite ``steps`` in place; they compute what they did before.

    Args:
        steps: the traced program, the model's result last.
        shapes: what ``propagate()`` found for these steps.
        model: the traced model; a step that asks for a device is made to read the one that the model is on.

    Returns:
        What was learned of the steps' memory and reads.

    Raises:
        TraceError: a step overwrites one of the model's own parameters, buffers or constants.
    """
    for step in steps:
        value = shapes.values[step.index]
        step.structure = flatten(value)[1] if step.kind == "call" else LEAF
    tensors = [_tensors_of(step, shapes) for step in steps]
    storages = {key: storage_of(leaf) for given in tensors for key, leaf in given.items()}
    _settle_constants(steps, shapes, model)
    out_of_sight = _settle_overwrites(steps, shapes.overwrites, tensors, storages)
    uses = [step.uses() for step in steps]
    for step, used in zip(steps, uses, strict=True):
        step.reads = tuple(used)
    return Settled(tensors, storages, shapes.overwrites, out_of_sight, uses, _live(steps, uses, shapes.overwrites))


def _tensors_of(step: Step, shapes: Shapes) -> dict[Key, torch.Tensor]:
    if step.kind == "output":
        return {}
    leaves, _ = flatten(shapes.values[step.index])
    return {(step.index, path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _settle_constants(steps: Sequence[Step], shapes: Shapes, model: nn.Module) -> None:
    """Make dtypes, strings and None that were read off tensors constants.

    A device is no constant: head and tail may run on different ones, so each reads its own off the model.
    """
    for step in steps:
        value = shapes.values[step.index]
        if step.kind != "call" or not (value is None or isinstance(value, (str, torch.dtype, torch.device))):
            continue
        if isinstance(value, torch.device):
            step.target, step.args, step.kwargs = ModelDevice(model), (), {}
        elif not shapes.overwrites[step.index]:
            for later in steps[step.index + 1 :]:
                later.replace(step.index, value)


def _settle_overwrites(
    steps: Sequence[Step],
    overwrites: Sequence[frozenset[int]],
    tensors: Sequence[dict[Key, torch.Tensor]],
    storages: dict[Key, int],
) -> dict[int, list[int]]:
    """Make later readers of an overwritten tensor read what overwrote it.

    Returns:
        By storage, the steps that overwrite it where a later reader could not be redirected.
    """
    # All tensors on the same memory, in the order in which they are made: writing to one changes the others, too.
    sharing: dict[int, list[Key]] = {}
    for key, storage in storages.items():
        sharing.setdefault(storage, []).append(key)
    readers: dict[int, set[int]] = {}
    for step in steps:
        for used in step.uses():
            readers.setdefault(used, set()).add(step.index)
    out_of_sight: dict[int, list[int]] = {}
    for step in steps:
        for storage in overwrites[step.index]:
            names = sharing.get(storage, [])
            owner = next((steps[i] for i, _ in names if steps[i].kind == "attr"), None)
            if owner is not None:
                what = f"the model's own {owner.target!r}"
                if isinstance(owner.target, Constant):
                    what = "a tensor made in forward that is the same in every call"
                raise drifting(step, what)
            for key in [key for key in names if key[0] < step.index]:
                written, i = step.index, key[0]
                for reader in sorted(r for r in readers.get(i, ()) if r > written):
                    if _is_same_view(key, (written, ()), tensors, storages):
                        steps[reader].replace(i, Ref(written))
                        # A step further on may overwrite the same memory again, and then has to find this reader.
                        readers[i].discard(reader)
                        readers.setdefault(written, set()).add(reader)
                    elif not _reads_no_element(steps[reader]):
                        steps[reader].after += (written,)
                        out_of_sight.setdefault(storage, []).append(written)
    return out_of_sight


def _is_same_view(key: Key, other: Key, tensors: Sequence[dict[Key, torch.Tensor]], storages: dict[Key, int]) -> bool:
    """Return whether two tensors show the same elements of the same memory in the same order."""
    if key[1] or storages.get(key) != storages.get(other):
        return False
    a, b = tensors[key[0]][key], tensors[other[0]][other]
    if a.layout is not torch.strided or b.layout is not torch.strided or a.is_nested or b.is_nested:
        return a is b
    # The same bytes may also be shown as numbers of another dtype, conjugated or negated.
    forms = [(t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_conj(), t.is_neg()) for t in (a, b)]
    return forms[0] == forms[1]


_OF_NO_ELEMENT = frozenset(
    ("shape", "size", "ndim", "dim", "numel", "nelement", "dtype", "device", "stride", "is_contiguous", "element_size")
)


def _reads_no_element(step: Step) -> bool:
    """Return whether a step looks only at a tensor's shape and the like, which overwriting its elements leaves."""
    if step.target is builtins.getattr:
        return step.args[1] in _OF_NO_ELEMENT
    return step.target is builtins.len or (step.is_method and step.target in _OF_NO_ELEMENT)


def _live(steps: Sequence[Step], uses: Sequence[list[int]], overwrites: Sequence[frozenset[int]]) -> list[bool]:
    """Return, by step, whether its result is read by a live step, or it is an input, an output or overwrites memory."""
    live = [False] * len(steps)
    live[-1] = True
    for step in reversed(steps):
        i = step.index
        if live[i] or step.kind == "input" or overwrites[i]:
            live[i] = True
            for j in (*uses[i], *step.after):
                live[j] = True
    return live
