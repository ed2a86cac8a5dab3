"""Training a thinned head to give what the model's own head gives, where that matters to the answer.

Two things are made small. The first is the error of the boundary in the coordinates of a fitted codec's transform, in
which an error counts alike in each of them. The second is the divergence of the answer behind the model's own tail from
the model's own answer. The first alone takes half the time for each step, but it knows nothing of errors that point the
same way at all places of a picture, which add up in the answer: on EfficientNet-Lite0, with 14 % of the boundary
unexplained, it kept 37 % of the answers, and 80 steps with both, from there, 50 %. Images need no labels.

Normalizations keep the model's own statistics. With those of each batch, as training usually has them, the error of
EfficientNet-Lite0's student grew from 22 to 74 % in 25 steps, since the layers were fitted with the model's own.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon import _whole_file
from torchsurgeon.codec.fitted.answers import Answers
from torchsurgeon.codec.fitted.student import Student
from torchsurgeon.codec.fitted.transform import Transform
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import CodecError, short

# Measured on EfficientNet-Lite0's student, whose layers are fitted already: 5e-3 destroys more than it mends at first.
_LEARNING_RATE, _WEIGHT_DECAY, _WARM_UP_STEPS = 2e-3, 1e-4, 50
_SAVED_EVERY_S, _LOOKS = 60.0, 12
FORMAT = "torchsurgeon.training/1"


@dataclasses.dataclass(frozen=True)
class Look:
    """How far a student has come.

    Attributes:
        steps: how many batches it has been trained with.
        elapsed_s: seconds of training.
        unexplained: the squared error over the variance, in the metric of the answer, on inputs kept apart.
        kept: of these inputs, the share whose class is the model's own, or the mean cosine similarity of the answers
            where they are no classes. What crosses is not quantized here.
    """

    steps: int
    elapsed_s: float
    unexplained: float
    kept: float

    @staticmethod
    def of(student: Student) -> Look:
        """Return how far a student had come when its training ended."""
        known = student.trained
        return Look(int(known["steps"]), known["elapsed_s"], known["unexplained"], known["kept"])

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {self.unexplained:.1%} of the boundary unexplained, {self.kept:.1%} of answers kept"
        )


def squared_error(
    transforms: Mapping[str, Transform], one: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean squared difference of two boundaries, in the coordinates of their transforms."""
    errors = [transform.weigh(one[name] - other[name]).square() for name, transform in transforms.items()]
    return torch.stack([error.sum() for error in errors]).sum() / sum(error.numel() for error in errors)


class Training:
    """Trains a thinned head, and can go on where it was interrupted.

    Args:
        student: the thinned head.
        own: the model's own head.
        names: the names of the boundary tensors.
        transforms: the transforms of those that count.
        variance: the mean square of the coefficients, without their means.
        tail: the rest of the model.
        answers: what the outputs are.
        seed: of what is drawn.
    """

    def __init__(
        self,
        student: Segment,
        own: Segment,
        names: Sequence[str],
        transforms: Mapping[str, Transform],
        variance: float,
        tail: Segment,
        answers: Answers,
        seed: int,
    ) -> None:
        self.student = _channels_last(student)
        self._own, self._tail = (_channels_last(copy.deepcopy(one)) for one in (own, tail))
        self._tail.requires_grad_(False)
        self._answers, self._names = answers, tuple(names)
        self._transforms, self._variance = transforms, variance
        self.steps, self.elapsed_s = 0, 0.0
        self.generator = torch.Generator().manual_seed(seed)
        student.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)

    def run(
        self,
        batches: Iterator[list[Tensor]],
        seconds: float,
        report: Callable[[], object],
        looked: Callable[[], object],
        save: Callable[[], object],
    ) -> None:
        """Train until so many seconds of training have passed in all.

        Args:
            batches: the inputs.
            seconds: how long, with what was trained before an interruption.
            report: called after every step.
            looked: called now and then, to see how far it has come.
            save: called every minute, and at the end, whatever ended it.
        """
        saved_s = look_s = self.elapsed_s
        try:
            while self.elapsed_s < seconds:
                begin_s = time.perf_counter()
                self._step(next(batches), self.elapsed_s / seconds)
                self.elapsed_s += time.perf_counter() - begin_s
                report()
                if self.elapsed_s - look_s > seconds / _LOOKS:
                    look_s = self.elapsed_s
                    looked()
                if self.elapsed_s - saved_s > _SAVED_EVERY_S:
                    saved_s = self.elapsed_s
                    save()
        finally:
            self.student.eval()
            save()

    def _step(self, inputs: Sequence[Tensor], done: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = (
                _LEARNING_RATE * min(1.0, (self.steps + 1) / _WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * done))
            )
        with torch.no_grad():
            wanted = dict(zip(self._names, self._own(*inputs), strict=True))
            answers = self._tail(*(one.clone() for one in wanted.values()))
        with torch.enable_grad():
            found = dict(zip(self._names, self.student(*inputs), strict=True))
            loss = squared_error(self._transforms, found, wanted) / self._variance
            # The tail may overwrite what it is given.
            given = [one * 1 if one.requires_grad else one.clone() for one in found.values()]
            divergence = self._answers.divergence(answers, self._tail(*given))
            if divergence is not None:
                loss = loss + divergence
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if bool(torch.isfinite(loss)):
            self._optimizer.step()
        self.steps += 1

    # --- going on after an interruption ---

    def save(self, path: Path, key: str, kept: Student) -> None:
        """Write everything that ``load()`` needs to go on.

        Args:
            path: the file.
            key: what it was made for; ``load()`` compares it.
            kept: the student as it is now.

        Raises:
            CodecError: the file cannot be written.
        """
        buffer = io.BytesIO()
        student = {
            "description": kept.description(),
            "tensors": {k: torch.from_numpy(v) for k, v in kept.tensors.items()},
        }
        torch.save(
            {
                "format": FORMAT,
                "key": key,
                "student": student,
                "optimizer": self._optimizer.state_dict(),
                "steps": self.steps,
                "elapsed_s": self.elapsed_s,
                "generator": self.generator.get_state(),
            },
            buffer,
        )
        _whole_file.write(path, buffer.getvalue(), CodecError)

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved, with the student that was made of it.

        Raises:
            CodecError: it is damaged.
        """
        try:
            self._optimizer.load_state_dict(saved["optimizer"])
            for parameter, state in self._optimizer.state.items():
                for one in state.values():
                    if torch.is_tensor(one) and one.dim() and one.shape != parameter.shape:
                        raise ValueError(f"a state of shape {list(one.shape)} for {list(parameter.shape)}")
                    if torch.is_tensor(one) and not bool(torch.isfinite(one).all()):
                        raise ValueError("a state that is not finite")
            self.steps, self.elapsed_s = int(saved["steps"]), float(saved["elapsed_s"])
            self.generator.set_state(saved["generator"])
        except Exception as error:
            # PyTorch does not document which errors a damaged state raises.
            raise CodecError(
                f"the checkpoint holds no training that can go on: {short(error)}; remove it to begin anew"
            ) from None


def _channels_last(segment: Segment) -> Segment:
    """Return a segment in the order in which a CPU's convolutions take half the time, where it has that order."""
    images = all(one.dim() <= 4 for one in (*segment.parameters(), *segment.buffers()))
    return segment.to(memory_format=torch.channels_last) if images else segment


def load(path: Path, key: str) -> dict[str, Any]:
    """Return what ``Training.save()`` wrote, and the student in it.

    Raises:
        CodecError: the file cannot be read, is none of a training, or is one for something else.
    """
    again = f"remove {short(path)} to begin anew, or write to another file"
    try:
        # No pickled code is run: only tensors and plain data are read.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {short(saved['format'])}")
        if saved["key"] != key:
            raise CodecError(f"the training in {short(path)} was for another model, point, sample or share; {again}")
        tensors = {name: tensor.numpy() for name, tensor in saved["student"]["tensors"].items()}
        return {**saved, "student": Student.parsed(saved["student"]["description"], tensors)}
    except CodecError:
        raise
    except Exception as error:
        # PyTorch does not document which errors a damaged file raises.
        raise CodecError(f"{short(path)} holds no training that can go on: {short(error)}; {again}") from None
