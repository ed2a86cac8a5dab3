"""How alike two answers of a model are: cosine similarity, classes of pixels, and boxes that match."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchsurgeon.errors import CodecError, short

if TYPE_CHECKING:
    from torchsurgeon.tracing.specs import TensorSpec

# A box counts where the detector is this sure of it, and is the same where it overlaps this much. Both are customary.
_SURE, _SAME = 0.5, 0.5


def likeness(ones: list[Tensor], others: list[Tensor]) -> float:
    """Return the cosine similarity of two lists of tensors, each taken as one vector.

    It is 1 for equal lists, whatever they hold, and 0 where it is not defined, because one is all zeros or not finite.
    """
    vectors = [(as_real_numbers(one), as_real_numbers(other)) for one, other in zip(ones, others, strict=True)]
    if all(torch.equal(a, b) for a, b in vectors):
        return 1.0
    dot = norm = other_norm = 0.0
    for a, b in vectors:
        dot, norm, other_norm = dot + float(a @ b), norm + float(a @ a), other_norm + float(b @ b)
    length = (norm * other_norm) ** 0.5
    cosine = dot / length if length else 0.0
    return max(-1.0, min(1.0, cosine)) if abs(cosine) < float("inf") else 0.0


def as_real_numbers(tensor: Tensor) -> Tensor:
    """Return a tensor's values as a vector of ``float64``; a complex value is two of them."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.double().flatten()


def predictions(output: Tensor, name: str) -> Tensor:
    """Return the predicted classes: the index of the largest value along dimension 1, or along the only dimension.

    An output of whole numbers or booleans holds the classes themselves.

    Raises:
        CodecError: the output is complex, or has fewer than two values along that dimension, of which the largest
            would always be the same.
    """
    if not output.is_floating_point() and not output.is_complex():
        return output
    along = 1 if output.dim() > 1 else 0
    if output.is_complex() or not output.dim() or output.shape[along] < 2:
        what = "complex" if output.is_complex() else f"of shape {list(output.shape)}"
        raise CodecError(
            f"max_top1_change needs an output with two classes or more along dimension {along}; output {short(name)} "
            f"is {what}. Give min_cosine, accept or score in its place"
        )
    return output.argmax(along)


def several_predictions(answer: Tensor | TensorSpec) -> bool:
    """Return whether an output holds several predictions of one picture, such as its pixels.

    These are not independent of each other, as the predictions of several pictures are.

    Args:
        answer: the output, or how it is traced; pictures lie along its first dimension. One of whole numbers or
            booleans holds the classes themselves.
    """
    dtype = answer.dtype
    return math.prod(answer.shape[2 if dtype.is_floating_point or dtype.is_complex else 1 :]) > 1


def pixels_kept(reference: Any, output: Any) -> float:
    """Return the share of pixels whose class stays the same, for a budget's ``score``.

    Args:
        reference: the model's own answer: a tensor (N, classes, H, W), or a dict or sequence that begins with one, as
            torchvision's segmentation models return it. A tensor of whole numbers holds the classes themselves.
        output: the answer behind the codec.

    Raises:
        CodecError: the answer is something else.
    """
    one, other = _classes_of_pixels(reference), _classes_of_pixels(output)
    return float((one == other).double().mean())


def _classes_of_pixels(answer: Any) -> Tensor:
    while isinstance(answer, Mapping | list | tuple) and len(answer):
        answer = next(iter(answer.values() if isinstance(answer, Mapping) else answer))
    if isinstance(answer, Tensor) and answer.is_floating_point() and answer.dim() == 4:
        return answer.argmax(1)
    if isinstance(answer, Tensor) and answer.numel() and not answer.is_floating_point() and not answer.is_complex():
        return answer
    raise CodecError(
        f"pixels_kept needs an answer of shape (N, classes, H, W), or whole numbers; got {_described(answer)}. Give a "
        "score of your own"
    )


def boxes_matched(reference: Any, output: Any) -> float:
    """Return the share of boxes that both answers have, for a budget's ``score``.

    Boxes count where their score is at least 0.5. Two boxes match if their labels are equal and the area that they
    share is at least half of the area that they cover together. Each box matches at most one. The share is twice the
    number of matches by the number of boxes in both answers; it is 1 where neither has any.

    Args:
        reference: the model's own answer, as torchvision's detectors return it: a dict of ``boxes`` (N, 4) as corners,
            ``labels`` and ``scores``, or a list of such dicts, one an image.
        output: the answer behind the codec.

    Raises:
        CodecError: the answer is something else.
    """
    matches = boxes = 0
    for one, other in zip(_detections(reference), _detections(output), strict=True):
        matches += _matches(*one, *other)
        boxes += len(one[0]) + len(other[0])
    return 2 * matches / boxes if boxes else 1.0


def _detections(answer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Give boxes and labels of each image, the surest first."""
    images = [answer] if isinstance(answer, Mapping) else answer
    if not isinstance(images, Sequence):
        images = [images]
    for image in images:
        if not (isinstance(image, Mapping) and {"boxes", "labels", "scores"} <= set(image)):
            raise CodecError(
                f"boxes_matched needs an answer with boxes, labels and scores for each image; got {_described(image)}. "
                "Give a score of your own"
            )
        order = image["scores"].argsort(descending=True, stable=True)
        order = order[image["scores"][order] >= _SURE]
        yield image["boxes"][order].double().cpu(), image["labels"][order].cpu()


def _matches(boxes: Tensor, labels: Tensor, other_boxes: Tensor, other_labels: Tensor) -> int:
    """Return how many boxes match, where each takes the best that is left, the surest first."""
    shared = torch.minimum(boxes[:, None, 2:], other_boxes[None, :, 2:])
    shared = (shared - torch.maximum(boxes[:, None, :2], other_boxes[None, :, :2])).clamp(min=0).prod(2)
    area, other_area = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, other_boxes))
    overlap = shared / (area[:, None] + other_area[None, :] - shared).clamp(min=1e-12)
    overlap[labels[:, None] != other_labels[None, :]] = 0
    count = 0
    for row in range(len(boxes) if len(other_boxes) else 0):
        best = int(overlap[row].argmax())
        if overlap[row, best] >= _SAME:
            count += 1
            overlap[:, best] = 0
    return count


def _described(answer: Any) -> str:
    return f"{answer.dtype} of shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
