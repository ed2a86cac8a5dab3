"""Heads and tails compiled by torch.compile."""

from __future__ import annotations

import importlib
import itertools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import BackendError, short
from torchsurgeon.tracing.structure import flatten

_DEFAULT = "inductor"
_NEEDS = {"tensorrt": "torch_tensorrt", "torch_tensorrt": "torch_tensorrt"}
_count = itertools.count()


def compiler(wanted: str | bool) -> Callable[[nn.Module], Compiled]:
    """Return a function that compiles a module with a backend of ``torch.compile``.

    Args:
        wanted: the backend's name, or True for ``inductor``.

    Raises:
        BackendError: there is no such backend on this machine.
    """
    backend = wanted if isinstance(wanted, str) else _DEFAULT
    try:
        if backend in _NEEDS:
            importlib.import_module(_NEEDS[backend])
    except ImportError as error:
        raise BackendError(
            f"compile={wanted!r} needs {_NEEDS[backend]}, which fails to import: {error}; install it or choose another"
        ) from error
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise BackendError(
            f"compile must be True or a backend of torch.compile ({', '.join(known)}); got {short(wanted)}"
        )
    return lambda module: Compiled(module, backend)


class Compiled:
    """A module that runs as one compiled graph for calls like the one it was compiled on, and in eager for all others.

    So no call waits for a compiler without having asked for it.

    Attributes:
        tried: whether compiling was tried.
        reason: why it could not be compiled; None if it was, or has not been tried.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self.tried = False
        self.reason: str | None = None
        self._module, self._backend = module, backend
        self._run = torch.compile(_named_apart(module), backend=backend, dynamic=False, fullgraph=True)
        self._like: object = None
        self._compiling = threading.Lock()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for calls like this one, once, which takes seconds to minutes.

        If that fails, a RuntimeWarning names the reason. What the module itself raises for this call is raised.
        """
        # Imported only now, since it takes a second.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        with self._compiling:
            if self.tried:
                return
            try:
                self._run(*args, **kwargs)
                self._like = _likeness(args, kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                cause = getattr(error, "inner_exception", error)
                if by_signal_handler(cause) or by_signal_handler(error):
                    raise cause from None
                # If it is the model that refuses this call, let it say so itself.
                self._module(*args, **kwargs)
                self.reason = f"{type(cause).__name__}: {(str(cause).strip() or 'no reason given').splitlines()[0]}"
            self.tried = True
        if self.reason is not None:
            warnings.warn(
                f"a part of the model could not be compiled with {self._backend!r} and runs as it is ({self.reason})",
                RuntimeWarning,
                stacklevel=2,
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._like is not None and self._like == _likeness(args, kwargs):
            return self._run(*args, **kwargs)
        return self._module(*args, **kwargs)


def _likeness(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Return what calls must have in common to be served by one compiled graph."""
    return [
        (path, (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf)
        for path, leaf in flatten((args, kwargs))[0]
    ]


def _named_apart(module: nn.Module) -> Callable[..., Any]:
    """Return a function that calls ``module``, and has a code object of its own.

    torch.compile keeps its graphs, and counts recompilations, by code object, which all parts of a model would share.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    name = f"part_{next(_count)}"
    return types.FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
