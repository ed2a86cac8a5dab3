"""Keep freed memory in a serving process, instead of handing it back to the kernel after every request.

glibc maps each large block anew and returns it when freed, so every request pays a page fault for every 4 KiB of its
body and of each layer's output.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = 512 << 20
_TOP_PAD_BYTES = 16 << 20


def retain_freed_memory() -> bool:
    """Tell glibc to keep freed memory, for the whole process. Returns False where the C library is another one."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = {
        _M_MMAP_THRESHOLD: _MMAP_THRESHOLD_BYTES,
        _M_TRIM_THRESHOLD: _TRIM_THRESHOLD_BYTES,
        _M_TOP_PAD: _TOP_PAD_BYTES,
    }
    accepted = [mallopt(option, value) for option, value in settings.items()]
    return accepted == [1] * len(settings)
