"""Keep freed memory in the process, instead of handing it back to the kernel after every inference.

glibc gives large freed blocks back to the system, or not, by a threshold that moves with what was freed before. Where
it does, every run pays page faults for layers' outputs, and whether it does depends on the model and on what the
process did before (``benchmarks/allocator.py`` compares). With the memory kept, runs can be compared. See mallopt(3).
"""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_TRIM_THRESHOLD_BYTES, _TOP_PAD_BYTES = 1 << 30, 16 << 20
# The first that the C library accepts.
_MMAP_THRESHOLDS_BYTES = (1 << 30, 32 << 20)


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep up to a gibibyte of freed memory, for the process's whole life. Returns False where the C
    library is another one."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    kept = [mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES), mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)]
    return kept == [1, 1] and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_THRESHOLDS_BYTES)
