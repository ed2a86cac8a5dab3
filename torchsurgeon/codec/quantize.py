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
from torchsurgeon.errors import CodecError

PACKINGS = ("float16", "bfloat16", "int8", "int8-channel", "int4")
FROM_FINE_TO_COARSE = ("float16", "bfloat16", "int8-channel", "int8", "int4")

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# The dtypes whose values are packed. Those of float8 have no more bits than a packing would leave them.
_PACKED = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_BITS = {"int8": 8, "int4": 4}
_LEVELS = {"int8": 255, "int8-channel": 255, "int4": 15}
# The inverse of a narrower range, or the width of a wider one, is not representable in float32.
_NARROWEST, _WIDEST = 1e-30, 1e38
_DAMAGED = f"its low must be finite, and its scale from 0 to below {_WIDEST:g}; it is damaged, so send it again"
# With fewer values per channel, the channel's low and scale would take more than an eighth of the values' bytes.
_LEAST_PER_CHANNEL = 64


def packs(packing: str, dtype: torch.dtype) -> bool:
    """Return whether ``packing`` applies to ``dtype`` and makes it smaller."""
    half = _HALVES.get(packing)
    return dtype in _PACKED and dtype.itemsize > (half.itemsize if half else 1)


def usual(packing: str, shape: Sequence[int]) -> str:
    """Return ``packing``, or ``int8`` in place of ``int8-channel`` where the shape has too few values per channel."""
    if packing != "int8-channel":
        return packing
    channels = shape[channel_dim(shape)] if len(shape) > 1 else 0
    worth = channels and math.prod(shape) // channels >= _LEAST_PER_CHANNEL
    return packing if worth else "int8"


def channel_dim(shape: Sequence[int]) -> int:
    """Return the dimension that counts as channels: the second of images and volumes, else the last."""
    return 1 if len(shape) >= 4 else len(shape) - 1


def packed_bytes(packing: str, shape: Sequence[int]) -> int:
    """Return how many bytes a packed tensor of this shape takes. ``int8-channel`` needs a rank of at least 1."""
    count = math.prod(shape)
    if packing in _HALVES:
        return 2 * count
    if packing == "int4":
        return 8 + (count + 1) // 2
    return 8 * (shape[channel_dim(shape)] if packing == "int8-channel" else 1) + count


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
        scale = (high - low) / _LEVELS[packing]
        if not _describable(low, high) or (tensor.dtype == torch.float64 and _blurs(low, high, scale)):
            return None
        inverse = 1 / scale if scale else 0.0
        described = torch.tensor([low, scale], dtype=torch.float32)
        if values.is_cpu and _native.available():
            packed = torch.empty(packed_bytes(packing, values.shape), dtype=torch.uint8)
            packed[:8] = described.view(torch.uint8)
            torch.ops.torchsurgeon.quantize(values, low, inverse, _BITS[packing], packed[8:])
            return packed
        codes = _codes(values, low, inverse)
        described = described.to(tensor.device, non_blocking=True).view(torch.uint8)
        return torch.cat([described, _nibbles(codes) if packing == "int4" else codes])
    values = tensor.to(torch.float32).flatten(0, channels_at - 1) if channels_at else tensor.to(torch.float32)[None]
    values = values.flatten(2) if values.dim() > 2 else values[..., None]
    lows, highs = values.amin((0, 2)), values.amax((0, 2))
    ranges = highs.double() - lows.double()
    if not bool((torch.isfinite(ranges) & ((ranges == 0) | (ranges > _NARROWEST)) & (ranges < _WIDEST)).all()):
        return None
    scales = ranges / _LEVELS[packing]
    if tensor.dtype == torch.float64 and any(map(_blurs, lows.tolist(), highs.tolist(), scales.tolist())):
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
        if not bool((torch.isfinite(lows) & (scales >= 0) & (scales < _WIDEST)).all()):
            raise CodecError(_DAMAGED)
        spread = [channels if dim == channels_at else 1 for dim in range(len(shape))]
        values = data[8 * channels :].reshape(shape).to(torch.float32)
        return values.mul_(scales.view(spread)).add_(lows.view(spread)).to(dtype)
    low, scale = data[:8].clone().view(torch.float32).tolist()
    if not (math.isfinite(low) and 0 <= scale < _WIDEST):
        raise CodecError(_DAMAGED)
    codes = data[8:]
    if codes.is_cpu and _native.available():
        values = torch.empty(count)
        torch.ops.torchsurgeon.dequantize(codes, low, scale, _BITS[packing], values)
        return values.reshape(shape).to(dtype)
    if packing == "int4":
        codes = torch.cat([codes & 15, codes >> 4])[:count]
    return torch.add(torch.tensor(low, device=data.device), codes, alpha=scale).reshape(shape).to(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor, as a ``uint8`` tensor of rank 1."""
    # view() alone would refuse a contiguous tensor whose dimension of size one has an unusual stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _describable(low: float, high: float) -> bool:
    return math.isfinite(low) and (low == high or _NARROWEST < high - low < _WIDEST)


def _blurs(low: float, high: float, scale: float) -> bool:
    """Return whether float32, in which values are packed, rounds float64 by more than a hundredth of a step."""
    return max(abs(low), abs(high)) * 2.0**-24 > scale / 100


def _codes(values: Tensor, low: float | Tensor, inverse: float | Tensor) -> Tensor:
    # No clamping: low is the smallest of these values, so no code is below 0 or above the last level.
    return values.sub(low).mul_(inverse).add_(0.5).to(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    half = (len(codes) + 1) // 2
    lower, upper = codes[:half].clone(), codes[half:]
    lower[: len(upper)] |= upper << 4
    return lower
