"""TorchInductor, the compiler of ``torch.compile``."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon.backends.backend import Backend, Run
from torchsurgeon.backends.eager import Eager
from torchsurgeon.backends.part import Part

_count = itertools.count()


class Inductor(Backend):
    """``torch.compile`` with its own compiler, which on a CPU needs a C++ compiler.

    It reads the weights where they lie, so it follows their changes. It takes the example's shapes only: it would
    compile anew for a batch of another size, while a call waits.
    """

    name = "inductor"
    device = "where the weights are"
    free_batch = False
    copies_weights = False
    keeps_nan = True
    compiler = "inductor"

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Compile the part as one graph, and run it once, which is when the compiler works."""
        run = Eager().build(part, example, free_batch=False)
        compiled: Callable[..., Any] = torch.compile(
            _named_apart(run), backend=self.compiler, dynamic=False, fullgraph=True
        )
        with torch.no_grad():
            compiled(*part.computed(example))
        return compiled


def _named_apart(module: Callable[..., Any] | nn.Module) -> Callable[..., Any]:
    """Return a function that calls ``module``, and has a code object of its own.

    torch.compile keeps its graphs, and counts recompilations, by code object, which all parts of a model would share.
    """

    def run(*args: Any) -> Any:
        return module(*args)

    name = f"backend_part_{next(_count)}"
    return types.FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
