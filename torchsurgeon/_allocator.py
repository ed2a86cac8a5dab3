"""Keep freed memory in the process, instead of returning it to the kernel after every inference.

glibc decides whether to return a large freed block by a threshold that moves with what was freed before. Where it
returns blocks, every run pays for page faults at its layers' outputs. Whether it does depends on the model and on what
the process did before (``benchmarks/allocator.py`` compares the two). With the memory kept, runs are comparable. See
mallopt(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_TRIM_THRESHOLD_BYTES, _TOP_PAD_BYTES = 1 << 30, 16 << 20
# The first of these that the C library accepts is set.
_MMAP_THRESHOLDS_BYTES = (1 << 30, 32 << 20)


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep up to 1 GiB of freed memory for the rest of the process's life.

    Returns:
        Whether it does; False where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    kept = [mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES), mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)]
    return kept == [1, 1] and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_THRESHOLDS_BYTES)


def give_freed_memory_back() -> None:
    """Give back to the system what the C library keeps of freed memory, where it is glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
