"""Varied inputs for training: random parts of the images of a sample, mirrored and of other brightness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Of an image's area, and of its width over its height.
_LEAST_AREA, _MOST_RATIO = 0.25, 4 / 3
# Brightness is multiplied by up to this much, and moved by up to this share of the range.
_CONTRAST, _BRIGHTNESS = 0.3, 0.1


def views(calls: Sequence[Sequence[Tensor]], together: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Give varied batches without end.

    Of each batch of images (N, 3, H, W), every image is a random part of one of the sample, scaled to the same size.
    Other inputs are drawn as they are.

    Args:
        calls: the sample's calls, one list of input tensors each.
        together: how many calls make a batch.
        generator: what the draws come from.
    """
    while True:
        picks = torch.randint(len(calls), (together,), generator=generator).tolist()
        inputs = [
            torch.cat(parts) if together > 1 else parts[0] for parts in zip(*(calls[k] for k in picks), strict=True)
        ]
        # Several inputs may belong together, place by place, so only a single image is varied.
        yield [_varied(inputs[0], generator)] if len(inputs) == 1 and _is_image(inputs[0]) else inputs


def _is_image(tensor: Tensor) -> bool:
    floats = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return tensor.dim() == 4 and tensor.shape[1] == 3 and (floats or tensor.dtype == torch.uint8)


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    area, ratio = draw(_LEAST_AREA, 1), draw(-math.log(_MOST_RATIO), math.log(_MOST_RATIO)).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirrored = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * mirrored, high
    theta[:, 0, 2], theta[:, 1, 2] = draw(-1, 1) * (1 - wide), draw(-1, 1) * (1 - high)
    grid = torch.nn.functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    parts = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    if images.dtype != torch.uint8:
        return parts.to(images.dtype)
    factor, shift = (
        one.view(-1, 1, 1, 1).to(images.device)
        for one in (draw(1 - _CONTRAST, 1 + _CONTRAST), draw(-_BRIGHTNESS, _BRIGHTNESS))
    )
    return ((parts - 127.5) * factor + 127.5 + 255 * shift).round().clamp(0, 255).to(torch.uint8)
