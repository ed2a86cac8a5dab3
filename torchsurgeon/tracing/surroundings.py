"""What the code of a model asks of its surroundings: settings of PyTorch, the environment, variables of its thread.

Whether its parameters need gradients is such a thing, too, since a program that trains a part of them sets it.

A trace holds what the answers were, and so takes the path to which they led. They are premises of the trace as
attributes are. Nothing is watched that the code does not name.
"""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import backends, nn

from torchsurgeon.tracing.names import names_in, texts_in
from torchsurgeon.tracing.reading import Part, Reading
from torchsurgeon.tracing.results import ABSENT, MAKING

# By their names: the functions of PyTorch that tell a setting. Autocast and the gradient mode are compared elsewhere.
_TELLING: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        torch.get_default_dtype,
        torch.get_default_device,
        torch.get_num_threads,
        torch.get_float32_matmul_precision,
        torch.are_deterministic_algorithms_enabled,
        torch.is_deterministic_algorithms_warn_only_enabled,
        torch.get_deterministic_debug_mode,
        backends.cuda.flash_sdp_enabled,
        backends.cuda.mem_efficient_sdp_enabled,
        backends.cuda.math_sdp_enabled,
        backends.cuda.cudnn_sdp_enabled,
        backends.mha.get_fastpath_enabled,
    )
}
# By the last name of a module in ``torch.backends``: its flags.
_FLAGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cudnn": (backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
    "matmul": (backends.cuda.matmul, ("allow_tf32",)),
    "mkldnn": (backends.mkldnn, ("enabled", "deterministic", "allow_tf32")),
    "quantized": (backends.quantized, ("engine",)),
    "opt_einsum": (backends.opt_einsum, ("enabled", "strategy")),
}
_OF_PARAMETERS = frozenset(("requires_grad", "is_leaf", "grad_fn"))
# These make tensors of the default dtype, which decides the dtypes of what is computed from them.
_OF_DEFAULT_DTYPE = frozenset(
    "zeros ones empty full rand randn tensor as_tensor scalar_tensor arange linspace logspace eye".split()  # noqa: SIM905
)
_ENVIRONMENT = frozenset(("environ", "getenv"))


class _Answers(dict[str, Any]):
    """By its name, what is asked; looked up, it is what the answer is now."""

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]

    def __getitem__(self, name: str) -> Any:
        return dict.__getitem__(self, name)()  # quicker than by super()


def surroundings(reading: Reading) -> list[Part]:
    """Return what the code of a model asks of its surroundings, with the answers.

    Args:
        reading: what the model's call reads.
    """
    asked: dict[str, dict[str, Callable[[], Any]]] = {
        "torch": dict(_settings(reading)),
        "os.environ": {name: _of_environment(name) for name in _variables(reading.functions)},
    }
    if not _OF_PARAMETERS.isdisjoint(reading.names):
        asked["parameters"] = {"requires_grad": _of_parameters([module for _, module in reading.modules])}
    for part in reading.parts:
        if isinstance(part.value, threading.local):
            names = _read_beside(part, reading.functions)
            asked[part.path] = {name: _of_thread(part.value, name) for name in sorted(names)}
        elif isinstance(part.value, ContextVar):
            asked[part.path] = {"get()": _of_context(part.value)}
    # All in one, which takes less time at each call.
    answers = _Answers({f"{place}.{name}": tell for place, by_name in asked.items() for name, tell in by_name.items()})
    return [Part(f"its surroundings.{name}", answers, name, answers[name], None) for name in answers]


def _settings(reading: Reading) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the settings of PyTorch that the code asks for, and what tells them."""
    by_their_own_name = {id(part.value) for part in reading.parts if callable(part.value)}
    for name, function in _TELLING.items():
        makes = function is torch.get_default_dtype and not _OF_DEFAULT_DTYPE.isdisjoint(reading.names)
        if makes or name in reading.names or id(function) in by_their_own_name:
            yield f"{name}()", function
    imported = {id(part.value) for part in reading.parts if isinstance(part.value, types.ModuleType)}
    for name, (module, flags) in _FLAGS.items():
        if name in reading.names or id(module) in imported:
            yield from ((f"{name}.{flag}", _of_module(module, flag)) for flag in flags if flag in reading.names)


def _variables(functions: Iterable[types.FunctionType]) -> list[str]:
    """Return the texts that may name a variable of the environment, in the functions that read it."""
    found: set[str] = set()
    for function in functions:
        names = names_in(function.__code__)
        if not _ENVIRONMENT.isdisjoint(names.read | names.globals):
            found.update(texts_in(function.__code__))
            known = (function.__globals__.get(name) for name in names.globals)
            found.update(text for text in known if isinstance(text, str))
    return sorted(text for text in found if text and "=" not in text and "\0" not in text)


def _read_beside(part: Part, functions: Iterable[types.FunctionType]) -> set[str]:
    """Return the attributes that functions read which also read a part, without those that one of them assigns."""
    read: set[str] = set()
    assigned: set[str] = set()
    for function in functions:
        names = names_in(function.__code__)
        if function is part.holder or part.key in names.read | names.globals:
            read |= names.read
            assigned |= names.assigned if function.__code__.co_name not in MAKING else set()
    return read - assigned - {part.key}


def _of_environment(name: str) -> Callable[[], Any]:
    return lambda: os.environ.get(name)


def _of_thread(variables: threading.local, name: str) -> Callable[[], Any]:
    return lambda: getattr(variables, name, ABSENT)


def _of_context(variable: ContextVar[Any]) -> Callable[[], Any]:
    def now() -> Any:
        try:
            return variable.get()
        except LookupError:
            return ABSENT

    return now


def _of_parameters(modules: list[nn.Module]) -> Callable[[], Any]:
    tables = [module._parameters for module in modules if module._parameters]
    return lambda: tuple([one.requires_grad for table in tables for one in table.values() if one is not None])


def _of_module(module: Any, flag: str) -> Callable[[], Any]:
    return lambda: getattr(module, flag)
