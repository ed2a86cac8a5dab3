"""A codec: a name both sides know, and how tensors become fewer bytes under it and tensors again.

=====================================  ==============================================================================
``raw``                                the tensor's memory
``zstd``                               that, compressed; the tail gets the same bits
``float16``, ``bfloat16``              fewer bits a value (:mod:`~torchsurgeon.codec.quantize`); each of these five may
``int8``, ``int8-channel``, ``int4``   have ``+zstd`` behind it
``png``, ``jpeg-Q``, ``webp-Q``        ``uint8`` images (:mod:`~torchsurgeon.codec.images`), Q the quality from 1 to 100
=====================================  ==============================================================================

A tensor that a codec cannot hold is encoded without loss instead, with ``zstd`` if the codec has it: integers under
``int8``, NaN and infinities under all that lose something, a feature map under ``jpeg``. So is one that would not get
smaller. What was encoded says which codec opens it.
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
from torchsurgeon.errors import CodecError
from torchsurgeon.tracing.layout import dense, logical

Buffer = bytes | bytearray | memoryview


class EncodedTensor(NamedTuple):
    """A tensor's bytes, the name of the codec that opens them, and the order of its dimensions in memory, outermost
    first (None for row-major). The bytes may be the tensor's own memory."""

    codec: str
    data: memoryview
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class Codec:
    """One codec; made by :func:`find_codec`. Thread-safe."""

    name: str
    packing: str | None = None
    image: str | None = None
    quality: int | None = None
    zstd: bool = False

    @property
    def lossless(self) -> bool:
        """Whether decoding gives the very bits that were encoded."""
        return self.packing is None and self.image in (None, "png")

    def suits(self, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Return whether tensors of this kind are encoded by this codec, and not by another in its place."""
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
        """Return ``tensor`` encoded; values are packed on the tensor's own device, and only the result is copied."""
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
        """Return the tensor that ``data`` stands for, in memory of its own: values are unpacked on ``device``.

        Raises :class:`~torchsurgeon.wire.CodecError` for bytes that this codec cannot have made of such a tensor, and
        for a tensor of more than ``max_bytes``; nothing larger than the tensor is allocated on the way.
        """
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        if size > max_bytes:
            raise CodecError(f"it would be {size} bytes, of which at most {max_bytes} are taken")
        packing = self.packing
        if not self.suits(dtype, shape):
            raise CodecError(f"{self.name} is no codec for {dtype} of shape {list(shape)}; encode it as raw or zstd")
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
            raise CodecError(f"{len(view)} bytes were sent, but {self.name} of shape {list(shape)} is {stored_bytes}")
        in_memory = shape if order is None else tuple(shape[dim] for dim in order)
        packed = packed.to(device, non_blocking=True)
        if packing is not None:
            channels_at = _in_memory(quantize.channel_dim(shape), order)
            return logical(quantize.unpack(packing, packed, dtype, in_memory, channels_at), order)
        if dtype == torch.bool and size and int(packed.max()) > 1:
            raise CodecError("it is BOOL and holds a byte other than 0 and 1")
        return logical(packed.view(dtype).reshape(in_memory), order)

    def __str__(self) -> str:
        return self.name


@lru_cache(maxsize=1024)
def find_codec(name: str) -> Codec:
    """Return the codec of this name. Raises :class:`~torchsurgeon.wire.CodecError`, listing the known ones."""
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
    raise CodecError(f"there is no codec {name[:40]!r} here; there are {', '.join(codec_names())}")


def codec_names() -> tuple[str, ...]:
    """Return the names of all codecs here; ``jpeg`` and ``webp`` may be followed by another quality (``jpeg-75``)."""
    packings = [name + behind for name in quantize.PACKINGS for behind in ("", "+zstd")]
    pictures = [find_codec(kind).name for kind in images.QUALITIES] if images.available() else []
    return ("raw", "zstd", *packings, *pictures)


def _in_memory(dim: int, order: Sequence[int] | None) -> int:
    return dim if order is None else list(order).index(dim)
