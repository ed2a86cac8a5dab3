"""A user's own images as a sample for a model that takes one image tensor."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from torchsurgeon.errors import CodecError
from torchsurgeon.tracing.graph import LayerGraph

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# ImageNet's, which torchvision's and most other weights were trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_sample(graph: LayerGraph, folder: str | Path, most: int = 32) -> list[Tensor]:
    """Return the images in ``folder`` as calls of the model, the first ``most`` by name.

    The model's one input must be (N, 3, H, W). An image is cut to that shape from its middle and resized. ``uint8``
    inputs get its pixels, others those scaled to 0 … 1 and normalized with ImageNet's mean and deviation. With N above
    one, N images make a call; what is left over is not used.

    Raises :class:`~torchsurgeon.wire.CodecError` for another kind of model, and a folder or image that cannot be
    read.
    """
    batch, height, width = _image_size(graph)
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise CodecError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from None
    images = [_pixels(path, height, width) for path in paths[: most * batch]]
    calls = [torch.stack(images[k : k + batch]) for k in range(0, len(images) - batch + 1, batch)]
    if not calls:
        raise CodecError(
            f"{str(folder)!r} holds {len(paths)} images ({', '.join(sorted(_SUFFIXES))}); one call of the model takes "
            f"{batch}"
        )
    return [_prepared(graph, call) for call in calls]


def image_call(graph: LayerGraph, path: str | Path) -> Tensor:
    """Return one image file as a call of the model, as :func:`image_sample` prepares it; a batch of the same image.

    Raises :class:`~torchsurgeon.wire.CodecError` like :func:`image_sample`.
    """
    batch, height, width = _image_size(graph)
    return _prepared(graph, _pixels(Path(path), height, width).repeat(batch, 1, 1, 1))


def _image_size(graph: LayerGraph) -> tuple[int, int, int]:
    shape = graph.inputs[0].shape
    if len(graph.inputs) != 1 or len(shape) != 4 or shape[1] != 3:
        takes = ", ".join(map(str, graph.inputs))
        raise CodecError(f"images are no sample for this model, which takes {takes}; measure it from Python")
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
            fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height))
    except Exception as error:
        # Pillow documents no closed list of what a damaged file raises.
        raise CodecError(f"the image {str(path)!r} cannot be read: {error}") from None
    return torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1).contiguous()
