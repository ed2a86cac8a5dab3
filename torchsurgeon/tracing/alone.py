"""Calls of a model in other threads while it is traced.

Where a call leaves nothing in the model, such calls are as safe as ever: PyTorch is patched meanwhile, but other
threads get the original. A model whose ``forward`` assigns attributes is another matter. Tracing calls it, and puts
back what it held before, so a call beside that would read tensors without elements or of other inputs. So it is
refused, as are all calls while torch.export has put stand-ins in the place of the weights.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from torchsurgeon.errors import TraceError

# Tracing patches PyTorch, so one thread traces at a time.
TRACING = threading.RLock()
# A fork waits for that thread. Otherwise the child process would have the patches for ever, and a lock that is taken by
# a thread that it does not have.
os.register_at_fork(before=TRACING.acquire, after_in_parent=TRACING.release, after_in_child=TRACING.release)
# Models that were seen to leave something, by identity. When they are traced again, other threads' calls are refused
# from the start.
_leaving: dict[int, weakref.ref[nn.Module]] = {}
# The trace that the thread with the lock makes.
_current: list[_Alone] = []


class _Alone:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.thread = model, threading.get_ident()
        self.modules = {id(module) for module in model.modules()}
        known = _leaving.get(id(model))
        self.leaves, self.exports = known is not None and known() is model, False

    def check(self, module: nn.Module) -> None:
        if (self.leaves or self.exports) and threading.get_ident() != self.thread and id(module) in self.modules:
            why = "its forward assigns attributes" if self.leaves else "torch.export has replaced its weights"
            raise TraceError(
                f"{type(self.model).__name__} is being traced in another thread, and {why}, so this call would not "
                "give the model's own answer; call it when trace() has returned, or trace a copy of it"
            )


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Refuse, inside the block, calls of other threads that would not be answered as the model answers.

    Args:
        model: the model that is traced.
    """
    with TRACING:
        found, called = _Alone(model), nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found.check(module)
            return called(module, *args, **kwargs)

        _current.append(found)
        # The compiler of torch.compile would follow it.
        if not any("_orig_mod" in module._modules for module in model.modules()):
            nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = called  # type: ignore[method-assign]
            _current.pop()


def leaves_something() -> None:
    """Refuse other threads' calls of the model that this thread traces, from now on."""
    if _current and _current[-1].thread == threading.get_ident():
        model, _current[-1].leaves = _current[-1].model, True
        _leaving[id(model)] = weakref.ref(model)
        for key in [key for key, known in _leaving.items() if known() is None]:
            del _leaving[key]


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Refuse other threads' calls of the model that this thread traces inside the block."""
    for one in _current[-1:]:
        one.exports = True
    try:
        yield
    finally:
        for one in _current[-1:]:
            one.exports = False
