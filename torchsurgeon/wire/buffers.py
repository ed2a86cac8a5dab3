"""The memory that messages are read into: aligned for the tensors in it, and reused once it is free."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from torchsurgeon.wire.fields import ALIGNMENT_BYTES


def aligned_buffer(size: int) -> memoryview:
    """Return new memory of ``size`` bytes for a body, aligned to 64 bytes. Its contents are undefined."""
    return _aligned(_array(size), size)


class Buffers:
    """A pool of memory for bodies. Not thread-safe.

    A device that keeps its cut sends bodies of one size again and again, so their memory is worth keeping. Every tensor
    decoded from a buffer holds a reference to it, and a buffer is reused only once the pool holds the last reference.

    Args:
        capacity: the most buffers that the pool keeps.
        limit_bytes: the most bytes that the kept buffers have together.
    """

    def __init__(self, capacity: int = 8, limit_bytes: int = 64 << 20) -> None:
        self._arrays: list[Any] = []
        self._capacity = capacity
        self._limit_bytes = limit_bytes

    def take(self, size: int, before: int = 0) -> memoryview:
        """Return a buffer of ``before + size`` bytes whose last ``size`` bytes are aligned to 64.

        Its contents are undefined.

        Args:
            size: bytes of the body.
            before: bytes that are read into the same buffer before the body, such as an HTTP head.
        """
        padding = -before % ALIGNMENT_BYTES
        needed = padding + before + size
        arrays = self._arrays
        for index in range(len(arrays)):
            if arrays[index].nbytes == needed + ALIGNMENT_BYTES and _references(arrays, index) == _UNUSED:
                return _aligned(arrays[index], needed)[padding:]
        arrays.insert(0, _array(needed))
        buffer = _aligned(arrays[0], needed)[padding:]
        while len(arrays) > self._capacity or sum(array.nbytes for array in arrays) > self._limit_bytes:
            arrays.pop()
        return buffer


def _array(size: int) -> Any:
    # numpy does not clear it, so a page is touched only as data arrives.
    return np.empty(size + ALIGNMENT_BYTES, np.uint8)


def _aligned(array: Any, size: int) -> memoryview:
    """Return the aligned part of an array.

    It is no view that NumPy makes: what is made of such a view's memory refers to the whole array, and not to the view,
    so the view's references would not tell whether its memory is in use.
    """
    begin = -array.__array_interface__["data"][0] % ALIGNMENT_BYTES
    buffer: memoryview = array.data[begin : begin + size]
    return buffer


def _references(items: list[Any], index: int) -> int:
    return sys.getrefcount(items[index])


# The reference count of an object that only a list refers to. It is measured, since Python versions count differently.
_UNUSED = _references([object()], 0)
