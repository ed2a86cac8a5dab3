"""A device slower than this one."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torchsurgeon.errors import DeviceError

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")

_SPIN_S = 3e-4


class SlowDevice:
    """A device `factor` times slower than this one: every call takes `factor` times what it took.

    :param factor: 1 or more
    :raises DeviceError: the factor is below 1 or not finite
    """

    def __init__(self, factor: float) -> None:
        if not (math.isfinite(factor) and factor >= 1):
            raise DeviceError(f"a device cannot be slowed by a factor of {factor}: give 1 or more")
        self.factor = factor

    def call(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
        """What `function` returns, `factor` times as late. CUDA work it launches is waited for and counted."""
        # Before PyTorch is imported nothing runs on CUDA.
        torch: Any = sys.modules.get("torch")
        cuda = torch is not None and torch.cuda.is_initialized()
        if cuda:
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        result = function(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        end_s = start_s + self.factor * (time.perf_counter() - start_s)
        rest_s = end_s - time.perf_counter() - _SPIN_S
        if rest_s > 0:
            time.sleep(rest_s)
        while time.perf_counter() < end_s:
            pass
        return result

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module that computes what `module` does, with its parameters and attributes, as slowly as this device."""
        from torchsurgeon.emulate.slowed import Slowed

        return Slowed(module, self.call)
