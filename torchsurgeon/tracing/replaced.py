"""Functions of PyTorch that the code of a model names, and which of them a program has replaced by others.

A program may assign ``torch.nn.functional.relu = …``. The model's own code and PyTorch's layers then call the new
function, in this process only.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.names import of_library_class
from torchsurgeon.tracing.reading import Part, Reading, is_own_method
from torchsurgeon.tracing.source import code_of, is_library_code

_PLACES: tuple[Any, ...] = (torch.nn.functional, torch, torch.linalg, torch.special, torch.fft, torch.Tensor)


def functions_of_pytorch(classes: Iterable[type], reading: Reading) -> list[Part]:
    """Return the functions of PyTorch's modules, and the methods of its tensors, whose names the code of a model reads.

    Methods that PyTorch's core defines lie in a class below ``torch.Tensor``, and are not among them.

    Args:
        classes: the classes of the model's modules.
        reading: what the model's call reads.
    """
    names = reading.names.union(*(of_library_class(cls).read for cls in set(classes)))
    return [
        Part(f"{_name_of(place)}.{name}", vars(place), name, vars(place)[name], place)
        for place in _PLACES
        for name in sorted(names & vars(place).keys())
        if not name.startswith("_") and _is_function(vars(place)[name])
    ]


def replaced_functions(parts: Iterable[Part]) -> Iterator[Part]:
    """Return those functions that are not PyTorch's own."""
    for part in parts:
        code = code_of(part.value)
        if code is not None and not is_library_code(code):
            yield part


def has_another_forward(module: nn.Module) -> bool:
    """Return whether the ``forward`` of a module has been replaced by another than its class's."""
    forward = module.__dict__.get("forward")
    return forward is not None and not is_own_method(module, "forward", forward)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, types.ModuleType))


def _name_of(place: Any) -> str:
    return "torch.Tensor" if place is torch.Tensor else str(place.__name__)
