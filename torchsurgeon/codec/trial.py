"""One codec tried at one point: its sizes and times, and what it changes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from torchsurgeon.accuracy.finding import Finding
from torchsurgeon.accuracy.scores import as_real_numbers, likeness
from torchsurgeon.codec.codec import Codec, find_codec
from torchsurgeon.codec.table import CodecCost, CodecRow, Difference
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.tracing.specs import PartitionPoint

# A median of fewer times is not worth much.
_LEAST_TIMES = 5
# A student is timed so many times, for all rates of its codec together.
_TIMED_STUDENTS = 12


class StudentRun:
    """Runs a student, and tells how long it takes beside the whole model.

    Args:
        student: computes the boundary tensors from a call's inputs.
        whole: the whole model, from the same inputs.
        device: where both run.
    """

    def __init__(self, student: Segment, whole: Segment, device: torch.device) -> None:
        self._student, self._whole, self._device = student, whole, device
        self._shares: list[float] = []

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the boundary tensors of a call; the first calls are timed."""
        if len(self._shares) < _TIMED_STUDENTS:
            # One after the other, so that whatever slows the machine slows both.
            student_s, whole_s = self._seconds(self._student, inputs), self._seconds(self._whole, inputs)
            self._shares.append(student_s / max(whole_s, 1e-9))
        return self._student(*inputs)  # type: ignore[no-any-return]

    def share(self) -> float | None:
        """Return the student's seconds over those of the whole model; None before it has run."""
        # The very first run allocates memory that later ones use again.
        return statistics.median(self._shares[1:] or self._shares) if self._shares else None

    def _seconds(self, run: Segment, inputs: Sequence[Tensor]) -> float:
        settle(self._device)
        begin_s = time.perf_counter()
        run(*inputs)
        settle(self._device)
        return time.perf_counter() - begin_s


def settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trial:
    """Collects what one codec does at one point.

    Args:
        codec: the codec.
        names: the names of the boundary tensors.
        device: where values are packed and unpacked.
        student: computes the boundary tensors from a call's inputs in place of the model's own layers; None where
            these do.

    Attributes:
        lossless: whether the tail gets the same bits in every call, whatever the samples hold.
        unused: whether the tail got the same bits so far, though it need not: the codec encoded no tensor.
        findings: what became of the model's answers, once they were judged.
        untested: why they were not judged; empty where they were.
        student: as given.
    """

    def __init__(
        self, codec: Codec, names: Sequence[str], device: torch.device, student: StudentRun | None = None
    ) -> None:
        self.codec, self._names, self._device, self.student = codec, names, device, student
        self.lossless = student is None and codec.lossless
        self.unused = not self.lossless
        self.findings: tuple[Finding, ...] = ()
        self.untested = ""
        self._sizes: list[int] = []
        self._encode_s: list[float] = []
        self._decode_s: list[float] = []
        self._max_abs = self._squares = 0.0
        self._count, self._cosine = 0, 1.0

    @property
    def size_bytes(self) -> float:
        """What crosses, as the mean over the calls."""
        return statistics.mean(self._sizes)

    @property
    def kept(self) -> bool:
        """Whether the answers were judged, and all limits of the budget are met."""
        return bool(self.findings) and all(finding.kept for finding in self.findings)

    def measure(self, boundary: Sequence[Tensor], inputs: Sequence[Tensor], *, first: bool, calls: int) -> None:
        """Add the size, the times and the differences of one call.

        Args:
            boundary: the boundary tensors of the model's own layers.
            inputs: the call's inputs.
            first: whether it is the first call.
            calls: how many calls there will be; of few, each is timed several times.
        """
        # A codec's very first run is not timed, because it has to allocate memory that later runs reuse.
        repeats = -(-_LEAST_TIMES // calls) + first
        for repeat in range(repeats):
            decoded, exact = self._there_and_back(boundary, inputs, timed=not first or repeat > 0)
        if exact:
            return
        self.unused = False
        for one, other in zip(boundary, decoded, strict=True):
            difference = as_real_numbers(one) - as_real_numbers(other)
            self._count += difference.numel()
            if difference.any():
                self._max_abs = max(self._max_abs, float(difference.abs().max()))
                self._squares += float(difference @ difference)
        self._cosine = min(self._cosine, likeness(list(boundary), list(decoded)))

    def decoded(self, boundary: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the boundary tensors of a call as the server gets them."""
        return self._there_and_back(boundary, inputs, timed=False)[0]

    def exact(self, boundary: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
        """Return whether the server gets the same bits in a call."""
        return self._there_and_back(boundary, inputs, timed=False)[1]

    def _there_and_back(
        self, boundary: Sequence[Tensor], inputs: Sequence[Tensor], *, timed: bool
    ) -> tuple[list[Tensor], bool]:
        """Encode and decode a boundary; return the tensors as the server gets them, and whether they are exact."""
        if self.student is not None:
            boundary = self.student(inputs)
        settle(self._device)
        begin_s = time.perf_counter()
        encoded = [self.codec.encode(tensor, name) for tensor, name in zip(boundary, self._names, strict=True)]
        encoded_s = time.perf_counter()
        openers = [find_codec(e.codec) for e in encoded]
        decoded = [
            opener.decode(e.data, tensor.dtype, tensor.shape, e.order, max_bytes=tensor.nbytes, device=self._device)
            for opener, e, tensor in zip(openers, encoded, boundary, strict=True)
        ]
        settle(self._device)
        if timed:
            self._encode_s.append(encoded_s - begin_s)
            self._decode_s.append(time.perf_counter() - encoded_s)
            self._sizes.append(sum(len(e.data) for e in encoded))
        return decoded, self.student is None and all(opener.lossless for opener in openers)

    def row(self, point: PartitionPoint, raw_bytes: float) -> CodecRow:
        """Return the table's row.

        Args:
            point: the partition point.
            raw_bytes: the boundary's size without a codec.
        """
        cost = CodecCost(
            self.codec.name,
            self.size_bytes,
            statistics.median(self._encode_s),
            statistics.median(self._decode_s),
            self.lossless,
            self.lossless or self.kept,
            None if self.student is None else self.student.share(),
        )
        rmse = (self._squares / max(1, self._count)) ** 0.5
        difference = None if self.lossless else Difference(self._max_abs, rmse, self._cosine)
        place = point.index, point.name
        return CodecRow(*place, raw_bytes, cost, difference, self.findings, self.untested, point.layers)
