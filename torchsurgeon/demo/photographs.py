"""The photographs that the demo classifies: those that come with scikit-learn, or a user's own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from torchsurgeon.demo.lite import SIZES
from torchsurgeon.errors import CodecError, short

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_SIDE = SIZES["lite0"].side


@functools.cache
def labels() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes, in the order of the model's scores."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.DEFAULT.meta["categories"])


def photo() -> Tensor:
    """Return the middle of a photograph that comes with scikit-learn, as ``uint8[1, 3, 224, 224]``."""
    return middle(photographs()["china.jpg"])


def photographs(folder: Path | None = None, most: int = 400) -> dict[str, Any]:
    """Return photographs by the names of their files, as Pillow's images.

    Args:
        folder: where they are; those that come with scikit-learn without it.
        most: how many are read.

    Raises:
        CodecError: the folder or a photograph is not readable, or there is none in it.
    """
    from PIL import Image, ImageOps

    if folder is None:
        from sklearn.datasets import load_sample_images

        sample = load_sample_images()
        return {
            Path(name).name: Image.fromarray(image) for name, image in zip(sample.filenames, sample.images, strict=True)
        }
    found = {}
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        for path in paths[:most]:
            with Image.open(path) as image:
                found[path.name] = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise CodecError(f"the photographs in {short(str(folder))} are not readable: {short(error)}") from None
    if not found:
        raise CodecError(
            f"a folder of photographs must hold some ({', '.join(sorted(_SUFFIXES))}); got {short(str(folder))}"
        )
    return found


def middle(image: Any) -> Tensor:
    """Return the middle of a photograph as the model takes it."""
    from PIL import ImageOps

    return _pixels(ImageOps.fit(image, (_SIDE, _SIDE)))


def parts(images: dict[str, Any], count: int, seed: int) -> list[Tensor]:
    """Return parts of photographs as the model takes them: squares of random size and place, half of them mirrored.

    Args:
        images: the photographs by name.
        count: how many parts; each photograph gives as many as the others.
        seed: other seeds give other parts.
    """
    from PIL import Image

    random = numpy.random.default_rng(seed)
    found = []
    for k in range(count):
        image = list(images.values())[k % len(images)]
        side = random.uniform(0.35, 1) * min(image.size)
        left, top = (random.uniform(0, length - side) for length in image.size)
        part = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        if random.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(_pixels(part))
    return found


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None].contiguous()
