"""Memory that messages are read into: aligned for the tensors decoded from it, and used again once it is free."""

from __future__ import annotations

import sys
from typing import Any

import torch

from torchsurgeon.wire.tensors import ALIGNMENT_BYTES


def aligned_buffer(size: int) -> memoryview:
    """Memory for a body that is kept: aligned so that the tensors decoded from it are; its contents are undefined."""
    buffer: memoryview = _array(size).data
    return buffer


class Buffers:
    """Memory for bodies, used again once nothing refers to it any more: the same cut sends the same size again.

    A tensor decoded from a buffer keeps a reference to it, so a buffer in use is never handed out. Not thread-safe.
    """

    def __init__(self, capacity: int = 8, limit_bytes: int = 64 << 20) -> None:
        self._arrays: list[Any] = []
        self._capacity = capacity
        self._limit_bytes = limit_bytes

    def take(self, size: int, before: int = 0) -> memoryview:
        """A buffer of ``before`` and then ``size`` bytes, the latter aligned to 64; its contents are undefined."""
        padding = -before % ALIGNMENT_BYTES
        needed = padding + before + size
        arrays = self._arrays
        for index in range(len(arrays)):
            if arrays[index].nbytes == needed and _references(arrays, index) == _UNUSED:
                return arrays[index].data[padding:]  # type: ignore[no-any-return]
        arrays.insert(0, _array(needed))
        buffer: memoryview = arrays[0].data[padding:]
        while len(arrays) > self._capacity or sum(array.nbytes for array in arrays) > self._limit_bytes:
            arrays.pop()
        return buffer


def _array(size: int) -> Any:
    # torch aligns its memory to 64 bytes and does not clear it, so a page is touched only as data arrives.
    return torch.empty(size, dtype=torch.uint8).numpy()


def _references(items: list[Any], index: int) -> int:
    return sys.getrefcount(items[index])


# What a list's own item counts to, whatever this Python counts.
_UNUSED = _references([object()], 0)
