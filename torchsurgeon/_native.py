"""The compiled extension ``torchsurgeon._C``: loaded at its first use, with errors that say what is missing.

Importing this module does not load it. Only tracing CUDA kernels, fast int8 codecs and the entropy coder need it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchsurgeon.errors import NativeUnavailableError

_NOT_BUILT = "install a C++ compiler and PyTorch, then install torchsurgeon again with --no-build-isolation"

# The operators that open a library return these, 0, or one of the library's own positive error codes (csrc/library.h).
_NOT_FOUND, _TOO_OLD = -1, -2


@functools.cache
def _load() -> tuple[Any, str]:
    """Return the extension's operators and "", or None and why they are missing."""
    try:
        import torch
    except ModuleNotFoundError:
        return None, "PyTorch is not installed"
    try:
        importlib.import_module("torchsurgeon._C")
    except ModuleNotFoundError:
        return None, f"the extension torchsurgeon._C is not built; {_NOT_BUILT}"
    except ImportError as error:
        return None, f"the extension torchsurgeon._C does not load under PyTorch {torch.__version__}: {error}"
    return torch.ops.torchsurgeon, ""


def available() -> bool:
    """Return whether the compiled extension is built and loads."""
    return _load()[0] is not None


def operators(purpose: str) -> Any:
    """Return the extension's operators, ``torch.ops.torchsurgeon``.

    Args:
        purpose: what they are for, which the error names, such as "tracing CUDA kernels".

    Raises:
        NativeUnavailableError: the extension is not built or does not load.
    """
    operators, why = _load()
    if operators is None:
        raise NativeUnavailableError(f"{purpose} needs the compiled extension: {why}")
    return operators


@functools.cache
def clock() -> Callable[[], int]:
    """Return the function that reads the monotonic clock in nanoseconds, and warn once where the extension is missing.

    It is Python's ``perf_counter_ns``, the cheapest way to read that clock from Python. The extension reads the same
    clock for the spans that it records.
    """
    if not available():
        warnings.warn(
            f"torchsurgeon uses Python's clock and cannot trace CUDA kernels: {_load()[1]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return time.perf_counter_ns


def open_cuda_driver(purpose: str) -> Any:
    """Return the operators, after opening and initializing the CUDA driver, ``libcuda.so.1``.

    Args:
        purpose: what they are for, which the error names.

    Raises:
        NativeUnavailableError: the extension, the driver or a CUDA device is missing.
    """
    ops = operators(purpose)
    code = ops.cuda_driver_open()
    if code == 0:
        return ops
    if code == _NOT_FOUND:
        raise NativeUnavailableError(
            f"{purpose} needs an NVIDIA driver: libcuda.so.1 is not on this machine; install it, or profile the CPU"
        )
    if code == _TOO_OLD:
        raise NativeUnavailableError(f"{purpose} needs a newer NVIDIA driver: libcuda.so.1 lacks an event function")
    raise NativeUnavailableError(
        f"{purpose} needs a CUDA device: cuInit answered {ops.cuda_error_name(code) or 'an unknown error'} ({code}); "
        "check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it"
    )


def open_cupti(purpose: str) -> Any:
    """Return the operators, after opening the CUDA driver and then CUPTI.

    CUPTI is the copy that PyTorch has loaded, or else one that pip or CUDA installed.

    Args:
        purpose: what they are for, which the error names.

    Raises:
        NativeUnavailableError: the extension, the driver, a CUDA device or CUPTI is missing.
    """
    ops = open_cuda_driver(purpose)
    tried = []
    for path, loaded_only in _cupti_candidates():
        code = ops.cupti_open(path, loaded_only)
        if code == 0:
            return ops
        if code == _TOO_OLD:
            raise NativeUnavailableError(f"{purpose} needs a newer CUPTI: {path} lacks an activity function")
        tried.append(path)
    raise NativeUnavailableError(
        f"{purpose} needs CUPTI, and none of {', '.join(tried)} opens; pip install the nvidia-cuda-cupti package of "
        "PyTorch's CUDA version, or on a Jetson apt-get install cuda-cupti"
    )


def _cupti_candidates() -> list[tuple[str, bool]]:
    import torch

    major = (torch.version.cuda or "13").partition(".")[0]
    mapped = [(path, True) for path in _mapped_libraries("libcupti.so")]
    installed = [
        (str(path), False) for folder in _nvidia_folders() for path in sorted(folder.glob("*/lib/libcupti.so.*"))
    ]
    toolkit = Path("/usr/local/cuda/extras/CUPTI/lib64/libcupti.so")
    return [*mapped, *installed, (f"libcupti.so.{major}", False), (str(toolkit), False)]


def _mapped_libraries(name: str) -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({path for line in lines if name in (path := line.partition("/")[1] + line.partition("/")[2])})


def _nvidia_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    locations = spec.submodule_search_locations if spec is not None else None
    return [Path(location) for location in locations or []]
