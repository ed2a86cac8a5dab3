"""Functions of PyTorch that the call of a model uses, and which of them a program has replaced by others.

A program may assign ``torch.nn.functional.relu = …`` or ``torch.nn.Module.__call__ = …``. The model's own code and
PyTorch's layers then call the new function, in this process only.
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

# What every module's call goes through, besides ``__call__``.
_CALLING = ("_wrapped_call_impl", "_call_impl")
# While a model is traced or exported in any thread, these are functions of those packages. The model has not changed.
_EXCHANGED = ("__call__", "__getattr__")
_TRACERS = ("torchsurgeon.", "torch.fx.")
# Attention is often exchanged by replacing this one. Libraries call it by way of tables of functions, so that the
# model's own code does not name it.
_BY_TABLES = {"scaled_dot_product_attention"}
_PLACES: tuple[Any, ...] = (torch.nn.functional, torch, torch.linalg, torch.special, torch.fft, torch.Tensor)


# Looked up once, since every inference compares them.
_OF_MODULES, _known = vars(nn.Module), dict.__getitem__


class _AsWritten(dict[str, Any]):
    """Methods of ``nn.Module`` as the program has them, also while they are others because a model is traced."""

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]

    def __getitem__(self, name: str) -> Any:
        now, known = _OF_MODULES[name], _known(self, name)
        if now is known or getattr(now, "__globals__", {}).get("__name__", "").startswith(_TRACERS):
            return known
        self.__setitem__(name, now)
        return now


_AS_WRITTEN = _AsWritten({name: vars(nn.Module)[name] for name in _EXCHANGED})


def functions_of_pytorch(classes: Iterable[type], reading: Reading) -> list[Part]:
    """Return what calls modules, and the functions of PyTorch and methods of tensors that the code of a model names.

    Methods that PyTorch's core defines lie in a class below ``torch.Tensor``, and are not among them.

    Args:
        classes: the classes of the model's modules.
        reading: what the model's call reads.
    """
    names = reading.names.union(_BY_TABLES, *(of_library_class(cls).read for cls in set(classes)))
    parts = [Part(f"torch.nn.Module.{name}", _AS_WRITTEN, name, _AS_WRITTEN[name], nn.Module) for name in _EXCHANGED]
    parts += [
        Part(f"torch.nn.Module.{name}", vars(nn.Module), name, vars(nn.Module)[name], nn.Module) for name in _CALLING
    ]
    return parts + [
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
