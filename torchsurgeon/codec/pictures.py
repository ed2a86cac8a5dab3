"""Arrays of ``uint8`` images encoded as JPEG, WebP, AVIF or PNG with Pillow, at their own size or at a smaller one.

A batch is encoded as one picture after the other, each preceded by its length in bytes (four bytes, little endian).
A picture of a smaller size is scaled down before it is encoded and up again behind its decoder, so the model gets
images of the size that it takes.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from torchsurgeon.codec import avif
from torchsurgeon.errors import CodecError, short


class Format(NamedTuple):
    """A way to write pictures.

    Attributes:
        pillow: Pillow's name of the file format.
        quality: the usual quality, from 1 to 100; None where there is none to choose, because nothing is lost.
        options: what else Pillow is told when it writes a picture.
    """

    pillow: str
    quality: int | None
    options: Mapping[str, Any]


FORMATS = {
    "png": Format("png", None, {}),
    "jpeg": Format("jpeg", 90, {"subsampling": "4:2:0", "optimize": True}),
    "jpeg444": Format("jpeg", 90, {"subsampling": "4:4:4", "optimize": True}),
    "webp": Format("webp", 80, {}),
    # Method 0 takes 2 ms for a picture of 224×224 where the usual one takes 110, and a fifth more bytes.
    "webp-lossless": Format("webp", None, {"lossless": True, "quality": 20, "method": 0}),
    # Speed 8 takes much less time than Pillow's own choice, 6, for a few more bytes.
    "avif": Format("avif", 75, {"speed": 8, "max_threads": 1}),
}

_LENGTH_BYTES = 4
# All formats hold pictures up to this size, and Pillow opens them without warning of a decompression bomb.
_MAX_SIDE, _MAX_PIXELS = 16383, 1 << 26


@functools.cache
def available(kind: str) -> bool:
    """Return whether this process can write and read a format, a key of ``FORMATS``: AVIF came with Pillow 11.3."""
    if importlib.util.find_spec("PIL") is None:
        return False
    from PIL import features

    pillow = FORMATS[kind].pillow
    return pillow not in ("webp", "avif") or bool(features.check(pillow))


class Kind(NamedTuple):
    """What the name of a picture codec says.

    Attributes:
        name: the codec's name, the same for all ways to write it.
        format: a key of ``FORMATS``.
        quality: from 1 to 100; None for a format without.
        percent: the pictures' width and height, in percent of the images'.
    """

    name: str
    format: str
    quality: int | None
    percent: int


# A format, perhaps a quality, and perhaps a scale of one or two decimals.
_NAME = re.compile(r"(?P<kind>webp-lossless|[a-z0-9]+)(-(?P<quality>[0-9]{1,3}))?(@0\.(?P<scale>[0-9]{1,2}))?")


def parse(name: str) -> Kind | None:
    """Return what the name of a picture codec says, such as ``jpeg-90`` or ``webp-80@0.5``; None for other names."""
    found = _NAME.fullmatch(name)
    if found is None or found["kind"] not in FORMATS:
        return None
    kind, usual = found["kind"], FORMATS[found["kind"]].quality
    quality = usual if found["quality"] is None else int(found["quality"])
    percent = 100 if found["scale"] is None else int(found["scale"].ljust(2, "0"))
    if not percent or (quality is not None and (usual is None or not 1 <= quality <= 100)):
        return None
    full = (kind if quality is None else f"{kind}-{quality}") + ("" if percent == 100 else f"@{percent / 100:g}")
    return Kind(full, kind, quality, percent)


def shows(shape: Sequence[int]) -> bool:
    """Return whether ``uint8`` values of a shape are pictures: (C, H, W) or (N, C, H, W) with C of 1 or 3."""
    if len(shape) not in (3, 4) or shape[-3] not in (1, 3) or shape[0] == 0:
        return False
    return all(1 <= side <= _MAX_SIDE for side in shape[-2:]) and math.prod(shape[-2:]) <= _MAX_PIXELS


def encode(kind: str, quality: int | None, percent: int, images: NDArray[numpy.uint8]) -> bytes:
    """Return images (C, H, W) or (N, C, H, W) as pictures.

    Args:
        kind: the format, a key of ``FORMATS``.
        quality: from 1 to 100; None for a format without.
        percent: the pictures' width and height, in percent of the images'.
        images: the images.
    """
    from PIL import Image

    written_as = FORMATS[kind]
    options = {**written_as.options} if quality is None else {**written_as.options, "quality": quality}
    height, width = (_scaled(side, percent) for side in images.shape[-2:])
    pictures = []
    for pixels in images.reshape(-1, *images.shape[-3:]):
        array = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        image = Image.fromarray(numpy.ascontiguousarray(array))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        image.save(written, written_as.pillow, **options)
        pictures.append(avif.unwrap(written.getvalue()) if written_as.pillow == "avif" else written.getvalue())
    return b"".join(part for one in pictures for part in (len(one).to_bytes(_LENGTH_BYTES, "little"), one))


def decode(kind: str, percent: int, data: memoryview, shape: Sequence[int]) -> NDArray[numpy.uint8]:
    """Return the images that ``encode()`` made pictures of.

    A picture is decompressed only after its size was compared with the shape.

    Args:
        kind: the format.
        percent: the pictures' width and height, in percent of the images'.
        data: the pictures.
        shape: the images' shape.

    Raises:
        CodecError: the pictures are damaged, or their size, format or number is not that of the shape.
    """
    *_, channels, height, width = shape
    result = numpy.empty((math.prod(shape[:-3]), height, width, channels), numpy.uint8)
    offset = 0
    for pixels in result:
        length = int.from_bytes(data[offset : offset + _LENGTH_BYTES], "little")
        offset += _LENGTH_BYTES
        image = _picture(kind, bytes(data[offset : offset + length]), channels, percent, height, width)
        pixels[:] = image.reshape(height, width, channels)
        offset += length
    if offset != len(data):
        raise CodecError(f"its {kind} pictures end after {offset} bytes; got {len(data)} bytes")
    return result.transpose(0, 3, 1, 2).reshape(tuple(shape))


def _scaled(side: int, percent: int) -> int:
    """Return the side of a picture; in whole numbers, so that both sides come to the same."""
    return max(1, (side * percent + 50) // 100)


def _picture(kind: str, data: bytes, channels: int, percent: int, height: int, width: int) -> Any:
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    pillow = FORMATS[kind].pillow
    size = _scaled(width, percent), _scaled(height, percent)
    try:
        if pillow == "avif":
            data = avif.wrap(data, channels, size[1], size[0])
        with Image.open(io.BytesIO(data), formats=[pillow]) as image:
            # WebP has no grey mode: a picture of one channel comes back as RGB.
            if image.size != size or image.mode not in (mode, "RGB" if pillow == "webp" else mode):
                raise CodecError(
                    f"its shape needs a {pillow} picture in {mode} of {size[0]}×{size[1]}; got {image.mode} of "
                    f"{image.size[0]}×{image.size[1]}"
                )
            pixels = image.convert(mode)
            return numpy.asarray(pixels if percent == 100 else pixels.resize((width, height), Image.Resampling.BICUBIC))
    except CodecError:
        raise
    except Exception as error:
        # Pillow does not document which errors a damaged file raises, so all of them are caught.
        raise CodecError(f"its {pillow} picture is damaged: {short(error)}") from None
