"""``distill()``: a small network that computes what crosses at a cut, in place of the model's own first layers."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchsurgeon import _allocator, _native, _whole_file
from torchsurgeon.accuracy.sample import check_calls, inputs_of
from torchsurgeon.accuracy.scores import likeness
from torchsurgeon.codec.fitted.answers import AnswerKind, Answers
from torchsurgeon.codec.fitted.codec import FittedCodec
from torchsurgeon.codec.fitted.fit import batches_of, differentiable, fit_codec, joined
from torchsurgeon.codec.fitted.student import Student
from torchsurgeon.codec.student import training
from torchsurgeon.codec.student.refit import refit
from torchsurgeon.codec.student.thinning import count_flops, importances, thin, weighted_layers
from torchsurgeon.codec.student.training import Look, Training, squared_error
from torchsurgeon.codec.student.views import views
from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import CodecError, UnfinishedWarning, is_finite, is_whole, short
from torchsurgeon.models.weights import weight_digests
from torchsurgeon.profiling.origin import device_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

# One input of so many is kept apart, to see how far the student has come.
_APART_EACH = 8
# So many inputs tell which channels count, and what each layer should give.
_MOST_SCORED, _MOST_REFITTED = 128, 64
_LEAST_INPUTS = 16


# Whatever mode the caller is in: inference mode would leave no gradients.
@torch.inference_mode(mode=False)
def distill(
    graph: LayerGraph,
    point: int | str | PartitionPoint,
    sample: Sequence[Any],
    *,
    share: float = 0.1,
    training_s: float = 1800.0,
    name: str | None = None,
    answers: AnswerKind | None = None,
    classes_at: int = 1,
    channels_at: Mapping[str, int] | None = None,
    batch: int = 32,
    draws: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[float, float, str], object] | None = None,
) -> FittedCodec:
    """Make a student head for a cut, with a codec that is fitted to what it gives.

    The student is the model's own head with fewer channels. Its layers are fitted to the model's by least squares. Then
    it is trained on the sample, which needs no labels, to give the boundary tensors that the model's own head gives,
    and so that the model's own tail gives the same answer behind it. The model's own weights stay as they are: the
    server runs the same tail as for any other cut, and the device can still run the model itself. The result changes
    answers, as a lossy codec does, so ``codec.measure()`` has to judge it with other inputs than these.

    Ctrl-C ends the training early, with an ``UnfinishedWarning``; the student is what it was by then.

    Args:
        graph: the traced model.
        point: the partition point.
        sample: calls like the traced example, as ``measure()`` takes them. Of images, random parts are trained on.
        share: the student's floating-point operations over those of the whole model, at most.
        training_s: seconds of training, beside which thinning and fitting take a minute or two.
        name: the first part of the codec's name; that of the point by default.
        answers: what the outputs are, as for ``fit_codec()``.
        classes_at: the dimension of classes, as for ``fit_codec()``.
        channels_at: the dimension of channels, as for ``fit_codec()``.
        batch: how many inputs are trained on at a time, where the model takes batches of any size.
        draws: how many answers are drawn for each input.
        seed: of what is drawn.
        device: where the model runs; the device of its parameters by default.
        checkpoint: a file to which the training is written every minute. If it is there, and of a training for the same
            model, point, sample and share, the training goes on from it. It is left there at the end.
        progress: called as ``progress(done, total, what)``, in seconds of training and with what happens in words.

    Returns:
        A fitted codec with a ``student``. Its file is for both sides.

    Raises:
        CodecError: the sample is too small or unlike the example, nothing at this point can be fitted, the head cannot
            be thinned so far, Torch-Pruning is not installed, or an argument or the checkpoint is not valid.
        PartitionError: the graph has no such point.
        NativeUnavailableError: the compiled extension is missing.
    """
    _native.operators("distilling a student")
    # Training allocates the same large tensors at every step; page faults would take half of its time.
    _allocator.keep_freed_memory()
    place = graph.point(point)
    check_calls(sample)
    if not (is_finite(share) and 0 < share < 1):
        raise CodecError(
            f"share must be between 0 and 1, the student's operations over the model's; got {short(share)}"
        )
    if not (is_finite(training_s) and training_s >= 0):
        raise CodecError(f"training_s must be seconds, 0 or more; got {short(training_s)}")
    if not (is_whole(batch) and 1 <= batch <= 4096):
        raise CodecError(f"batch must be from 1 to 4096; got {short(batch)}")
    if len(sample) < _LEAST_INPUTS:
        raise CodecError(f"a student is distilled from {_LEAST_INPUTS} inputs or more, better 500; got {len(sample)}")
    target = device_of(graph, device)
    fit: dict[str, Any] = {
        "name": name,
        "answers": answers,
        "classes_at": classes_at,
        "channels_at": channels_at,
        "draws": draws,
        "seed": seed,
        "device": target,
    }
    path, key, saved = None if checkpoint is None else Path(checkpoint), "", None
    calls = inputs_of(graph, sample, target)
    if path is not None:
        _whole_file.check_writable(path, CodecError)
        key = _key(graph, place, share, calls, fit)
        saved = training.load(path, key) if path.exists() else None
    if torch.is_autocast_enabled(target.type):
        raise CodecError("a student is distilled in float32; call distill() outside of torch.autocast")
    say = progress or _silent
    say(0, training_s, "fitting the codec's transform")
    codec = fit_codec(graph, place, sample, **fit)
    distilling = _Distilling(graph, place, codec, calls, Answers(graph, answers, classes_at, draws, seed))
    if saved is None:
        student, flops_share = distilling.thinned(share, lambda what: say(0, training_s, what))
        # What a file cannot hold ends it now, and not after the training.
        Student.of(student, flops_share, {}).segment(graph, place.index)
    else:
        student = saved["student"].segment(graph, place.index)
        flops_share = saved["student"].flops_share
    run = Training(
        student,
        distilling.own,
        distilling.names,
        distilling.transforms,
        distilling.variance,
        distilling.tail,
        distilling.answers,
        seed,
    )
    if saved is not None:
        run.resume(saved)
    look = distilling.look(student, run)

    def looked() -> None:
        nonlocal look
        look = distilling.look(student, run)

    def save() -> None:
        if path is None:
            return
        try:
            run.save(path, key, kept())
        except CodecError as error:
            warnings.warn(f"{error}; the training goes on without a checkpoint", UnfinishedWarning, stacklevel=2)

    def kept() -> Student:
        return Student.of(student, flops_share, dataclasses.asdict(look))

    try:
        run.run(
            views(distilling.calls, distilling.together(batch), run.generator),
            training_s,
            report=lambda: say(min(run.elapsed_s, training_s), training_s, str(look)),
            looked=looked,
            save=save,
        )
    except KeyboardInterrupt:
        warnings.warn(
            f"distilling was interrupted after {run.elapsed_s:.0f} of {training_s:.0f} s; the student is as it was then"
            + ("" if path is None else f", and with the checkpoint {short(path)} the training can go on"),
            UnfinishedWarning,
            stacklevel=2,
        )
    looked()
    say(training_s, training_s, f"{look}; fitting the codec to it")
    return fit_codec(graph, place, sample, student=kept(), **fit)


class _Distilling:
    """What one distillation knows of the model."""

    def __init__(
        self, graph: LayerGraph, place: PartitionPoint, codec: FittedCodec, calls: list[list[Tensor]], answers: Answers
    ) -> None:
        self.graph, self.place, self.answers = graph, place, answers
        self.names = [spec.name for spec in place.tensors]
        # Copies, since layers are watched here, and the model may be at work in other threads.
        self.own: Segment = copy.deepcopy(cut(graph, place).head.get_submodule("segment"))  # type: ignore[assignment]
        self.tail = differentiable(tail_for(graph, self.names, flat=True))
        self.transforms = {one.name: one.transform for one in codec.tensors}
        self.calls = [call for k, call in enumerate(calls) if (k + 1) % _APART_EACH]
        # Autograd refuses what was made in inference mode, but takes a copy of it.
        self.calls = [[one.clone() if one.is_inference() else one for one in call] for call in self.calls]
        self._apart = list(batches_of(graph, calls[_APART_EACH - 1 :: _APART_EACH]))
        self._wanted: list[tuple[dict[str, Tensor], list[Tensor]]] = []
        squares, count = 0.0, 0
        with torch.no_grad():
            for inputs in self._apart:
                boundary = dict(zip(self.names, self.own(*inputs), strict=True))
                self._wanted.append((boundary, list(self.tail(*boundary.values()))))
                for tensor, transform in self.transforms.items():
                    found = transform.forward(boundary[tensor])
                    squares, count = squares + float(found.square().sum()), count + found.numel()
        self.variance = max(squares / count, 1e-30)

    def together(self, batch: int) -> int:
        """Return how many calls make a batch of so many inputs."""
        return max(1, batch // self.graph.batch) if joined(self.graph) else 1

    def thinned(self, share: float, say: Callable[[str], object]) -> tuple[Segment, float]:
        """Return the thinned head, with its layers fitted to the model's own, and its share of the operations."""
        example = self.calls[0]
        whole = float(sum(layer.flops for layer in self.graph.layers))
        before = sum(count_flops(self.own, example).values())
        if not whole > 0 or before <= share * whole:
            raise CodecError(
                f"the head at {short(self.place.name)} takes {before / max(whole, 1):.1%} of the model's operations, "
                f"which is not more than the share of {share:.1%}; choose a later point or a smaller share"
            )
        floats = {one.dtype for one in self.own.parameters()}
        if floats != {torch.float32}:
            raise CodecError(
                f"a student is distilled from a head with float32 weights; this one has "
                f"{', '.join(sorted(map(str, floats))) or 'none'}; use model.float()"
            )
        say("choosing the channels that count most")
        own = copy.deepcopy(self.own).requires_grad_(True)
        scored = list(batches_of(self.graph, self.calls[:_MOST_SCORED]))
        scores = importances(own, scored, self._scalars)
        thinned = thin(self.own, example, scores, share * whole)
        fitted = list(batches_of(self.graph, self.calls[:_MOST_REFITTED]))
        total, done = len(weighted_layers(self.own)), 0

        def advance() -> None:
            nonlocal done
            done += 1
            say(f"fitting layer {done} of {total} to the model's own")

        thinned.segment.requires_grad_(False)
        refit(thinned.segment, self.own, thinned.kept, fitted, advance)
        return thinned.segment, thinned.flops / whole

    def _scalars(self, boundary: Sequence[Tensor]) -> Iterator[Tensor]:
        outputs = self.tail(*(one * 1 if one.requires_grad else one for one in boundary))
        for _ in range(self.answers.draws):
            scalar = self.answers.scalar(outputs)
            if scalar is None:
                return
            yield scalar

    def look(self, student: Segment, run: Training) -> Look:
        """Return how far a student has come, on the inputs kept apart."""
        student.eval()
        error = kept = count = 0.0
        with torch.no_grad():
            for inputs, (boundary, outputs) in zip(self._apart, self._wanted, strict=True):
                found = dict(zip(self.names, student(*inputs), strict=True))
                error += float(squared_error(self.transforms, found, boundary)) * len(inputs[0])
                answers = self.tail(*found.values())
                kept += self._kept(outputs, answers) * len(inputs[0])
                count += len(inputs[0])
        return Look(run.steps, run.elapsed_s, error / count / self.variance, kept / count)

    def _kept(self, own: Sequence[Tensor], others: Sequence[Tensor]) -> float:
        dim = self.answers.classes_at
        if dim is None:
            return likeness(list(own), list(others))
        return float((own[0].argmax(dim) == others[0].argmax(dim)).float().mean())


def _silent(done: float, total: float, what: str) -> None:
    """Take notice of nothing."""


def _key(
    graph: LayerGraph, place: PartitionPoint, share: float, calls: Sequence[Sequence[Tensor]], fit: Mapping[str, Any]
) -> str:
    """Return a digest of what a training is for."""
    others = {name: value for name, value in fit.items() if name not in ("name", "device")}
    digest = hashlib.sha256()
    parts = (graph.fingerprint, weight_digests(graph.model).combined, place.index, float(share), others)
    digest.update(repr(parts).encode())
    for call in calls:
        for one in call:
            digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
