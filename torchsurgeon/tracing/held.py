"""How many bytes of tensors a model's modules hold: parameters, packed weights, buffers, tensors in other attributes.

Each tensor counts once, also where several modules or layers share it.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.flow import DataFlow
from torchsurgeon.tracing.step import Constant, Step

# By an identity of each tensor: its bytes.
Holdings = dict[Hashable, int]

_OF_MODULES = frozenset(nn.Module().__dict__)
_DEPTH = 4


def holdings(tensors: Iterable[torch.Tensor]) -> Holdings:
    """Return the bytes of tensors. Those that show the same memory are one; those of a subclass are their parts."""
    found: Holdings = {}
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            found |= holdings(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            # A tensor on the meta device has no address.
            found[(tensor.data_ptr() or id(tensor), tensor.nbytes)] = tensor.nbytes
    return found


def parameter_holdings(modules: Iterable[nn.Module]) -> Holdings:
    """Return the parameters of modules, and the weights that quantized modules keep packed, with their biases."""
    found: Holdings = {}
    for module in modules:
        found |= holdings(value for value in module._parameters.values() if value is not None)
        packed = [value for value in _attributes(module) if isinstance(value, torch.ScriptObject)]
        found |= {id(value): _packed_bytes(value) for value in packed}
    return found


def layer_holdings(flow: DataFlow, model: nn.Module) -> list[Holdings]:
    """Return, for each layer of a traced model, all tensors that it needs in memory besides what it computes.

    Args:
        flow: the model's data flow.
        model: the traced model.
    """
    return [_of_step(flow, flow.steps[index], model) for index in flow.layers]


def _of_step(flow: DataFlow, step: Step, model: nn.Module) -> Holdings:
    modules = list(step.target.modules()) if step.is_module else []
    found = parameter_holdings(modules)
    for module in modules:
        found |= holdings(_tensors([*module._buffers.values(), *_attributes(module)]))
    for i in flow.settled.uses[step.index]:
        target = flow.steps[i].target
        if flow.steps[i].kind == "attr":
            value = target.tensor if isinstance(target, Constant) else operator.attrgetter(target)(model)
            found |= holdings(_tensors(value))
    return found


def _attributes(module: nn.Module) -> list[Any]:
    """Return the values of a module's own attributes, without the tables of ``nn.Module``."""
    return [value for key, value in module.__dict__.items() if key not in _OF_MODULES]


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth - 1)


def _packed_bytes(packed: torch.ScriptObject) -> int:
    """Return the bytes of the tensors that a packed weight consists of, whose memory order only its kernel knows."""
    found: list[torch.Tensor] = []
    todo: list[Any] = [packed]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.ScriptObject):
            value = value.__getstate__() if hasattr(value, "__getstate__") else None
        if isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return sum(holdings(found).values())
