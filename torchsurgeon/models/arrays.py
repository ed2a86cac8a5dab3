"""The bytes of NumPy arrays and byte arrays that a model's code reads, which change without another object."""

from __future__ import annotations

import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from torchsurgeon.tracing.reading import Part

# So many bytes are copied and compared at every call. Larger arrays are compared by their place only.
_MOST_BYTES = 64 << 10


class Arrays:
    """The contents of arrays when this is made.

    Args:
        parts: what a model reads.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts: list[Part] = []
        room = _MOST_BYTES
        for part in parts:
            size = _size_bytes(part.value)
            if size is not None and size <= room:
                room -= size
                self._parts.append(part)
        self._arrays = [part.value for part in self._parts]
        self._contents = list(map(_contents, self._arrays))

    def same(self) -> bool:
        """Return whether all contents are the same. It is called at every inference."""
        return not self._arrays or list(map(_contents, self._arrays)) == self._contents

    def changed(self) -> str | None:
        """Return where an array with other contents is; None for nowhere."""
        pairs = zip(self._parts, self._contents, strict=True)
        return next((part.path for part, was in pairs if _contents(part.value) != was), None)


def _size_bytes(value: Any) -> int | None:
    """Return the bytes of an array; None for what is no array of plain numbers."""
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else value.nbytes
    if isinstance(value, array.array):
        return len(value) * value.itemsize
    return len(value) if isinstance(value, bytearray) else None


def _contents(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytearray) else value.tobytes()
