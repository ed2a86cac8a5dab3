"""Tests of fractions that a model leaves out where it is compiled, found by running it both ways.

A model that asks ``torch.compiler.is_compiling()`` mostly leaves out tests of masks, and other masks are tried. It may
also leave out a test of what it computes, as in ``if not is_compiling() and (y.abs() > 100).any(): y = y.clamp(…)``. No
sample would show whether such a test can decide otherwise, so a trace without it is not used.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchsurgeon.tracing.operators import Kind, describe
from torchsurgeon.tracing.program import tensors_within

# What shows a value without deciding anything by it.
_SHOWING = frozenset(("__format__", "__repr__", "__str__"))


class _Reads(TorchFunctionMode):
    """Counts by name the calls that read into Python what was computed with fractions.

    These are the inputs that are fractions, and all that is computed from inputs and the model's own fractions. What is
    computed from a mask alone is none of them.

    Attributes:
        counted: by the path of the module that reads and the name of the call, how often it was made.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, str]] = Counter()
        self._paths: dict[int, str] = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self._own = {id(t) for t in (*model.parameters(), *model.buffers()) if _has_fractions(t)}
        # By identity. The tensors are held, so that no other gets the identity of one that is gone.
        self._whole = {id(t): t for t in inputs if not _has_fractions(t)}
        self._fractions = {id(t): t for t in inputs if _has_fractions(t)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [id(tensor) for tensor in tensors_within((args, kwargs))]
        from_whole = any(key in self._whole for key in given)
        from_fractions = any(key in self._fractions for key in given)
        if from_whole or from_fractions:
            from_fractions |= any(key in self._own for key in given)
            operation = describe(func, args, kwargs)
            if from_fractions and operation.kind is Kind.VALUE and operation.name not in _SHOWING:
                self.counted[self._reading_module(), operation.name] += 1
            found = {id(tensor): tensor for tensor in tensors_within(result)}
            (self._fractions if from_fractions else self._whole).update(found)
        return result

    def _reading_module(self) -> str:
        """Return the path of the innermost module of the model whose method runs."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            found = id(frame.f_locals.get("self"))
            if found in self._paths:
                return self._paths[found]
            frame = frame.f_back
        return ""


def left_out(
    call: Callable[[Sequence[torch.Tensor]], Any],
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    whole: Collection[str],
) -> tuple[str, str] | None:
    """Return which call reads fractions although the model leaves it out where it is compiled; None for none.

    It is told by the path of the module that makes it, and its name.

    Args:
        call: calls the model with input tensors.
        model: the model.
        inputs: input tensors.
        whole: the paths of modules that are kept whole, and so leave out nothing.
    """
    copies = [[tensor.detach().clone() for tensor in inputs] for _ in range(2)]
    with _Reads(model, copies[0]) as eager:
        call(copies[0])
    if not eager.counted:
        return None
    with _compiling(), _Reads(model, copies[1]) as compiled, contextlib.suppress(Exception):
        call(copies[1])
    found = eager.counted - compiled.counted
    return next((one for one in found if not any(f"{one[0]}.".startswith(f"{path}.") for path in whole)), None)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Tell code of this thread that it is compiled."""
    original, here = torch.compiler.is_compiling, threading.get_ident()
    torch.compiler.is_compiling = lambda: threading.get_ident() == here or original()
    try:
        yield
    finally:
        torch.compiler.is_compiling = original


def _has_fractions(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
