"""Zstandard frames with checksum and content size, and decompressing such frames from an untrusted sender.

A frame declares how many bytes it holds. A frame that declares the wrong number is refused before anything is
allocated, and decompressing one that holds more than it declares stops at that number. Format: RFC 8878.
"""

from __future__ import annotations

import threading
from types import ModuleType

from torchsurgeon.errors import CodecError, short

# Higher levels take longer. They make pixels smaller, but hardly floats and packed values.
_LEVEL, _LEVEL_OF_INTEGERS = 1, 3


class _Contexts:
    """Compressors and a decompressor of one thread, since two threads may not use one at the same time."""

    def __init__(self) -> None:
        self.zstandard = _zstandard()
        self.compressors = {
            level: self.zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
            for level in (_LEVEL, _LEVEL_OF_INTEGERS)
        }
        self.decompressor = self.zstandard.ZstdDecompressor()


_threads = threading.local()


def _contexts() -> _Contexts:
    found: _Contexts | None = getattr(_threads, "contexts", None)
    if found is None:
        found = _threads.contexts = _Contexts()
    return found


def _zstandard() -> ModuleType:
    """Return the package, which is imported at first use, so that tensors can be sent uncompressed without it."""
    try:
        import zstandard
    except ImportError as error:
        raise CodecError("the codec zstd needs the package zstandard: pip install zstandard") from error
    return zstandard


def compress(data: memoryview, *, integers: bool) -> bytes:
    """Return ``data`` as one Zstandard frame.

    Args:
        data: the bytes.
        integers: whether they are the integers of a model's own tensor, such as pixels. They are compressed with
            level 3, everything else with level 1.
    """
    compressed: bytes = _contexts().compressors[_LEVEL_OF_INTEGERS if integers else _LEVEL].compress(data)
    return compressed


def decompress(frame: memoryview, size: int) -> bytes:
    """Return the content of ``frame``.

    Args:
        frame: exactly one frame, with a checksum.
        size: how many bytes it has to hold. Nothing is allocated before this was compared with what it declares.

    Raises:
        CodecError: the frame is damaged, has no checksum, holds another number of bytes, or is not the only content.
    """
    contexts = _contexts()
    try:
        parameters = contexts.zstandard.get_frame_parameters(frame)
        if parameters.content_size != size:
            raise CodecError(
                f"its shape takes {size} bytes; got a zstd frame that declares {parameters.content_size} bytes"
            )
        if not parameters.has_checksum or parameters.window_size > max(size, 1024):
            raise CodecError(
                "its zstd frame must have a checksum, and a window no larger than its content; got has_checksum "
                f"{parameters.has_checksum} and a window of {parameters.window_size} bytes"
            )
        content: bytes = contexts.decompressor.decompress(frame, allow_extra_data=False)
        return content
    except contexts.zstandard.ZstdError as error:
        raise CodecError(f"its zstd frame is damaged: {short(error)}") from None
