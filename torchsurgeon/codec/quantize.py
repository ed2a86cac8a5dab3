"""Packing floating-point tensors into fewer bits and unpacking them, on the device that they are on.

On the CPU, ``int8`` and ``int4`` are done by the compiled extension in one pass over memory, if it is built.

A packed tensor is a sequence of bytes. ``float16`` and ``bfloat16`` are the values in that dtype. The others begin with
a ``low`` and a ``scale`` (float32) and then hold the values ``q``, from 0 to 255 or from 0 to 15, of which each stands
for ``low + scale * q``. Low and scale map the tensor's range evenly, so a value is at most half a ``scale`` from what
it was, apart from float32's own rounding, and the smallest value (0 after a ReLU) is exact. ``int8-channel`` has a low
and a scale for each channel: first all lows, then all scales. ``int4`` packs two values in a byte: the first half of
the values in the lower four bits, the second half in the upper four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchsurgeon import _native
from torchsurgeon.codec.packings import (
    BITS,
    DAMAGED,
    LEVELS,
    NARROWEST,
    WIDEST,
    blurs,
    describable,
    packed_bytes,
)
from torchsurgeon.errors import CodecError

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# The dtypes whose values are packed. Those of float8 have no more bits than a packing would leave them.
# So many values are unpacked at a time where they do not become float32: they fit into a processor's cache.
_PIECE = 1 << 16
_PACKED = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def packs(packing: str, dtype: torch.dtype) -> bool:
    """Return whether ``packing`` applies to ``dtype`` and makes it smaller."""
    half = _HALVES.get(packing)
    return dtype in _PACKED and dtype.itemsize > (half.itemsize if half else 1)


def pack(packing: str, tensor: Tensor, channels_at: int) -> Tensor | None:
    """Return ``tensor`` packed, as a ``uint8`` tensor on its device; None where it cannot be packed.

    A tensor cannot be packed if it holds NaN or infinity, a value beyond the range of ``float16``, or values whose
    range float32 does not represent, such as values of float64 that lie close together far from zero.

    Args:
        packing: one of ``PACKINGS``.
        tensor: a contiguous tensor.
        channels_at: the dimension of channels, counted in the order in which ``tensor`` lies in memory.
    """
    if packing != "int8-channel":
        low, high = torch.stack(torch.aminmax(tensor)).tolist()
        if packing in _HALVES:
            kind = _HALVES[packing]
            finite = -torch.finfo(kind).max <= low and high <= torch.finfo(kind).max
            return as_bytes(tensor.to(kind)) if finite else None
        values = tensor.to(torch.float32).reshape(-1)
        if values.dtype != tensor.dtype:
            low, high = torch.stack(torch.aminmax(values)).tolist()
        # Which zero is the least of both is left to chance, so it is always the positive one.
        low += 0.0
        scale = (high - low) / LEVELS[packing]
        if not describable(low, high) or (tensor.dtype == torch.float64 and blurs(low, high, scale)):
            return None
        inverse = 1 / scale if scale else 0.0
        described = torch.tensor([low, scale], dtype=torch.float32)
        if values.is_cpu and _native.available():
            packed = torch.empty(packed_bytes(packing, values.shape), dtype=torch.uint8)
            packed[:8] = described.view(torch.uint8)
            torch.ops.torchsurgeon.quantize(values, low, inverse, BITS[packing], packed[8:])
            return packed
        codes = _codes(values, low, inverse)
        described = described.to(tensor.device, non_blocking=True).view(torch.uint8)
        return torch.cat([described, _nibbles(codes) if packing == "int4" else codes])
    values = tensor.to(torch.float32).flatten(0, channels_at - 1) if channels_at else tensor.to(torch.float32)[None]
    values = values.flatten(2) if values.dim() > 2 else values[..., None]
    lows, highs = values.amin((0, 2)) + 0.0, values.amax((0, 2))
    ranges = highs.double() - lows.double()
    if not bool((torch.isfinite(ranges) & ((ranges == 0) | (ranges > NARROWEST)) & (ranges < WIDEST)).all()):
        return None
    scales = ranges / LEVELS[packing]
    if tensor.dtype == torch.float64 and any(map(blurs, lows.tolist(), highs.tolist(), scales.tolist())):
        return None
    inverse = torch.where(ranges > 0, 1 / scales, 0).float()
    codes = _codes(values, lows[:, None], inverse[:, None])
    return torch.cat([torch.cat([lows, scales.float()]).view(torch.uint8), codes.reshape(-1)])


def unpack(packing: str, data: Tensor, dtype: torch.dtype, shape: Sequence[int], channels_at: int) -> Tensor:
    """Return the contiguous tensor that ``pack()`` packed.

    Args:
        packing: one of ``PACKINGS``.
        data: the packed bytes, as many as ``packed_bytes()`` says.
        dtype: the tensor's dtype.
        shape: the tensor's shape, in the order in which it lies in memory.
        channels_at: the dimension of channels, counted in the same order.

    Raises:
        CodecError: a low or a scale is not one that ``pack()`` writes.
    """
    if packing in _HALVES:
        return data.view(_HALVES[packing]).to(dtype).reshape(shape)
    count = math.prod(shape)
    if packing == "int8-channel":
        channels = shape[channels_at]
        lows, scales = data[: 8 * channels].clone().view(torch.float32).view(2, channels)
        if not bool((torch.isfinite(lows) & (scales >= 0) & (scales < WIDEST)).all()):
            raise CodecError(DAMAGED)
        return _by_channels(data[8 * channels :].reshape(shape), lows, scales, channels_at, dtype)
    low, scale = data[:8].clone().view(torch.float32).tolist()
    if not (math.isfinite(low) and 0 <= scale < WIDEST):
        raise CodecError(DAMAGED)
    codes, bits = data[8:], BITS[packing]
    if dtype == torch.float32:
        return _values(codes, low, scale, bits)[:count].reshape(shape)
    # Piece by piece, so that there is never another tensor of float32 beside the one of half its bytes.
    result = torch.empty(count, dtype=dtype, device=codes.device)
    step = _PIECE if codes.is_cpu else max(len(codes), 1)
    for begin in range(0, len(codes), step):
        piece = codes[begin : begin + step]
        values, size, upper = _values(piece, low, scale, bits), len(piece), len(codes) + begin
        result[begin : begin + size] = values[:size]
        if bits == 4:
            result[upper : upper + size] = values[size : size + count - upper]
    return result.reshape(shape)


def _values(codes: Tensor, low: float, scale: float, bits: int) -> Tensor:
    """Return what codes stand for, in float32: of codes in four bits first those in the lower, then the upper four."""
    if codes.is_cpu and _native.available():
        values = torch.empty(len(codes) * 8 // bits)
        torch.ops.torchsurgeon.dequantize(codes, low, scale, bits, values)
        return values
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4])
    return torch.add(torch.tensor(low, device=codes.device), codes, alpha=scale)


def _by_channels(codes: Tensor, lows: Tensor, scales: Tensor, channels_at: int, dtype: torch.dtype) -> Tensor:
    """Return what codes stand for whose channels each have a low and a scale."""
    channels, shape = len(lows), codes.shape
    result = torch.empty(shape, dtype=dtype, device=codes.device)
    if not result.numel():
        return result
    inner, step = math.prod(shape[channels_at + 1 :]), _PIECE if codes.is_cpu else result.numel()
    into, codes = result.view(-1, channels, inner), codes.reshape(-1, channels, inner)
    # Pieces of some samples, or where one sample is large, of some channels of it.
    samples, some = max(step // (channels * inner), 1), max(step // inner, 1)
    for begin in range(0, len(codes), samples):
        for first in range(0, channels, some):
            at = slice(begin, begin + samples), slice(first, first + some)
            values = codes[at].to(torch.float32).mul_(scales[at[1], None]).add_(lows[at[1], None])
            into[at] = values
    return result


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor, as a ``uint8`` tensor of rank 1."""
    # view() alone would refuse a contiguous tensor whose dimension of size one has an unusual stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _codes(values: Tensor, low: float | Tensor, inverse: float | Tensor) -> Tensor:
    # No clamping: low is the smallest of these values, so no code is below 0 or above the last level.
    return values.sub(low).mul_(inverse).add_(0.5).to(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    half = (len(codes) + 1) // 2
    lower, upper = codes[:half].clone(), codes[half:]
    lower[: len(upper)] |= upper << 4
    return lower
