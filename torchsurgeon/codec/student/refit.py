"""Weights for a thinned head, layer by layer, so that each gives what the model's own layer gives.

A layer that lost inputs can make up for some of them with the others. Least squares find the weights with which it
comes nearest to the model's own layer, from what the layers before it give now. It takes seconds, and no training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchsurgeon.codec.student.thinning import channels_last, watching, weighted_layers
from torchsurgeon.cutting.segment import Segment

# As many places of a layer's output are used; more would hardly change the weights.
_MOST_PLACES = 1 << 14
# The weights are drawn towards the model's own by this share of the inputs' mean square.
_RIDGE = 1e-3


class _Reached(Exception):
    """Ends a run of a head behind the layer whose input is wanted."""


def refit(
    student: Segment,
    own: Segment,
    kept: Mapping[str, Tensor],
    batches: Sequence[Sequence[Tensor]],
    advance: Callable[[], None],
) -> None:
    """Fit the weights of a thinned head to the model's own layers.

    Args:
        student: the thinned head, whose weights are replaced.
        own: the model's own head.
        kept: by layer, which of the own head's output channels are left.
        batches: the inputs.
        advance: called after each layer.
    """
    theirs = weighted_layers(student)
    places = max(1, _MOST_PLACES // max(1, len(batches)))
    generator = torch.Generator().manual_seed(0)
    chosen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in theirs}

    def target(name: str, _: Tensor, output: Tensor) -> None:
        flat = _places(output, own_layers[name])
        picks = torch.randperm(len(flat), generator=generator)[:places].to(flat.device)
        chosen[name].append((picks, flat[picks][:, kept[name].to(flat.device)]))

    own_layers = weighted_layers(own)
    with torch.no_grad():
        with watching(own_layers, target):
            for inputs in batches:
                own(*inputs)
        for name in _in_order(student, batches[0], theirs):
            layer = theirs[name]
            # A layer that is called twice in a run has no one input, and one of another rank no places to choose.
            if len(chosen[name]) == len(batches) and _refits(layer):
                _solve(layer, _rows(student, name, layer, batches, chosen[name]))
            advance()


def _in_order(student: Segment, inputs: Sequence[Tensor], layers: Mapping[str, nn.Module]) -> list[str]:
    called: list[str] = []
    with watching(layers, lambda name, *_: called.append(name)):
        student(*inputs)
    return list(dict.fromkeys(called))


def _refits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, nn.Conv2d):
        return False
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and (layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels)


def _places(output: Tensor, layer: nn.Module) -> Tensor:
    """Return what a layer gives as [places, channels]."""
    if channels_last(layer):
        return output.detach().flatten(0, -2)
    return output.detach().flatten(2).movedim(1, 2).flatten(0, 1)


def _rows(
    student: Segment,
    name: str,
    layer: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    chosen: Sequence[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give what a layer reads at the chosen places [places, channels, kernel], and what it should give there."""
    seen: list[Tensor] = []

    def stop(_: str, given: Tensor, __: Tensor) -> None:
        seen.append(given.detach())
        raise _Reached

    for inputs, (picks, wanted) in zip(batches, chosen, strict=True):
        seen.clear()
        with watching({name: layer}, stop), contextlib.suppress(_Reached):
            student(*inputs)
        yield _patches(seen[0], layer, picks), wanted


def _patches(given: Tensor, layer: nn.Module, picks: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return given.flatten(0, -2)[picks][..., None]
    assert isinstance(layer, nn.Conv2d)
    channels = given.shape[1]
    patches = nn.functional.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return patches.movedim(1, 2).flatten(0, 1)[picks].view(len(picks), channels, -1)


def _solve(layer: nn.Module, rows: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Replace the weights of a layer by those with the least squared error."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    depthwise = getattr(layer, "groups", 1) > 1
    products: Tensor | float = 0.0
    targets: Tensor | float = 0.0
    for patches, wanted in rows:
        # One problem for each channel [C, places, kernel], or one for all.
        given = (patches.movedim(1, 0) if depthwise else patches.flatten(1)[None]).double()
        if isinstance(bias, Tensor):
            given = torch.cat([given, torch.ones_like(given[..., :1])], -1)
        goal = (wanted.T[..., None] if depthwise else wanted[None]).double()
        products = products + given.mT @ given
        targets = targets + given.mT @ goal
    assert isinstance(products, Tensor)
    before = (weight.flatten(1)[..., None] if depthwise else weight.flatten(1).T[None]).double()
    if isinstance(bias, Tensor):
        constant = bias.double()[:, None, None] if depthwise else bias.double()[None, None]
        before = torch.cat([before, constant], 1)
    mean = products.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    ridge = _RIDGE * mean[:, None, None] * torch.eye(products.shape[1], dtype=torch.float64, device=products.device)
    found = torch.linalg.solve(products + ridge, targets + ridge @ before)
    if not bool(torch.isfinite(found).all()):
        return
    if isinstance(bias, Tensor):
        bias.copy_(found[:, -1].flatten())
        found = found[:, :-1]
    weight.copy_((found[..., 0] if depthwise else found[0].T).reshape(weight.shape))
