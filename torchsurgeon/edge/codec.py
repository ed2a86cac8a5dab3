"""Codecs on NumPy arrays: the same bytes as ``torchsurgeon.codec`` makes of tensors, and back."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchsurgeon.codec import packings, pictures, zstd
from torchsurgeon.codec.packings import BITS, DAMAGED, HALVES, LEVELS, NARROWEST, WIDEST, blurs, channel_dim
from torchsurgeon.errors import CodecError, short

Array = np.ndarray[Any, Any]
_MOST_HALF = 65504.0
_MOST_BFLOAT16 = float(np.array(0x7F7F0000, np.uint32).view(np.float32))

NAMES = ("raw", "zstd", *(name + behind for name in packings.PACKINGS for behind in ("", "+zstd")))
"""The codecs that a device without PyTorch has, besides those for pictures and those in a bundle's files."""


def has(name: str) -> bool:
    """Return whether a device without PyTorch has a codec by itself; one for pictures, where Pillow is installed."""
    return name in NAMES or pictures.parse(name) is not None


@dataclass(frozen=True)
class ArrayCodec:
    """One codec; made by ``find_codec()``. Thread-safe.

    Attributes:
        name: the name under which both sides know it.
        packing: how values are stored in fewer bits; None where they are not.
        zstd: whether the bytes are compressed.
        picture: how images are written as pictures; None where they are not.
        fitted: what was fitted to a cut, with its file; None for codecs that suit any.
    """

    name: str
    packing: str | None
    zstd: bool
    picture: pictures.Kind | None = None
    fitted: Any = None

    def encode(self, array: Array, name: str | None = None) -> tuple[str, memoryview]:
        """Return the codec that decodes an array's bytes, and these bytes.

        An array that this codec cannot represent, or would not make smaller, is encoded without loss instead.

        Args:
            array: an array in row-major order.
            name: its name in the graph, which matters to a codec that was fitted to certain tensors.
        """
        if self.picture is not None and _is_image(array.dtype, array.shape):
            _, kind, quality, percent = self.picture
            written = pictures.encode(kind, quality, percent, array)
            if len(written) < array.nbytes:
                return self.name, memoryview(written)
        packing, packed = None, None
        if self.packing is not None and array.size and packs(self.packing, array.dtype):
            packing = packings.usual(self.packing, array.shape)
            packed = pack(packing, array)
        if packed is None or packed.nbytes >= array.nbytes:
            packing, packed = None, array.reshape(-1).view(np.uint8)
        data = packed.data
        if self.zstd:
            frame = zstd.compress(data, integers=packing is None and array.dtype.kind in "biu")
            if len(frame) < len(data):
                return f"{packing}+zstd" if packing else "zstd", memoryview(frame)
        return packing or "raw", data

    def decode(
        self, data: memoryview, dtype: np.dtype[Any], shape: Sequence[int], order: Sequence[int] | None = None
    ) -> Array:
        """Return the array that was encoded, with its dimensions as they lie in memory.

        Args:
            data: the encoded bytes.
            dtype: the array's dtype.
            shape: its shape.
            order: the order of its dimensions in memory, outermost first; None for row-major.

        Raises:
            CodecError: this codec does not produce such bytes from an array of this dtype and shape.
        """
        size = math.prod(shape) * dtype.itemsize
        packing = self.packing
        if packing is not None and (
            0 in shape or not packs(packing, dtype) or packings.usual(packing, shape) != packing
        ):
            raise CodecError(f"{self.name} does not encode {dtype} of shape {list(shape)}; encode it as raw or zstd")
        if self.picture is not None:
            if not _is_image(dtype, shape):
                raise CodecError(
                    f"{self.name} does not encode {dtype} of shape {list(shape)}; encode it as raw or zstd"
                )
            shown = pictures.decode(self.picture.format, self.picture.percent, data, shape)
            return np.ascontiguousarray(shown if order is None else shown.transpose(order))
        stored = size if packing is None else packings.packed_bytes(packing, shape)
        if self.zstd:
            data = memoryview(zstd.decompress(data, stored))
        elif len(data) != stored:
            raise CodecError(f"{self.name} of shape {list(shape)} takes {stored} bytes; got {len(data)} bytes")
        packed = np.array(np.frombuffer(data, np.uint8))
        in_memory = shape if order is None else tuple(shape[dim] for dim in order)
        if packing is not None:
            at = channel_dim(shape)
            return unpack(packing, packed, dtype, in_memory, at if order is None else list(order).index(at))
        if dtype == np.bool_ and size and packed.max() > 1:
            raise CodecError("the bytes of a BOOL tensor must be 0 or 1; got another")
        return packed.view(dtype).reshape(in_memory)


@functools.lru_cache(maxsize=64)
def find_codec(name: str) -> ArrayCodec:
    """Return the codec of this name.

    Raises:
        CodecError: there is no such codec on a device without PyTorch, or its package is missing.
    """
    base, plus, _ = name.partition("+")
    picture = pictures.parse(name)
    if picture is not None:
        if not pictures.available(picture.format):
            raise CodecError(
                f"the codec {name} needs Pillow{', 11.3 or newer' if picture.format == 'avif' else ''}: pip install "
                "pillow, or give another codec as codec="
            )
        return ArrayCodec(picture.name, None, False, picture)
    if name not in NAMES:
        raise CodecError(
            f"a device without PyTorch has the codecs {', '.join(NAMES)}, and for pictures "
            f"{', '.join(pictures.FORMATS)}; got {short(name, 60)}; fitted codecs are those of a bundle"
        )
    compressed = bool(plus) or name == "zstd"
    if compressed and importlib.util.find_spec("zstandard") is None:
        raise CodecError(f"the codec {name} needs the package zstandard: pip install zstandard")
    return ArrayCodec(name, base if base in packings.PACKINGS else None, compressed)


def lossless() -> ArrayCodec:
    """Return the codec for what another cannot encode: compressed, if the package for that is installed."""
    return find_codec("raw" if importlib.util.find_spec("zstandard") is None else "zstd")


def _is_image(dtype: np.dtype[Any], shape: Sequence[int]) -> bool:
    return dtype == np.uint8 and pictures.shows(shape)


def pack(packing: str, array: Array) -> Array | None:
    """Return an array in fewer bits, as bytes; None where it holds values that the packing cannot represent.

    Args:
        packing: one of ``packings.PACKINGS``.
        array: an array of floating-point numbers in row-major order.
    """
    if packing != "int8-channel":
        low, high = float(array.min()), float(array.max())
        if packing in HALVES:
            most = _MOST_HALF if packing == "float16" else _MOST_BFLOAT16
            if not (-most <= low and high <= most):
                return None
            single = array.astype(np.float32, copy=False)
            half = single.astype(np.float16) if packing == "float16" else _to_bfloat16(single)
            return half.reshape(-1).view(np.uint8)
        flat = array.astype(np.float32, copy=False).reshape(-1)
        if flat.dtype != array.dtype:
            low, high = float(flat.min()), float(flat.max())
        # Which zero is the least of both is left to chance, so it is always the positive one.
        low += 0.0
        scale = (high - low) / LEVELS[packing]
        if not packings.describable(low, high) or (array.dtype == np.float64 and blurs(low, high, scale)):
            return None
        codes = _codes(flat, np.float32(low), np.float32(1 / scale if scale else 0.0))
        described = np.array([low, scale], np.float32).view(np.uint8)
        return np.concatenate([described, _nibbles(codes) if BITS[packing] == 4 else codes])
    at = channel_dim(array.shape)
    values = array.astype(np.float32, copy=False).reshape(math.prod(array.shape[:at]), array.shape[at], -1)
    lows, highs = values.min((0, 2)) + np.float32(0.0), values.max((0, 2))
    ranges = highs.astype(np.float64) - lows.astype(np.float64)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(ranges) & ((ranges == 0) | (ranges > NARROWEST)) & (ranges < WIDEST)
    if not known.all():
        return None
    scales = ranges / LEVELS[packing]
    if array.dtype == np.float64 and any(map(blurs, lows.tolist(), highs.tolist(), scales.tolist())):
        return None
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=ranges > 0).astype(np.float32)
    codes = _codes(values, lows[:, None], inverse[:, None])
    return np.concatenate([lows.view(np.uint8), scales.astype(np.float32).view(np.uint8), codes.reshape(-1)])


def unpack(packing: str, data: Array, dtype: np.dtype[Any], shape: Sequence[int], at: int) -> Array:
    """Return the array that ``pack()`` packed.

    Args:
        packing: one of ``packings.PACKINGS``.
        data: the packed bytes, as many as ``packings.packed_bytes()`` says.
        dtype: the array's dtype.
        shape: its shape, in the order in which it lies in memory.
        at: the dimension of channels, counted in the same order.

    Raises:
        CodecError: a low or a scale is not one that ``pack()`` writes.
    """
    if packing == "float16":
        return data.view(np.float16).astype(dtype).reshape(shape)
    if packing == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(dtype).reshape(shape)
    count = math.prod(shape)
    if packing == "int8-channel":
        channels = shape[at]
        lows, scales = data[: 8 * channels].copy().view(np.float32).reshape(2, channels)
        if not (np.isfinite(lows) & (scales >= 0) & (scales < WIDEST)).all():
            raise CodecError(DAMAGED)
        spread = [channels if dim == at else 1 for dim in range(len(shape))]
        values = data[8 * channels :].reshape(shape).astype(np.float32)
        values *= scales.reshape(spread)
        values += lows.reshape(spread)
        return values.astype(dtype, copy=False)
    low, scale = data[:8].copy().view(np.float32)
    if not (math.isfinite(low) and 0 <= scale < WIDEST):
        raise CodecError(DAMAGED)
    codes = data[8:]
    if packing == "int4":
        codes = np.concatenate([codes & 15, codes >> 4])[:count]
    values = codes.astype(np.float32)
    values *= scale
    values += low
    return values.astype(dtype, copy=False).reshape(shape)


def packs(packing: str, dtype: np.dtype[Any]) -> bool:
    """Return whether arrays of a dtype take fewer bytes by a packing."""
    return dtype.kind == "f" and dtype.itemsize > (2 if packing in HALVES else 1)


def _to_bfloat16(values: Array) -> Array:
    """Round finite values to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _codes(values: Array, low: Any, inverse: Any) -> Array:
    found: Array = values - low
    found *= inverse
    found += np.float32(0.5)
    return found.astype(np.uint8)


def _nibbles(codes: Array) -> Array:
    half = (len(codes) + 1) // 2
    lower, upper = codes[:half].copy(), codes[half:]
    lower[: len(upper)] |= upper << 4
    return lower
