"""An emulated device that is slower than this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torchsurgeon.errors import DeviceError, is_finite

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")

_SPIN_S = 3e-4


class SlowDevice:
    """A device that is ``factor`` times slower than this machine: every call takes ``factor`` times as long.

    Args:
        factor: 1 or more.

    Raises:
        DeviceError: the factor is below 1 or not finite.
    """

    def __init__(self, factor: float) -> None:
        if not (is_finite(factor) and factor >= 1):
            raise DeviceError(f"the factor of a slow device must be 1 or more, and finite; got {factor}")
        self.factor = factor

    def call(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
        """Call a function, and return its result after ``factor`` times the time that it took.

        CUDA work that the function launches is waited for, and counts.

        Args:
            function: the function.
            *args: passed on to it.
            **kwargs: passed on to it.
        """
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
        # The last moment is spent in a loop, since a sleep may end late.
        while time.perf_counter() < end_s:
            pass
        return result

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module that computes what ``module`` computes, as slowly as this device.

        It has the parameters and the attributes of ``module``.
        """
        from torchsurgeon.emulate.slowed import Slowed

        return Slowed(module, self.call)
