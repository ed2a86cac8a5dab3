"""The settings of PyTorch that are in force around a call: autocast, attention kernels, precision, gradients.

A model may change them for a part of its forward, as ``with torch.autocast(…)`` does. A step that was recorded under
other settings than the model was called under runs under these settings again, on whichever side it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.backends import cuda

# Each setting: how it is read, and how it is set.
_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _autocast(kind: str) -> dict[str, _Setting]:
    return {
        f"autocast on {kind}": (
            lambda: torch.is_autocast_enabled(kind),
            lambda on: torch.set_autocast_enabled(kind, on),
        ),
        f"autocast on {kind} to": (
            lambda: torch.get_autocast_dtype(kind),
            lambda dtype: torch.set_autocast_dtype(kind, dtype),
        ),
    }


def _order() -> Any:
    return tuple(torch._C._get_sdp_priority_order())


def _set_order(order: Any) -> None:
    torch._C._set_sdp_priority_order(list(order))


_SETTINGS: dict[str, _Setting] = {
    **_autocast("cpu"),
    **_autocast("cuda"),
    "autocast cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "gradients": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "flash attention": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "memory-efficient attention": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "attention by products": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    "cuDNN attention": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    "order of attention kernels": (_order, _set_order),
    "oneDNN": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "cuDNN": (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    "cuDNN benchmark": (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    "cuDNN deterministic": (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    "precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch._C._set_deterministic_algorithms,
    ),
}
_READERS = tuple(read for read, _ in _SETTINGS.values())

Settings = tuple[Any, ...]


def settings() -> Settings:
    """Return all settings as they are now."""
    return tuple([read() for read in _READERS])


class Ambient:
    """Settings that a step needs although they are not in force when the model is called.

    Attributes:
        changed: by name, what each has to be; a tuple of pairs.
        autocasts: whether autocast is on for a device type where it was off, or off where it was on.
    """

    def __init__(self, before: Settings, now: Settings) -> None:
        names = list(_SETTINGS)
        pairs = zip(names, before, now, strict=True)
        self.changed = tuple((name, new) for name, old, new in pairs if old != new)
        self.autocasts = any(name.startswith("autocast on ") for name, _ in self.changed)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Have these settings in force inside the block."""
        before = [(name, _SETTINGS[name][0]()) for name, _ in self.changed]
        try:
            for name, value in self.changed:
                _SETTINGS[name][1](value)
            yield
        finally:
            for name, value in before:
                _SETTINGS[name][1](value)
            if self.autocasts and not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                # Autocast keeps the weights that it has cast until its outermost block ends.
                torch.clear_autocast_cache()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that makes a call under these settings."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.restored():
                return call(*args, **kwargs)

        return inside

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.changed)
