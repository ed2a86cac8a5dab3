"""Fitted codecs on NumPy arrays: the coefficients that ``torchsurgeon.codec.fitted`` computes of tensors, and streams.

A device encodes, and the server decodes, so only that half is here. Both hold the same file, whose digest is a part of
the codec's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon._cached import cached_property
from torchsurgeon.codec.fitted import file
from torchsurgeon.codec.fitted.grid import Grid, Matrices
from torchsurgeon.codec.fitted.held import HeldTensor
from torchsurgeon.codec.fitted.rates import MOST_MAGNITUDE, ZERO_STEPS, Rates
from torchsurgeon.codec.names import fitted_name, rated_name
from torchsurgeon.edge import range_encoder
from torchsurgeon.edge.codec import Array, ArrayCodec, lossless, packs
from torchsurgeon.errors import CodecError, short


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayFitted:
    """A fitted codec, as its file holds it. Thread-safe.

    Attributes:
        name: ``fitted:`` with the label and the first 8 digits of the digest.
        digest: SHA-256 of the file, in hex.
        graph: fingerprint of the traced graph that it was fitted to.
        weights: digest of the model's weights.
        point: index and name of the partition point.
        tensors: what it holds of each boundary tensor.
        rates: its rates and quantization steps.
    """

    name: str
    digest: str
    graph: str
    weights: str
    point: tuple[int, str]
    tensors: tuple[ArrayTensor, ...]
    rates: Rates

    @staticmethod
    def load(path: str | Path) -> ArrayFitted:
        """Return the codec in a file.

        Raises:
            CodecError: the file cannot be read, is damaged, or is one of another version; the message names it.
        """
        try:
            header, arrays, digest = file.unpack(file.read(path))
            tensors = tuple(ArrayTensor.all_of(header, arrays))
            steps, rates = (tuple(map(float, header[key])) for key in ("steps", "rates"))
            label, graph, weights = (str(header[key]) for key in ("label", "graph", "weights"))
            point = int(header["point"][0]), str(header["point"][1])
            name = fitted_name(label, digest)
            return ArrayFitted(name, digest, graph, weights, point, tensors, Rates(steps, rates))
        except CodecError as error:
            raise CodecError(f"{short(Path(path))}: {error}") from None
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CodecError(
                f"{short(Path(path))} holds no fitted codec: {short(error)}; fit the codec again"
            ) from None

    def at(self, rate: float | str) -> FittedArrayCodec:
        """Return the codec at a rate in bits per value.

        Args:
            rate: the rate, as a number or as the digits of one.

        Raises:
            CodecError: it is no rate of this codec.
        """
        wanted = self.rates.wanted(rate, self.name)
        return FittedArrayCodec(rated_name(self.name, wanted), None, False, fitted=self, rate=wanted)

    def find(self, name: str | None, array: Array) -> int | None:
        """Return the number of the tensor that encodes an array; None where none does.

        Args:
            name: its name in the graph. Without one, the tensor is found by its shape, if only one fits.
            array: the array.
        """
        if not packs("int8", array.dtype):
            return None
        fits = [i for i, one in enumerate(self.tensors) if one.transform.grid.fits(array.shape)]
        if name is not None:
            return next((i for i in fits if self.tensors[i].name == name), None)
        return fits[0] if len(fits) == 1 else None


class ArrayTransform(Matrices):
    """The matrices of a tensor's transform, applied to arrays."""

    @cached_property
    def _there(self) -> tuple[Array, Array]:
        """The matrices [Q, C, C] and offsets [Q, C, 1] that encode."""
        matrices = self.matrices[self.band_of] * self.scales[..., None]
        return matrices, -(matrices @ self.means[..., None])

    def forward(self, array: Array) -> Array:
        """Return the coefficients [K, rows of blocks, columns of blocks] of an array, as ``float32``."""
        matrices, offsets = self._there
        mixed: Array = np.matmul(matrices, _frequencies(self.grid, array))
        mixed += offsets
        return mixed.reshape(self.grid.groups, *self.grid.blocks(array.shape))


class ArrayTensor(HeldTensor):
    """What a fitted codec holds of one boundary tensor, whose transform is that of arrays."""

    transform: ArrayTransform

    _transform_class = ArrayTransform


@dataclasses.dataclass(frozen=True, eq=False)
class FittedArrayCodec(ArrayCodec):
    """A fitted codec at one rate; made by ``ArrayFitted.at()``. Thread-safe.

    An array that it was not fitted to is encoded without loss; so is one with NaN or infinity.

    Attributes:
        fitted: the codec with its file.
        rate: bits per value.
    """

    fitted: ArrayFitted = None  # type: ignore[assignment]
    rate: float = 0.0

    def encode(self, array: Array, name: str | None = None) -> tuple[str, memoryview]:
        index = self.fitted.find(name, array)
        if index is None:
            return lossless().encode(array)
        one, rates = self.fitted.tensors[index], self.fitted.rates
        step = rates.step(self.rate)
        # NaN and infinity are no mistake here: they are found below.
        with np.errstate(over="ignore", invalid="ignore"):
            coefficients = one.transform.forward(array)
            largest = float(np.abs(coefficients).max())
        if not largest < MOST_MAGNITUDE * step:
            return lossless().encode(array)
        coefficients *= np.float32(1 / step)
        coefficients += np.copysign(np.float32(1 - ZERO_STEPS), coefficients)
        stream = range_encoder.encode(coefficients.astype(np.int32), one.tables[rates.row(self.rate)])
        if len(stream) + 1 >= array.nbytes:
            return lossless().encode(array)
        return self.name, memoryview(bytes([index]) + stream)

    def decode(
        self, data: memoryview, dtype: np.dtype[Any], shape: Sequence[int], order: Sequence[int] | None = None
    ) -> Array:
        raise CodecError(f"a device without PyTorch encodes with {self.name} and does not decode; answer with raw")


def _frequencies(grid: Grid, array: Array) -> Array:
    """Return the frequencies [Q, C, P] of an array's blocks, P of them, as ``float32``."""
    down, across = grid.block
    batch, height, width = grid.sizes(array.shape)
    cells = np.moveaxis(array, grid.channels_at, 1).reshape(batch, grid.channels, height, width)
    cells = cells.astype(np.float32, copy=False)
    below, beside = -height % down, -width % across
    if below or beside:
        cells = np.pad(cells, ((0, 0), (0, 0), (0, below), (0, beside)), mode="edge")
    rows, columns = (height + below) // down, (width + beside) // across
    cut = cells.reshape(batch, grid.channels, rows, down, columns, across).transpose(1, 3, 5, 0, 2, 4)
    found = cut.reshape(grid.channels, grid.frequencies, -1)
    if grid.frequencies > 1:
        # Channel by channel: for a larger product OpenBLAS starts threads, which go on spinning while the encoder runs.
        found = np.matmul(grid.cosines.astype(np.float32), found)
    return found.swapaxes(0, 1)
