"""Thinning a head: fewer channels in the model's own first layers, so that they take a share of its operations.

Which channels go together, because one layer's output is added to another's or normalized, is found by Torch-Pruning
(DepGraph, https://arxiv.org/abs/2301.12900). Which are left out is decided by how much the model's answer depends on
each, beside the operations that it takes: the score of a channel is the mean of the squared sum of activation times
gradient over its places (Molchanov et al., https://arxiv.org/abs/1906.10771), with gradients of the log-likelihood of
answers drawn from the model's own output.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchsurgeon.codec.fitted.student import THINNED
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import CodecError

# At most this share of the operations goes in one round, since what a channel costs depends on how many are left.
_EACH_ROUND = 0.15
_MOST_ROUNDS = 60
# A group of channels keeps this share of them, and so many.
_LEAST_SHARE, _LEAST_CHANNELS = 0.1, 4
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclasses.dataclass
class Thinned:
    """A thinned head.

    Attributes:
        segment: the head with fewer channels.
        kept: by layer with weights, which of its own output channels are left.
        flops: its floating-point operations for the example.
    """

    segment: Segment
    kept: dict[str, Tensor]
    flops: float


def weighted_layers(segment: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a head by name, in the order of its modules."""
    return {name: module for name, module in segment.named_modules() if isinstance(module, _WEIGHTED)}


def channels_last(layer: nn.Module) -> bool:
    """Return whether the channels are the last dimension of what a layer gives, and not the second."""
    return isinstance(layer, nn.Linear)


@contextlib.contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], Any]) -> Iterator[None]:
    """Call ``see(name, input, output)`` after each call of a layer.

    Args:
        layers: the layers by name.
        see: what is called.
    """

    def hook(name: str) -> Any:
        return lambda _, args, kwargs, output: see(name, (*args, *kwargs.values())[0], output)

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def importances(
    segment: Segment, batches: Sequence[Sequence[Tensor]], scalars: Callable[[Sequence[Tensor]], Iterator[Tensor]]
) -> dict[str, Tensor]:
    """Return how much the answer depends on each output channel of each layer with weights, as ``float64``.

    Args:
        segment: the head; its parameters must need gradients.
        batches: the inputs.
        scalars: gives scalars, the gradients of which say how much the answer depends on the boundary tensors that it
            is called with. Where it gives none, channels count by their mean square.
    """
    layers = weighted_layers(segment)
    scores = {name: torch.zeros(len(layer.weight), dtype=torch.float64) for name, layer in layers.items()}  # type: ignore[arg-type]
    seen: list[tuple[str, Tensor]] = []

    def add(name: str, products: Tensor) -> None:
        each = products.movedim(-1 if channels_last(layers[name]) else 1, 1).flatten(2).sum(2)
        scores[name] += each.double().square().sum(0).cpu()

    for inputs in batches:
        seen.clear()
        with torch.enable_grad(), watching(layers, lambda name, _, output: seen.append((name, output))):
            boundary = segment(*inputs)
        drawn = False
        for scalar in scalars(boundary):
            drawn = True
            found = torch.autograd.grad(scalar, [one for _, one in seen], retain_graph=True, allow_unused=True)
            for (name, activation), gradient in zip(seen, found, strict=True):
                if gradient is not None and bool(torch.isfinite(gradient).all()):
                    add(name, (activation * gradient).detach())
        if not drawn:
            for name, activation in seen:
                add(name, activation.detach())
    seen.clear()
    return scores


def count_flops(segment: Segment, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return the floating-point operations of each layer with weights, for one call.

    Args:
        segment: the head.
        inputs: one call's tensors.
    """
    layers = weighted_layers(segment)
    flops = dict.fromkeys(layers, 0.0)

    def add(name: str, _: Tensor, output: Tensor) -> None:
        channels = output.shape[-1 if channels_last(layers[name]) else 1]
        flops[name] += 2.0 * (output.numel() / channels) * layers[name].weight.numel()  # type: ignore[operator]

    with torch.no_grad(), watching(layers, add):
        segment(*inputs)
    return flops


def thin(segment: Segment, inputs: Sequence[Tensor], scores: Mapping[str, Tensor], flops: float) -> Thinned:
    """Return a copy of a head with so few channels that it takes at most ``flops`` operations.

    Args:
        segment: the head. Its boundary tensors keep all their channels.
        inputs: a call's tensors.
        scores: how much the answer depends on each output channel of each layer, by ``importances()``.
        flops: floating-point operations for this call.

    Raises:
        CodecError: it cannot be thinned so far, or Torch-Pruning is not installed.
    """
    pruning = _torch_pruning()
    thinned = Thinned(
        copy.deepcopy(segment), {name: torch.arange(len(scores[name])) for name in weighted_layers(segment)}, 0.0
    )
    thinned.segment.requires_grad_(True)
    expected = [tuple(one.shape) for one in segment(*inputs)]
    can: dict[str, bool] = {}
    for _ in range(_MOST_ROUNDS):
        each = count_flops(thinned.segment, inputs)
        thinned.flops = sum(each.values())
        if thinned.flops <= flops:
            return thinned
        goal = max(flops, (1 - _EACH_ROUND) * thinned.flops)
        before = thinned.flops
        _round(pruning, thinned, inputs, scores, each, thinned.flops - goal, can, expected)
        thinned.flops = sum(count_flops(thinned.segment, inputs).values())
        if thinned.flops >= before:
            break
    raise CodecError(
        f"the head at this point can be thinned to {thinned.flops / 1e6:.3g} million operations, not to "
        f"{flops / 1e6:.3g}; choose a larger share or another point"
    )


@dataclasses.dataclass
class _Group:
    """Channels that can only be left out together.

    Attributes:
        root: the layer by which Torch-Pruning knows it.
        handler: how it prunes it.
        scores: how much the answer depends on each channel.
        flops: the operations that each channel takes.
        members: the layers whose output channels these are.
    """

    root: nn.Module
    handler: Any
    scores: Tensor
    flops: float
    members: list[str]


def _round(
    pruning: Any,
    thinned: Thinned,
    inputs: Sequence[Tensor],
    scores: Mapping[str, Tensor],
    flops: Mapping[str, float],
    surplus: float,
    can: dict[str, bool],
    expected: list[tuple[int, ...]],
) -> None:
    """Leave out the channels that count least for the operations that they take, ``surplus`` operations in all.

    ``can`` holds by layer whether its channels can be left out, as far as that is known.
    """
    graph = _dependencies(pruning, thinned.segment, inputs)
    groups = []
    for group in _groups(pruning, graph, thinned, scores, flops):
        name = group.members[0]
        if name not in can:
            can[name] = _fits(pruning, thinned.segment, group, inputs, expected)
        if can[name]:
            groups.append(group)
    if not groups:
        return
    ratios = torch.cat([group.scores / group.flops for group in groups])
    costs = torch.cat([torch.full_like(group.scores, group.flops) for group in groups])
    order = ratios.argsort()
    reached = int((costs[order].cumsum(0) < surplus).sum())
    threshold = ratios[order[min(reached, len(order) - 1)]]
    for group in groups:
        count = len(group.scores)
        most = count - max(_LEAST_CHANNELS, int(_LEAST_SHARE * count))
        out = group.scores.argsort()[: max(0, min(most, int((group.scores / group.flops <= threshold).sum())))]
        if not len(out):
            continue
        graph.get_pruning_group(group.root, group.handler, out.tolist()).prune()
        stays = torch.ones(count, dtype=torch.bool)
        stays[out] = False
        for name in group.members:
            thinned.kept[name] = thinned.kept[name][stays]


def _groups(
    pruning: Any, graph: Any, thinned: Thinned, scores: Mapping[str, Tensor], flops: Mapping[str, float]
) -> Iterator[_Group]:
    """Give the groups of channels of which some can be left out."""
    layers = weighted_layers(thinned.segment)
    names = {id(module): name for name, module in thinned.segment.named_modules()}
    outward = (
        pruning.prune_conv_out_channels,
        pruning.prune_depthwise_conv_out_channels,
        pruning.prune_linear_out_channels,
    )
    inward = (pruning.prune_conv_in_channels, pruning.prune_linear_in_channels)
    for found in graph.get_all_groups(root_module_types=list(_WEIGHTED)):
        modules = [dependency.target.module for dependency, _ in found]
        known = [module for module in modules if isinstance(module, nn.Module) and id(module) in names]
        grouped = any(1 < getattr(one, "groups", 1) < getattr(one, "in_channels", 1) for one in known)
        strange = any(list(one.parameters(recurse=False)) and not isinstance(one, THINNED) for one in known)
        root = modules[0]
        total, cost, members = None, 0.0, []
        for (dependency, indices), module in zip(found, modules, strict=True):
            name = names.get(id(module), "")
            if name not in layers:
                continue
            own = flops[name]
            if dependency.handler in outward:
                kept = scores[name][thinned.kept[name]]
                if len(kept) != len(indices):
                    strange = True
                    break
                total = kept if total is None else total + kept
                cost += own / len(kept)
                members.append(name)
            elif dependency.handler in inward:
                # Several inputs of a layer behind a flattening belong to one channel.
                inputs_each = int(layers[name].weight.shape[1]) / len(indices) * max(1, len(found[0][1]))  # type: ignore[index]
                cost += own / inputs_each
        if grouped or strange or total is None or cost <= 0:
            continue
        yield _Group(root, found[0][0].handler, total.double(), cost, members)


def _fits(
    pruning: Any, segment: Segment, group: _Group, inputs: Sequence[Tensor], expected: list[tuple[int, ...]]
) -> bool:
    """Return whether the head still runs, and gives tensors of the same shapes, without one channel of a group."""
    trial = copy.deepcopy(segment)
    root = dict(trial.named_modules())[group.members[0]]
    try:
        _dependencies(pruning, trial, inputs).get_pruning_group(root, _handler(pruning, root), [0]).prune()
        with torch.no_grad():
            return [tuple(one.shape) for one in trial(*inputs)] == expected
    except Exception:
        # A view to a size that was traced, say. What else may go wrong in a library is not documented.
        return False


def _handler(pruning: Any, layer: nn.Module) -> Any:
    if isinstance(layer, nn.Linear):
        return pruning.prune_linear_out_channels
    if layer.groups > 1:  # type: ignore[operator]
        return pruning.prune_depthwise_conv_out_channels
    return pruning.prune_conv_out_channels


def _dependencies(pruning: Any, segment: Segment, inputs: Sequence[Tensor]) -> Any:
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return pruning.DependencyGraph().build_dependency(segment, example_inputs=tuple(inputs))


def _torch_pruning() -> Any:
    try:
        import torch_pruning  # type: ignore[import-untyped]
    except ImportError:
        raise CodecError(
            "distilling a student needs the package torch-pruning: pip install 'torchsurgeon[distill]'"
        ) from None
    return torch_pruning
