"""Zstandard frames with checksum and content size, and how they are opened without trusting them.

A frame says how many bytes it holds, so one that lies is refused before anything is allocated, and one that holds more
than it says stops at that number. Format: RFC 8878.
"""

from __future__ import annotations

import threading

import numpy
import torch
from torch import Tensor

from torchsurgeon.errors import CodecError

# Higher levels give boundary tensors nothing more and take longer.
_LEVEL = 1


class _Contexts(threading.local):
    """A compressor and a decompressor a thread: neither may be used by two at once."""

    def __init__(self) -> None:
        # Imported at first use: whoever sends tensors as they are needs no zstandard.
        import zstandard

        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(data: memoryview) -> bytes:
    """Return ``data`` as one Zstandard frame."""
    return _contexts.compressor.compress(data)


def decompress(frame: memoryview, size: int) -> Tensor:
    """Return the ``size`` bytes in ``frame`` as a ``uint8`` tensor of shape (size,).

    Raises :class:`~torchsurgeon.wire.CodecError` for anything but one undamaged frame with a checksum that holds just
    as many; nothing of the size it claims is allocated before that has been compared.
    """
    import zstandard

    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != size:
            raise CodecError(f"its zstd frame declares other than the {size} bytes that its shape takes")
        if not parameters.has_checksum or parameters.window_size > max(size, 1024):
            raise CodecError("its zstd frame has no checksum, or asks for more memory than its content takes")
        content = _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"its zstd frame is damaged: {error}") from None
    data = torch.empty(size, dtype=torch.uint8)
    data.numpy()[:] = numpy.frombuffer(content, numpy.uint8)
    return data
