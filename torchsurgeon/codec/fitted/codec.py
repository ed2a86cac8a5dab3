"""A codec that was fitted to one cut of one model, at any rate: its file, and how it encodes and decodes.

``fit_codec()`` makes one. Both sides hold the same file, whose digest is a part of the codec's name, so a name says
exactly which numbers encode and decode: ``fitted:NAME@RATE``, the rate in bits per value.

A stream is one byte, the number of the tensor among those of the cut, and then the quantized coefficients
(``range_coder``). Its checksum covers the tables, so a stream of another file is refused.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsurgeon import _native
from torchsurgeon.codec import codec, quantize, range_coder
from torchsurgeon.codec.codec import Buffer, Codec, EncodedTensor
from torchsurgeon.codec.fitted import file
from torchsurgeon.codec.fitted.rates import MOST_MAGNITUDE, ZERO_STEPS, Rates
from torchsurgeon.codec.fitted.student import Student
from torchsurgeon.codec.fitted.tensor import FittedTensor
from torchsurgeon.codec.fitted.transform import SLICE
from torchsurgeon.codec.host import on_host
from torchsurgeon.codec.names import fitted_name, rated_name
from torchsurgeon.errors import CodecError, short
from torchsurgeon.models.weights import weight_digests
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.layout import dense, logical
from torchsurgeon.tracing.specs import PartitionPoint

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_KEPT_RATES = 64
# The names of a student's arrays in the file begin with this; those of tensors begin with a number.
_STUDENT = "student."
_SOME_RATES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


class FittedCodec:
    """A codec fitted to one cut of one model. ``at(rate)`` is a codec like any other. Thread-safe.

    Args:
        label: what its name begins with: letters, digits, ".", "_" and "-".
        model: name of the model's class.
        graph: fingerprint of the traced graph.
        weights: digest of the model's weights.
        point: index and name of the partition point.
        tensors: what it holds of each boundary tensor.
        steps: the quantization steps that there are tables for, the finest first.
        rates: the bits per value that each step took on the sample.
        provenance: where and how it was fitted.
        student: what the device runs in place of the model's own layers before the cut; None for these layers.

    Attributes:
        digest: SHA-256 of the file, in hex.
        name: ``fitted:`` with the label and the first 8 digits of the digest.

    Raises:
        CodecError: an argument is not valid.
    """

    def __init__(
        self,
        label: str,
        model: str,
        graph: str,
        weights: str,
        point: tuple[int, str],
        tensors: Sequence[FittedTensor],
        steps: Sequence[float],
        rates: Sequence[float],
        provenance: Mapping[str, Any] | None = None,
        student: Student | None = None,
    ) -> None:
        if not _LABEL.fullmatch(label):
            raise CodecError(
                f"the name of a fitted codec must be 1 to 48 letters, digits, '.', '_' or '-', the first a letter or "
                f"digit; got {short(label)}"
            )
        self.label, self.model, self.graph, self.weights, self.point = label, model, graph, weights, point
        self.tensors, self.steps, self.rates = tuple(tensors), tuple(steps), tuple(rates)
        self.provenance, self.student = dict(provenance or {}), student
        self._rates = Rates(self.steps, self.rates)
        if any(len(one.tables) != len(self.steps) for one in self.tensors):
            raise CodecError("a fitted codec must have a rate and tables for each step; fit it again")
        if not 1 <= len(self.tensors) <= 256:
            raise CodecError(f"a fitted codec is of 1 to 256 tensors; got {len(self.tensors)}")
        self._index = {one.name: index for index, one in enumerate(self.tensors)}
        # Without a lock, which a thread of the parent may hold when a process forks: each thread writes only its own.
        self._counts: dict[int, list[int]] = {}
        self._rated: dict[float, RatedCodec] = {}

    @cached_property
    def _file(self) -> bytes:
        header = {
            "label": self.label,
            "model": self.model,
            "graph": self.graph,
            "weights": self.weights,
            "point": list(self.point),
            "tensors": [one.description() for one in self.tensors],
            "steps": list(self.steps),
            "rates": list(self.rates),
            "provenance": self.provenance,
        }
        arrays: dict[str, NDArray[Any]] = {}
        for index, one in enumerate(self.tensors):
            arrays |= {f"{index}.{name}": array for name, array in one.arrays().items()}
        if self.student is not None:
            header["student"] = self.student.description()
            arrays |= {f"{_STUDENT}{name}": array for name, array in self.student.tensors.items()}
        return file.pack(header, arrays)

    @cached_property
    def digest(self) -> str:
        return self._file[-32:].hex()

    @property
    def name(self) -> str:
        return fitted_name(self.label, self.digest)

    def save(self, path: str | Path) -> None:
        """Write the codec to a file.

        Raises:
            CodecError: the file cannot be written.
        """
        file.write(path, self._file)

    @staticmethod
    def load(path: str | Path) -> FittedCodec:
        """Return the codec in a file. ``check()`` says whether it is one of a model, ``use()`` makes its name known.

        Raises:
            CodecError: the file cannot be read, is damaged, or is one of another version; the message names it.
        """
        try:
            return _parsed(*file.unpack(file.read(path))[:2])
        except CodecError as error:
            raise CodecError(f"{short(Path(path))}: {error}") from None

    def check(self, graph: LayerGraph) -> None:
        """Check that it was fitted to this model, with these weights.

        Raises:
            CodecError: it was fitted to another graph, cut or weights, or its student does not fit.
        """
        here = type(graph.model).__name__
        if self.graph != graph.fingerprint:
            raise CodecError(
                f"{self.name} was fitted to {short(self.model, 100, quote=False)} (fingerprint {self.graph[:12]}), not "
                f"to {here} ({graph.fingerprint[:12]}); fit a codec to this model"
            )
        if weight_digests(graph.model).combined != self.weights:
            raise CodecError(f"{self.name} was fitted to {here} with other weights; fit a codec to this model")
        point = graph.point(self.point[0])
        # A cut across branches has the index of another point and a name of its own.
        crossing = {spec.name for spec in point.tensors} if point.name == self.point[1] else set(graph.values)
        if not set(self._index) <= crossing:
            raise CodecError(f"{self.name} was fitted to another cut of {here} than {short(point.name)}; fit it again")
        if self.student is not None:
            if point.name != self.point[1]:
                raise CodecError(
                    f"the student of {self.name} is for another cut than {short(point.name)}; distill it again"
                )
            self.student.module(graph, point.index)

    def use(self) -> FittedCodec:
        """Make its name known to ``find_codec()`` in this process, and return it, or the same one if it was known.

        Raises:
            NativeUnavailableError: the compiled extension is missing, which codes the coefficients.
        """
        _native.operators("a fitted codec")
        return codec.add_fitted(self)

    def at(self, rate: float | str) -> RatedCodec:
        """Return the codec at a rate in bits per value, between the lowest and the highest of ``rates``.

        Args:
            rate: the rate, as a number or as the digits of one; it is rounded to four digits.

        Raises:
            CodecError: it is no such rate.
        """
        wanted = self._rates.wanted(rate, self.name)
        found = self._rated.get(wanted)
        if found is None:
            if len(self._rated) >= _KEPT_RATES:
                self._rated.clear()
            found = self._rated.setdefault(wanted, RatedCodec(rated_name(self.name, wanted), fitted=self, rate=wanted))
        return found

    def some(self) -> tuple[RatedCodec, ...]:
        """Return the codec at some of its rates, from 0.25 to 4 bits a value, each 1.4 times the one before."""
        return tuple(self.at(rate) for rate in _SOME_RATES if self.rates[-1] <= rate <= self.rates[0])

    def stats(self) -> dict[str, int]:
        """Return how many coefficients it has encoded in this process, and how many of them were out of range.

        Out of range are those that are half as large again as any in the sample. They are coded as exactly as others.
        Many of them mean that the inputs are no longer like the sample, so that the codec should be fitted again.
        """
        counts = list(self._counts.values())
        return {"values": sum(one[0] for one in counts), "out_of_range": sum(one[1] for one in counts)}

    def count(self, values: int, out_of_range: int) -> None:
        """Add to what ``stats()`` returns."""
        own = self._counts.setdefault(threading.get_ident(), [0, 0])
        own[0] += values
        own[1] += out_of_range

    def find(self, name: str | None, dtype: torch.dtype, shape: Sequence[int]) -> int | None:
        """Return the number of the tensor that encodes one of this name, dtype and shape; None where none does.

        Args:
            name: its name in the graph. Without one, the tensor is found by its shape, if only one fits.
            dtype: its dtype.
            shape: its shape.
        """
        if not quantize.packs("int8", dtype) or not _native.available():
            return None
        fits = [i for i, one in enumerate(self.tensors) if one.transform.grid.fits(shape)]
        if name is not None:
            index = self._index.get(name)
            return index if index in fits else None
        return fits[0] if len(fits) == 1 else None


@dataclasses.dataclass(frozen=True, eq=False)
class RatedCodec(Codec):
    """A fitted codec at one rate; made by ``FittedCodec.at()``. Thread-safe.

    A tensor that it was not fitted to is encoded without loss, compressed; so is one with NaN or infinity.

    Attributes:
        fitted: the codec with its file.
        rate: bits per value.
    """

    fitted: FittedCodec = None  # type: ignore[assignment]
    rate: float = 0.0

    @property
    def lossless(self) -> bool:
        return False

    @property
    def varies(self) -> bool:
        return True

    @property
    def changes_as(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        return self.fitted.name

    @property
    def coarseness(self) -> float:
        return -self.rate

    def student_at(self, point: PartitionPoint) -> FittedCodec | None:
        """Return the codec with its file if a student computes what crosses at this point, else None."""
        fitted = self.fitted
        own = point.layers is None and fitted.point == (point.index, point.name)
        return fitted if own and fitted.student is not None else None

    @cached_property
    def step(self) -> float:
        """The quantization step: between those of the file, as the logarithms of rates and steps lie."""
        return self.fitted._rates.step(self.rate)

    @cached_property
    def _row(self) -> int:
        """The row of tables whose rate is nearest."""
        return self.fitted._rates.row(self.rate)

    def suits(self, dtype: torch.dtype, shape: Sequence[int], name: str | None = None) -> bool:
        if name is not None:
            return self.fitted.find(name, dtype, shape) is not None
        fits = any(one.transform.grid.fits(shape) for one in self.fitted.tensors)
        return fits and quantize.packs("int8", dtype) and _native.available()

    def encode(self, tensor: Tensor, name: str | None = None) -> EncodedTensor:
        tensor = tensor.detach()
        shape = tuple(tensor.shape)
        index = self.fitted.find(name, tensor.dtype, shape)
        if index is None:
            return codec.find_codec("zstd").encode(tensor)
        one = self.fitted.tensors[index]
        coefficients = one.transform.forward(tensor)
        largest = float(coefficients.abs().max())
        if not largest < MOST_MAGNITUDE * self.step:
            return codec.find_codec("zstd").encode(tensor)
        beyond = int((coefficients.abs() > one.limits(tensor.device)).sum())
        scaled = coefficients.mul_(1 / self.step)
        quantized = scaled.add_(torch.sign(scaled), alpha=1 - ZERO_STEPS).to(torch.int32)
        stream = range_coder.encode(on_host(quantized), one.tables[self._row])
        if len(stream) + 1 >= tensor.nbytes:
            return codec.find_codec("zstd").encode(tensor)
        self.fitted.count(quantized.numel(), beyond)
        return EncodedTensor(self.name, memoryview(bytes([index]) + stream), dense(tensor, shape)[0])

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
        """Return the tensor that was encoded, as ``Codec.decode()`` does.

        Beside the tensor, its coefficients are allocated, of four bytes each: one for each value, and less than four
        for each where blocks at the border are filled up.
        """
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        if size > max_bytes:
            raise CodecError(f"the tensor would be {size} bytes; at most {max_bytes} are accepted")
        view = memoryview(data).cast("B")
        one = self.fitted.tensors[view[0]] if len(view) and view[0] < len(self.fitted.tensors) else None
        if one is None or not (one.transform.grid.fits(shape) and quantize.packs("int8", dtype)):
            raise CodecError(
                f"{self.name} does not encode {dtype} of shape {list(shape)}, or is damaged; encode it as raw or zstd"
            )
        grid = one.transform.grid
        whole = (grid.groups, *grid.blocks(shape))
        quantized = range_coder.decode(view[1:], whole, one.tables[self._row]).to(device)
        # In the same memory, since a client decides how large the grid is.
        coefficients = quantized.view(torch.float32)
        for integers, into in zip(quantized.view(-1).split(SLICE), coefficients.view(-1).split(SLICE), strict=True):
            # The middle of a value's interval; zero stays zero.
            values = integers.float()
            into.copy_(values.add_(torch.sign(values), alpha=ZERO_STEPS - 0.5).mul_(self.step))
        decoded = one.transform.inverse(coefficients, shape, dtype)
        del quantized, coefficients, integers, into
        stored = decoded if order is None else decoded.permute(tuple(order))
        return logical(stored.contiguous(), order)

    def __str__(self) -> str:
        return self.name


def load_codec(path: str | Path, graph: LayerGraph) -> FittedCodec:
    """Load the file of a fitted codec, check that it is of this model, and make its name known in this process.

    Args:
        path: the file.
        graph: the traced model.

    Raises:
        CodecError: the file cannot be read, is damaged, or is of another version, graph, cut or weights.
        NativeUnavailableError: the compiled extension is missing.
    """
    loaded = FittedCodec.load(path)
    loaded.check(graph)
    return loaded.use()


def _parsed(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> FittedCodec:
    try:
        steps, rates = (tuple(map(float, header[key])) for key in ("steps", "rates"))
        tensors = FittedTensor.all_of(header, arrays)
        label, model, graph, weights = (str(header[key]) for key in ("label", "model", "graph", "weights"))
        point = int(header["point"][0]), str(header["point"][1])
        weights_of = {k.removeprefix(_STUDENT): v for k, v in arrays.items() if k.startswith(_STUDENT)}
        student = Student.parsed(header["student"], weights_of) if header.get("student") is not None else None
        provenance = dict(header["provenance"])
        return FittedCodec(label, model, graph, weights, point, tensors, steps, rates, provenance, student)
    except CodecError:
        raise
    except KeyError as error:
        raise CodecError(f"the file has no {short(error)}; fit the codec again") from None
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise CodecError(f"the file holds a value of the wrong kind: {short(error)}; fit the codec again") from None
