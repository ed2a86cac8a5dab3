"""Whether requests of one model may run in several threads at once, and how many threads that should be."""

from __future__ import annotations

import dis
import os
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.errors import short
from torchsurgeon.serve.tails import place_of
from torchsurgeon.tracing.ambient import Ambient
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.names import of_library_class
from torchsurgeon.tracing.reading import Reading
from torchsurgeon.tracing.source import is_library_code, is_library_module
from torchsurgeon.tracing.state import functions_of, left_as_it_was
from torchsurgeon.tracing.step import Step

# PyTorch keeps these for each thread; every other setting holds for the process.
_OF_A_THREAD = ("autocast", "gradients")
_LISTED = 3


def default_concurrency() -> int:
    """Return on how many threads one model's requests run, so that together they use every core once."""
    return max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())


def why_in_turn(graph: LayerGraph, tensors: Sequence[Tensor] | None = None) -> str | None:
    """Return why requests of a model have to run one after the other, in words; None where they need not.

    What was traced is run as it was traced, so of the model's own code only that of layers which stay whole is called:
    modules with hooks, modules that cannot be followed, functions of the user's. Such code must not assign attributes,
    or fill lists and dicts, that another call may read in the meantime. It is read for that, without being run. Then
    the model is called once, and what it has left in its modules is looked for.

    Args:
        graph: the traced model.
        tensors: the example's tensors, in the order of ``graph.inputs``; None to leave out the call.
    """
    if place_of(graph.model).type != "cpu":
        return "its weights are not on the CPU, and a GPU runs one request after the other anyway"
    for step in graph.steps:
        if step.kind != "call":
            continue
        for name in _settings_of(step.ambient):
            return f"layer {short(step.name)} runs with {name} set, which holds for the whole process"
        written = _written_by(step)
        if written:
            return f"the code of layer {short(step.name)} assigns or fills {', '.join(written[:_LISTED])}"
    left = [] if tensors is None else _left_by_a_call(graph, tensors)
    return f"a call of it leaves something in {', '.join(left[:_LISTED])}" if left else None


def _settings_of(ambient: Ambient | None) -> Iterator[str]:
    for name, _ in () if ambient is None else ambient.changed:
        if not name.startswith(_OF_A_THREAD):
            yield name


def _written_by(step: Step) -> list[str]:
    """Return the attributes and global names that a layer's own code writes to, apart from PyTorch's own code."""
    if isinstance(step.target, nn.Module):
        target = step.target
        reading = Reading({step.module_path: target}, unhooked=target if step.bare else None)
        inside: set[Any] = {type(module) for _, module in reading.modules}
        library = set().union(*(of_library_class(kind).assigned for kind in inside))
        functions: Iterable[types.FunctionType] = functions_of(target)
    elif isinstance(step.target, types.FunctionType) and not is_library_module(step.target.__module__ or ""):
        reading, library, functions = Reading({}, {step.name: step.target}), set(), [step.target]
    else:
        return []
    if not reading.complete:
        return ["more than can be looked through"]
    outside = {name for function in functions for name in _written_outside(function.__code__)}
    return sorted((reading.assigned - library) | reading.filled | outside)


def _written_outside(code: types.CodeType) -> Iterator[str]:
    """Return the global names that a function assigns, and the variables of the function around it."""
    if is_library_code(code):
        return
    for one in dis.get_instructions(code):
        is_outer = one.opname == "STORE_DEREF" and one.argval in code.co_freevars
        if is_outer or one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield str(one.argval)


def _left_by_a_call(graph: LayerGraph, tensors: Sequence[Tensor]) -> list[str]:
    names = tuple(spec.name for spec in graph.inputs)
    whole = tail_for(graph, names, flat=True)
    with left_as_it_was(graph.model) as state, torch.random.fork_rng(devices=[]), torch.no_grad():
        whole(*tensors)
        return state.changed()
