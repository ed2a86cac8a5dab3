"""A student head: a small network that computes boundary tensors in place of the model's own first layers.

It is the model's own head with fewer channels and with weights of its own. So what a file holds of it are sizes and
arrays, and the program that it runs is the one that was traced from the model here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchsurgeon.cutting.partition import Head, cut
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import CodecError, is_finite, is_whole, short
from torchsurgeon.tracing.graph import LayerGraph

THINNED = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)
"""Layers that may have fewer channels than the model's own."""
_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
_REMEDY = "distill the student again"


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """The sizes and weights of a student head.

    Attributes:
        sizes: by module of the head, its sizes by attribute, such as ``{"out_channels": 14}``.
        tensors: ``float32`` parameters and buffers by name, as in the head's ``state_dict()``.
        flops_share: its floating-point operations over those of the whole model.
        trained: how far it has come: the fields of ``codec.student.Look``.

    Raises:
        CodecError: a value is not valid.
    """

    sizes: Mapping[str, Mapping[str, int]]
    tensors: Mapping[str, NDArray[numpy.float32]]
    flops_share: float
    trained: Mapping[str, float]

    def __post_init__(self) -> None:
        for path, sizes in self.sizes.items():
            if not all(name in _SIZES and is_whole(size) and size > 0 for name, size in sizes.items()):
                raise CodecError(
                    f"sizes of a student's layer must be positive whole numbers of {', '.join(_SIZES)}; got "
                    f"{short(dict(sizes))} for {short(path)}; {_REMEDY}"
                )
        for name, array in self.tensors.items():
            if array.dtype != numpy.float32 or not numpy.isfinite(array).all():
                raise CodecError(f"{short(name)} of a student must be finite float32 values; {_REMEDY}")
        if not all(is_finite(number) for number in self.trained.values()):
            raise CodecError(f"what is known of a student's training must be numbers; got {self.trained}; {_REMEDY}")
        if not 0 < self.flops_share < 1:
            raise CodecError(f"flops_share of a student must be between 0 and 1; got {self.flops_share}; {_REMEDY}")

    @staticmethod
    def of(head: nn.Module, flops_share: float, trained: Mapping[str, float]) -> Student:
        """Return what there is to keep of a thinned head.

        Args:
            head: the head, made by ``cut()`` and thinned.
            flops_share: its floating-point operations over those of the whole model.
            trained: how far it has come.
        """
        sizes = {
            path: {name: int(getattr(module, name)) for name in _SIZES if hasattr(module, name)}
            for path, module in head.named_modules()
            if isinstance(module, THINNED)
        }
        tensors = {name: one.detach().cpu().numpy().copy() for name, one in floats_of(head).items()}
        return Student(sizes, tensors, flops_share, {name: float(number) for name, number in trained.items()})

    def description(self) -> dict[str, Any]:
        """Return what a file's header says of it."""
        sizes = {path: dict(sizes) for path, sizes in self.sizes.items()}
        return {"sizes": sizes, "flops_share": self.flops_share, "trained": dict(self.trained)}

    @staticmethod
    def parsed(description: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Student:
        """Return the student of a description and arrays.

        Raises:
            CodecError: a value is not valid.
            KeyError: something is missing.
            TypeError: something is of another type.
            ValueError: a number is none.
        """
        sizes = {str(path): dict(sizes) for path, sizes in description["sizes"].items()}
        trained = {str(name): float(number) for name, number in description["trained"].items()}
        return Student(sizes, dict(arrays), float(description["flops_share"]), trained)

    def module(self, graph: LayerGraph, point: int) -> Head:
        """Return the student as a module that is called like the model and returns the boundary tensors as a tuple.

        Args:
            graph: the traced model that it was distilled from.
            point: the index of the partition point.

        Raises:
            CodecError: it does not fit this model.
        """
        return Head(graph, self.segment(graph, point))

    def segment(self, graph: LayerGraph, point: int) -> Segment:
        """Return the student as a module that takes the model's input tensors and returns the boundary tensors.

        Args:
            graph: the traced model that it was distilled from.
            point: the index of the partition point.

        Raises:
            CodecError: it does not fit this model.
        """
        segment = copy.deepcopy(cut(graph, point).head.get_submodule("segment"))
        assert isinstance(segment, Segment)
        known = dict(segment.named_modules())
        for path, sizes in self.sizes.items():
            module = known.get(path)
            if not isinstance(module, THINNED):
                raise self._misfit(graph, f"layer {short(path)} is none that a student has thinned")
            for name, size in sizes.items():
                if not (hasattr(module, name) and size <= getattr(module, name)):
                    raise self._misfit(graph, f"{name} of {short(path)} cannot be {size}")
                setattr(module, name, size)
        own = floats_of(segment)
        if set(own) != set(self.tensors):
            raise self._misfit(graph, "its parameters have other names")
        for name, array in self.tensors.items():
            one = own[name]
            if array.ndim != one.dim() or any(a > b for a, b in zip(array.shape, one.shape, strict=True)):
                raise self._misfit(graph, f"{short(name)} cannot have the shape {list(array.shape)}")
            replace(segment, name, torch.from_numpy(array.copy()).to(one.device))
        segment.requires_grad_(False)
        self._try(graph, segment, point)
        return segment

    def _try(self, graph: LayerGraph, head: Segment, point: int) -> None:
        """Run it once on zeros, so that a misfit is found when it is loaded, and not in a call."""
        device = next((one.device for one in head.parameters()), torch.device("cpu"))
        inputs = [torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in graph.inputs]
        try:
            with torch.no_grad():
                found = head(*inputs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise self._misfit(graph, short(error)) from None
        expected = [(spec.dtype, spec.shape) for spec in graph.point(point).tensors]
        if not all(bool(torch.isfinite(one).all()) for one in found if one.is_floating_point()):
            raise self._misfit(graph, "it gives values that are not finite")
        if [(one.dtype, tuple(one.shape)) for one in found] != expected:
            raise self._misfit(graph, "its boundary tensors have other shapes or dtypes")

    def _misfit(self, graph: LayerGraph, why: str) -> CodecError:
        return CodecError(f"this student does not fit {type(graph.model).__name__}: {why}; {_REMEDY}")


def floats_of(head: nn.Module) -> dict[str, Tensor]:
    """Return by name the floating-point parameters of a head, and buffers that have another size in a thinned one."""
    named: list[tuple[str, Tensor]] = [*head.named_parameters(remove_duplicate=False)]
    for path, module in head.named_modules():
        if isinstance(module, THINNED):
            named += [(f"{path}.{name}", one) for name, one in module.named_buffers(recurse=False)]
    return {name: one for name, one in named if one.is_floating_point()}


def replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of any shape."""
    owner, leaf = module, name
    # A segment registers its modules under dotted names, so the longest prefix that is one is the owner.
    for path, one in module.named_modules():
        if path and name.startswith(f"{path}.") and len(name) - len(path) - 1 < len(leaf):
            owner, leaf = one, name[len(path) + 1 :]
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
