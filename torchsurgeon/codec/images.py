"""``uint8`` images encoded as JPEG, WebP or PNG with Pillow.

A batch is encoded as one picture after the other, each preceded by its length in bytes (four bytes, little endian).
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from torchsurgeon.errors import CodecError, short

QUALITIES: dict[str, int | None] = {"jpeg": 90, "webp": 80, "png": None}

_LENGTH_BYTES = 4
# All three formats hold pictures up to this size, and Pillow opens them without warning of a decompression bomb.
_MAX_SIDE, _MAX_PIXELS = 16383, 1 << 26


def available() -> bool:
    """Return whether Pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def is_image(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Return whether a tensor can be encoded as pictures: ``uint8``, (C, H, W) or (N, C, H, W) with C of 1 or 3."""
    if dtype != torch.uint8 or len(shape) not in (3, 4) or shape[-3] not in (1, 3) or shape[0] == 0:
        return False
    return all(1 <= side <= _MAX_SIDE for side in shape[-2:]) and math.prod(shape[-2:]) <= _MAX_PIXELS


def encode(kind: str, quality: int | None, tensor: Tensor) -> bytes:
    """Return an image tensor (C, H, W) or (N, C, H, W) as pictures.

    Args:
        kind: the format, a key of ``QUALITIES``.
        quality: from 1 to 100; None for a format without.
        tensor: the images, ``uint8``.
    """
    from PIL import Image

    options: dict[str, Any] = {} if quality is None else {"quality": quality}
    pictures = []
    for pixels in tensor.detach().cpu().reshape(-1, *tensor.shape[-3:]):
        array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        written = io.BytesIO()
        Image.fromarray(array.contiguous().numpy()).save(written, kind, **options)
        pictures.append(written.getvalue())
    return b"".join(part for one in pictures for part in (len(one).to_bytes(_LENGTH_BYTES, "little"), one))


def decode(kind: str, data: memoryview, shape: Sequence[int]) -> Tensor:
    """Return the ``uint8`` tensor that ``encode()`` made pictures of.

    A picture is decompressed only after its size was compared with the shape.

    Args:
        kind: the format.
        data: the pictures.
        shape: the tensor's shape.

    Raises:
        CodecError: the pictures are damaged, or their size, format or number is not that of the shape.
    """
    *_, channels, height, width = shape
    result = torch.empty((math.prod(shape[:-3]), height, width, channels), dtype=torch.uint8)
    offset = 0
    for pixels in result:
        length = int.from_bytes(data[offset : offset + _LENGTH_BYTES], "little")
        offset += _LENGTH_BYTES
        pixels.numpy()[:] = _picture(kind, bytes(data[offset : offset + length]), channels, height, width)
        offset += length
    if offset != len(data):
        raise CodecError(f"its {kind} pictures end after {offset} bytes; got {len(data)} bytes")
    return result.permute(0, 3, 1, 2).reshape(tuple(shape))


def _picture(kind: str, data: bytes, channels: int, height: int, width: int) -> Any:
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            # WebP has no grey mode: a picture of one channel comes back as RGB.
            if image.size != (width, height) or image.mode not in (mode, "RGB" if kind == "webp" else mode):
                raise CodecError(
                    f"its shape needs a {kind} picture in {mode} of {width}×{height}; got {image.mode} of "
                    f"{image.size[0]}×{image.size[1]}"
                )
            return numpy.asarray(image.convert(mode)).reshape(height, width, channels)
    except CodecError:
        raise
    except Exception as error:
        # Pillow does not document which errors a damaged file raises, so all of them are caught.
        raise CodecError(f"its {kind} picture is damaged: {short(error)}") from None
