"""A module that is called through another function.

It has a file of its own so that the rest of emulate/ needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Slowed(nn.Module):
    """A module that has the attributes of another one, and calls it through a function.

    Args:
        module: the other module.
        call: called as ``call(module, …)`` with the arguments of each call.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns for the other module and these arguments."""
        return self._call(self.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
