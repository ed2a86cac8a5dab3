"""Codecs: the names that device and server share, and how tensors are encoded to fewer bytes and decoded again.

=====================================  ==============================================================================
``raw``                                the tensor's memory
``zstd``                               the tensor's memory, compressed without loss
``float16``, ``bfloat16``,             fewer bits per value (``quantize``); each of these five
``int8``, ``int8-channel``, ``int4``   may be followed by ``+zstd``, which compresses the result
``png``, ``webp-lossless``             ``uint8`` images (``pictures``) without loss
``jpeg-Q``, ``jpeg444-Q``, ``webp-Q``, ``uint8`` images, Q the quality from 1 to 100; ``jpeg444`` keeps the full
``avif-Q``                             resolution of colours
``fitted:NAME@RATE``                   fitted to one cut of one model (``fitted``), RATE in bits per value
=====================================  ==============================================================================

The name of an image codec may end in ``@0.5`` or another number below 1, by which width and height are scaled down on
the device; behind the decoder the image is scaled up again.

A tensor that a codec cannot represent is encoded without loss instead, compressed if the codec's name ends in ``zstd``:
integers under ``int8``, NaN and infinities under every lossy codec, a feature map under ``jpeg``. The same holds for a
tensor that the codec would not make smaller. So every encoded tensor carries the name of the codec that decodes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from torchsurgeon._cached import cached_property
from torchsurgeon.codec import packings, pictures, quantize, zstd
from torchsurgeon.codec.host import on_host
from torchsurgeon.codec.names import FITTED
from torchsurgeon.errors import CodecError, short
from torchsurgeon.tracing.layout import dense, logical

Buffer = bytes | bytearray | memoryview


class AnyRate(Protocol):
    """A codec that was fitted to a cut, without a rate yet: ``fitted.FittedCodec``."""

    @property
    def name(self) -> str:
        """``fitted:NAME``."""

    @property
    def digest(self) -> str:
        """The digest of its file."""

    def at(self, rate: float | str) -> Codec:
        """Return the codec at a rate. Raise ``CodecError`` for a rate that it does not have."""

    def stats(self) -> dict[str, int]:
        """Return counts of what it has encoded in this process."""


_fitted: dict[str, AnyRate] = {}


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
        packing: how values are stored in fewer bits, one of ``packings.PACKINGS``; None where they are not.
        image: the image format; None where it is no image codec.
        quality: the image format's quality, from 1 to 100; None where it has none.
        percent: width and height of the pictures that cross, in percent of the images'.
        zstd: whether the bytes are compressed.
    """

    name: str
    packing: str | None = None
    image: str | None = None
    quality: int | None = None
    percent: int = 100
    zstd: bool = False

    @cached_property
    def lossless(self) -> bool:
        """Whether decoding gives back the same bits that were encoded."""
        exact_image = self.image is None or (pictures.FORMATS[self.image].quality is None and self.percent == 100)
        return self.packing is None and exact_image

    @property
    def changes_as(self) -> str:
        """The name of the codec that changes tensors in the same way: without "+zstd", which loses nothing."""
        return self.name.removesuffix("+zstd")

    @property
    def kind(self) -> str:
        """What its name has in common with codecs that differ only in how fine they are."""
        return "packed" if self.image is None else f"{self.image}@{self.percent}"

    @property
    def coarseness(self) -> float:
        """Orders codecs of the same kind: the finer one, which changes less, has the lower number."""
        if self.image is not None:
            return -(self.quality or 0)
        return 0 if self.packing is None else packings.FROM_FINE_TO_COARSE.index(self.packing)

    @property
    def varies(self) -> bool:
        """Whether tensors of one shape take different numbers of bytes."""
        return self.zstd or self.image is not None

    def suits(self, dtype: torch.dtype, shape: Sequence[int], name: str | None = None) -> bool:
        """Return whether tensors of this dtype and shape are encoded by this codec, not by a lossless one instead.

        Args:
            dtype: the tensors' dtype.
            shape: their shape.
            name: their name in the graph, which matters to a codec that was fitted to certain tensors.
        """
        if self.image is not None:
            return _is_image(dtype, shape)
        if self.packing is None:
            return True
        return (
            0 not in shape
            and quantize.packs(self.packing, dtype)
            and packings.usual(self.packing, shape) == self.packing
        )

    def encode(self, tensor: Tensor, name: str | None = None) -> EncodedTensor:
        """Return ``tensor`` encoded. Values are packed on the tensor's own device, and only the result is copied.

        Args:
            tensor: the tensor.
            name: its name in the graph, which matters to a codec that was fitted to certain tensors.
        """
        tensor = tensor.detach()
        shape = tuple(tensor.shape)
        if self.image is not None and _is_image(tensor.dtype, shape):
            data = memoryview(pictures.encode(self.image, self.quality, self.percent, tensor.cpu().numpy()))
            if len(data) < tensor.nbytes:
                return EncodedTensor(self.name, data, dense(tensor, shape)[0])
        order, memory = dense(tensor, shape)
        packing, packed = None, None
        if self.packing is not None and quantize.packs(self.packing, tensor.dtype) and memory.numel():
            packing = packings.usual(self.packing, shape)
            packed = quantize.pack(packing, memory, _in_memory(packings.channel_dim(shape), order))
        if packed is None or len(packed) >= memory.nbytes:
            # It does not fit the packing, or would not get smaller: the tensor's own memory is sent, without a copy.
            packing, packed = None, quantize.as_bytes(memory)
        data = on_host(packed).numpy().data
        if self.zstd:
            integers = packing is None and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
            frame = zstd.compress(data, integers=integers)
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
        """Return the tensor that was encoded, in memory of its own.

        Nothing larger than the tensor is allocated, except by a fitted codec, which needs its coefficients beside it.

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
            pixels = torch.from_numpy(pictures.decode(self.image, self.percent, view, shape))
            stored = pixels if order is None else pixels.permute(tuple(order))
            return logical(stored.contiguous().to(device), order)
        stored_bytes = size if packing is None else packings.packed_bytes(packing, shape)
        if self.zstd:
            view = memoryview(zstd.decompress(view, stored_bytes))
        elif len(view) != stored_bytes:
            raise CodecError(f"{self.name} of shape {list(shape)} takes {stored_bytes} bytes; got {len(view)} bytes")
        if packing in packings.LEVELS and stored_bytes and not view.readonly:
            # What is unpacked next, byte by byte, may lie where it has arrived.
            packed = torch.frombuffer(view, dtype=torch.uint8)
        else:
            packed = torch.empty(stored_bytes, dtype=torch.uint8)
            packed.numpy().data[:] = view
        in_memory = shape if order is None else tuple(shape[dim] for dim in order)
        packed = packed.to(device, non_blocking=True)
        if packing is not None:
            channels_at = _in_memory(packings.channel_dim(shape), order)
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
    return _find_fitted(name) if name.startswith(FITTED) else _find_codec(name)


F = TypeVar("F", bound=AnyRate)


def add_fitted(fitted: F) -> F:
    """Make a fitted codec known to ``find_codec()``, and return it, or the same one if it is known already."""
    return _fitted.setdefault(fitted.name, fitted)  # type: ignore[return-value]


def fitted_codecs() -> tuple[AnyRate, ...]:
    """Return the fitted codecs that this process knows."""
    return tuple(_fitted.values())


def _find_fitted(name: str) -> Codec:
    whole, _, rate = name.partition("@")
    fitted = _fitted.get(whole)
    if fitted is None:
        known = ", ".join(_fitted) or "none"
        raise CodecError(
            f"there is no fitted codec {short(whole, 80)} in this process; there is {known[:300]}. Load its file with "
            "load_codec(), or give it to the server with --codec"
        )
    return fitted.at(rate)


@lru_cache(maxsize=1024)
def _find_codec(name: str) -> Codec:
    base, plus, behind = name.partition("+")
    if name in ("raw", "zstd"):
        return Codec(name, zstd=name == "zstd")
    if base in packings.PACKINGS and (not plus or behind == "zstd"):
        return Codec(name, packing=base, zstd=bool(plus))
    codec = _image_codec(name)
    if codec is None:
        raise CodecError(f"there is no codec {short(name, 60)}; there are {', '.join(codec_names())}")
    return codec


def _image_codec(name: str) -> Codec | None:
    kind = pictures.parse(name)
    if kind is None or not pictures.available(kind.format):
        return None
    return Codec(kind.name, image=kind.format, quality=kind.quality, percent=kind.percent)


def codec_names() -> tuple[str, ...]:
    """Return the names of all codecs that work in this process. Image codecs need Pillow.

    Image codecs are listed with their usual quality; any other works as well (``jpeg-75``), and at a smaller size
    (``webp-80@0.5``).
    """
    numeric = [name + behind for name in packings.PACKINGS for behind in ("", "+zstd")]
    shown = [find_codec(kind).name for kind in pictures.FORMATS if pictures.available(kind)]
    return ("raw", "zstd", *numeric, *shown)


def measured_names() -> tuple[str, ...]:
    """Return the names of the codecs that are measured by default: all, image codecs at several qualities and sizes."""
    numeric = [name for name in codec_names() if find_codec(name).image is None]
    shown = [
        f"{kind}{f'-{quality}' if quality else ''}{scale}"
        for kind, scale, *qualities in _MEASURED_IMAGES
        for quality in qualities or (0,)
        if pictures.available(kind)
    ]
    return (*numeric, *shown)


# Format, scale, and qualities from the finest to the coarsest.
_MEASURED_IMAGES: tuple[tuple[Any, ...], ...] = (
    ("png", ""),
    ("webp-lossless", ""),
    ("jpeg444", "", 98, 95, 90, 80),
    ("jpeg", "", 95, 90, 80, 60),
    ("webp", "", 95, 90, 80, 60),
    ("avif", "", 95, 90, 80, 65, 50),
    ("webp", "@0.75", 95, 80),
    ("avif", "@0.75", 90, 70),
    ("webp", "@0.5", 95, 80),
    ("avif", "@0.5", 90, 70),
)


def _is_image(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    return dtype == torch.uint8 and pictures.shows(shape)


def _in_memory(dim: int, order: Sequence[int] | None) -> int:
    return dim if order is None else list(order).index(dim)
