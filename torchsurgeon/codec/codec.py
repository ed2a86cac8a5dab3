"""Codecs: the names that device and server share, and how tensors are encoded to fewer bytes and decoded again.

=====================================  ==============================================================================
``raw``                                the tensor's memory
``zstd``                               the tensor's memory, compressed without loss
``float16``, ``bfloat16``,             fewer bits per value (``quantize``); each of these five
``int8``, ``int8-channel``, ``int4``   may be followed by ``+zstd``, which compresses the result
``png``, ``jpeg-Q``, ``webp-Q``        ``uint8`` images (``images``), Q the quality from 1 to 100
=====================================  ==============================================================================

A tensor that a codec cannot represent is encoded without loss instead, compressed if the codec's name ends in ``zstd``:
integers under ``int8``, NaN and infinities under every lossy codec, a feature map under ``jpeg``. The same holds for a
tensor that the codec would not make smaller. So every encoded tensor carries the name of the codec that decodes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchsurgeon.codec import images, quantize, zstd
from torchsurgeon.codec.host import on_host
from torchsurgeon.errors import CodecError, short
from torchsurgeon.tracing.layout import dense, logical

Buffer = bytes | bytearray | memoryview


class EncodedTensor(NamedTuple):
    """An encoded tensor.

    Attributes:
        codec: name of the codec that decodes it.
        data: the bytes. They may be the tensor's own memory.
        order: the order of the dimensions in memory, outermost first; None for row-major.
    """

    codec: str
    data: memoryview
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class Codec:
    """One codec; made by ``find_codec()``. Thread-safe.

    Attributes:
        name: the name under which both sides know it.
        packing: how values are stored in fewer bits, one of ``quantize.PACKINGS``; None where they are not.
        image: the image format; None where it is no image codec.
        quality: the image format's quality, from 1 to 100; None where it has none.
        zstd: whether the bytes are compressed.
    """

    name: str
    packing: str | None = None
    image: str | None = None
    quality: int | None = None
    zstd: bool = False

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back the same bits that were encoded."""
        return self.packing is None and self.image in (None, "png")

    def suits(self, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Return whether tensors of this dtype and shape are encoded by this codec, not by a lossless one instead."""
        if self.image is not None:
            return images.is_image(dtype, shape)
        if self.packing is None:
            return True
        return (
            0 not in shape
            and quantize.packs(self.packing, dtype)
            and quantize.usual(self.packing, shape) == self.packing
        )

    def encode(self, tensor: Tensor) -> EncodedTensor:
        """Return ``tensor`` encoded. Values are packed on the tensor's own device, and only the result is copied."""
        tensor = tensor.detach()
        shape = tuple(tensor.shape)
        if self.image is not None and images.is_image(tensor.dtype, shape):
            data = memoryview(images.encode(self.image, self.quality, tensor))
            if len(data) < tensor.nbytes:
                return EncodedTensor(self.name, data, dense(tensor, shape)[0])
        order, memory = dense(tensor, shape)
        packing, packed = None, None
        if self.packing is not None and quantize.packs(self.packing, tensor.dtype) and memory.numel():
            packing = quantize.usual(self.packing, shape)
            packed = quantize.pack(packing, memory, _in_memory(quantize.channel_dim(shape), order))
        if packed is None or len(packed) >= memory.nbytes:
            # It does not fit the packing, or would not get smaller: the tensor's own memory is sent, without a copy.
            packing, packed = None, quantize.as_bytes(memory)
        data = on_host(packed).numpy().data
        if self.zstd:
            frame = zstd.compress(data)
            if len(frame) < len(data):
                return EncodedTensor(f"{packing}+zstd" if packing else "zstd", memoryview(frame), order)
        return EncodedTensor(packing or "raw", data, order)

    def decode(
        self,
        data: Buffer,
        dtype: torch.dtype,
        shape: Sequence[int],
        order: Sequence[int] | None = None,
        *,
        max_bytes: int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the tensor that was encoded, in memory of its own. Nothing larger than the tensor is allocated.

        Args:
            data: the encoded bytes.
            dtype: the tensor's dtype.
            shape: the tensor's shape.
            order: the order of its dimensions in memory, outermost first; None for row-major.
            max_bytes: the largest tensor to accept, in bytes.
            device: where values are unpacked, and where the tensor is.

        Raises:
            CodecError: this codec does not produce such bytes from a tensor of this dtype and shape, or the tensor
                would be larger than ``max_bytes``.
        """
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        if size > max_bytes:
            raise CodecError(f"the tensor would be {size} bytes; at most {max_bytes} are accepted")
        packing = self.packing
        if not self.suits(dtype, shape):
            raise CodecError(f"{self.name} does not encode {dtype} of shape {list(shape)}; encode it as raw or zstd")
        view = memoryview(data).cast("B")
        if self.image is not None:
            pixels = images.decode(self.image, view, shape)
            stored = pixels if order is None else pixels.permute(tuple(order))
            return logical(stored.contiguous().to(device), order)
        stored_bytes = size if packing is None else quantize.packed_bytes(packing, shape)
        if self.zstd:
            packed = zstd.decompress(view, stored_bytes)
        elif len(view) == stored_bytes:
            packed = torch.empty(stored_bytes, dtype=torch.uint8)
            packed.numpy().data[:] = view
        else:
            raise CodecError(f"{self.name} of shape {list(shape)} takes {stored_bytes} bytes; got {len(view)} bytes")
        in_memory = shape if order is None else tuple(shape[dim] for dim in order)
        packed = packed.to(device, non_blocking=True)
        if packing is not None:
            channels_at = _in_memory(quantize.channel_dim(shape), order)
            return logical(quantize.unpack(packing, packed, dtype, in_memory, channels_at), order)
        if dtype == torch.bool and size and int(packed.max()) > 1:
            raise CodecError("the bytes of a BOOL tensor must be 0 or 1; got another")
        return logical(packed.view(dtype).reshape(in_memory), order)

    def __str__(self) -> str:
        return self.name


def find_codec(name: str) -> Codec:
    """Return the codec of this name.

    Raises:
        CodecError: there is no such codec, or it needs Pillow, which is not installed. The message lists all codecs.
    """
    if not isinstance(name, str):
        raise CodecError(f'a codec is named by a text, such as "int8+zstd"; got {short(name)}')
    return _find_codec(name)


@lru_cache(maxsize=1024)
def _find_codec(name: str) -> Codec:
    base, plus, behind = name.partition("+")
    kind, dash, quality = base.partition("-")
    if name in ("raw", "zstd"):
        return Codec(name, zstd=name == "zstd")
    if base in quantize.PACKINGS and (not plus or behind == "zstd"):
        return Codec(name, packing=base, zstd=bool(plus))
    if kind in images.QUALITIES and not plus and images.available():
        usual = images.QUALITIES[kind]
        if not dash:
            return Codec(kind if usual is None else f"{kind}-{usual}", image=kind, quality=usual)
        if usual is not None and quality.isascii() and quality.isdigit() and 1 <= int(quality[:4]) <= 100:
            return Codec(f"{kind}-{int(quality)}", image=kind, quality=int(quality))
    raise CodecError(f"there is no codec {short(name, 60)}; there are {', '.join(codec_names())}")


def codec_names() -> tuple[str, ...]:
    """Return the names of all codecs that work in this process. Image codecs need Pillow.

    ``jpeg`` and ``webp`` are listed with their default quality; any other works as well (``jpeg-75``).
    """
    packings = [name + behind for name in quantize.PACKINGS for behind in ("", "+zstd")]
    pictures = [find_codec(kind).name for kind in images.QUALITIES] if images.available() else []
    return ("raw", "zstd", *packings, *pictures)


def _in_memory(dim: int, order: Sequence[int] | None) -> int:
    return dim if order is None else list(order).index(dim)
