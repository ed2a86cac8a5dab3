"""Samples of a user's own: calls of a model, checked, in two halves, and image files as calls of a model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from torchsurgeon.errors import CodecError, short
from torchsurgeon.tracing.graph import LayerGraph

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp"}
# ImageNet's mean and deviation, with which torchvision's and most other weights were trained.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

T = TypeVar("T")


def check_calls(samples: object) -> None:
    """Raise ``CodecError`` where samples are no list of calls, such as one tensor."""
    if not isinstance(samples, Sequence) or isinstance(samples, str | bytes):
        raise CodecError(
            f"samples must be a list of calls, each like the traced example, such as [image, …]; got "
            f"{type(samples).__name__}; list(tensor.split(batch)) makes calls of one tensor"
        )


def inputs_of(graph: LayerGraph, samples: Sequence[Any], device: torch.device) -> list[list[Tensor]]:
    """Return the input tensors of each sample, on the device. Raise ``CodecError`` for one unlike the example."""
    calls = []
    for index, sample in enumerate(samples):
        args, kwargs = ((), sample) if isinstance(sample, Mapping) else (sample, {})
        args = args if isinstance(args, tuple) else (args,)
        try:
            tensors = graph.tensors_of_call(args, kwargs)
        except TypeError as error:
            raise CodecError(f"sample {index} is not a call like the traced example: {short(error)}") from None
        for spec, tensor in zip(graph.inputs, tensors, strict=True):
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise CodecError(
                    f"sample {index} has {tensor.dtype} of shape {list(tensor.shape)} as {short(spec.name, 100)}; the "
                    f"traced example has {spec.dtype} of shape {list(spec.shape)}. Give samples like the example"
                )
        calls.append([tensor.detach().to(device) for tensor in tensors])
    return calls


def halves(samples: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the samples in two halves: one to set something up with, and one to judge it with. Always the same ones.

    What is set up on samples, such as a codec, is made to do well on them, so these must not judge it. Samples are
    drawn at random, because neighbours in a folder are often alike.

    Args:
        samples: the samples; with an odd number, the second half has one more.
    """
    order = list(samples)
    random.Random(0).shuffle(order)
    return order[: len(order) // 2], order[len(order) // 2 :]


def image_sample(graph: LayerGraph, folder: str | Path, most: int | None = None) -> list[Tensor]:
    """Return the images of a folder as calls of the model, in the order of their names.

    Each image is cropped around its middle to the ratio of the model's input, and resized. A ``uint8`` input gets the
    pixels. Any other input gets them scaled to 0 … 1 and normalized with ImageNet's mean and deviation.

    Args:
        graph: the traced model. Its only input must be (N, 3, H, W). With N above 1, N images make one call, and images
            that do not fill a call are left out.
        folder: where the images are.
        most: the highest number of calls; all images by default.

    Raises:
        CodecError: the model takes something else, or the folder or an image is not readable.
    """
    batch, height, width = _image_size(graph)
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise CodecError(f"the folder {short(str(folder))} is not readable: {error.strerror}") from None
    images = [_pixels(path, height, width) for path in paths[: None if most is None else most * batch]]
    calls = [torch.stack(images[k : k + batch]) for k in range(0, len(images) - batch + 1, batch)]
    if not calls:
        raise CodecError(
            f"one call of the model takes {batch} images; the folder {short(str(folder))} holds {len(paths)} "
            f"({', '.join(sorted(_SUFFIXES))})"
        )
    return [_prepared(graph, call) for call in calls]


def image_call(graph: LayerGraph, path: str | Path) -> Tensor:
    """Return one image file as a call of the model, prepared as by ``image_sample()``.

    Args:
        graph: the traced model. Where it takes a batch, the image is repeated.
        path: the image file.

    Raises:
        CodecError: the model takes something else, or the image is not readable.
    """
    batch, height, width = _image_size(graph)
    return _prepared(graph, _pixels(Path(path), height, width).repeat(batch, 1, 1, 1))


def _image_size(graph: LayerGraph) -> tuple[int, int, int]:
    shape = graph.inputs[0].shape
    if len(graph.inputs) != 1 or len(shape) != 4 or shape[1] != 3:
        inputs = short(", ".join(map(str, graph.inputs)))
        raise CodecError(
            f"image files need a model with one input of shape (N, 3, H, W); this one takes {inputs}. Measure it from "
            "Python, with samples of your own"
        )
    batch, _, height, width = shape
    return batch, height, width


def _prepared(graph: LayerGraph, pixels: Tensor) -> Tensor:
    dtype = graph.inputs[0].dtype
    if dtype == torch.uint8:
        return pixels
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return ((pixels / 255 - mean) / deviation).to(dtype)


def _pixels(path: Path, height: int, width: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(_of_8_bits(ImageOps.exif_transpose(image)).convert("RGB"), (width, height))
    except CodecError:
        raise
    except Exception as error:
        # Pillow does not document which errors a damaged file raises, so all of them are caught.
        raise CodecError(f"the image {short(str(path))} is not readable: {short(error)}") from None
    return torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1).contiguous()


def _of_8_bits(image: Any) -> Any:
    """Return a grey image of 16 bits with 8; Pillow's own conversion would turn everything above 255 white."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = numpy.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise CodecError(
            f"an image must have 8 or 16 bits a channel; got one of Pillow's mode {image.mode!r} with values from "
            f"{values.min()} to {values.max()}; convert it first"
        )
    return Image.fromarray((values >> 8).astype(numpy.uint8))
