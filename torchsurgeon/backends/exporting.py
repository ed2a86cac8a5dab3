"""Parts of a model as graphs of PyTorch's operators, which the runtimes of other projects take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import traceback

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.backends.part import Part
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import BackendError, short
from torchsurgeon.tracing.alone import TRACING
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.kernels import kernels_kept
from torchsurgeon.tracing.step import Environment, Step

_LAYER = "torchsurgeon_layer"


@contextlib.contextmanager
def in_turn(graph: LayerGraph, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Wait until no other thread builds a part or traces a model, and keep others from it in the block.

    What exports and converts keeps its state in PyTorch's global variables and patches ``nn.Module`` meanwhile, as
    tracing does. Two threads would spoil each other's, and the second to end would put back the patch of the first for
    good. Calls of other threads go on, and keep their bits where ``kernels_kept()`` says so.

    Args:
        graph: the traced model.
        tensors: for what a part of it is built.
    """
    with TRACING, kernels_kept(graph.model, tensors):
        yield


def export(part: Part, example: Sequence[Tensor], *, free_batch: bool) -> ExportedProgram:
    """Return a part as a program of ``torch.export``, which takes the part's tensors without its numbers.

    Its nodes know their layers; ``layer_of()`` tells them.

    Args:
        part: the part.
        example: its tensors, numbers included.
        free_batch: whether the program takes any batch size.

    Raises:
        BackendError: a layer, or the part as a whole, cannot be exported; the message names the layer.
    """
    fixed = {i: tensor for i, tensor in enumerate(example) if i in part.numbers}
    follower = _Follower()
    module = _Followed(part.segment.apart(fixed), follower, len(example), frozenset(fixed)).eval()
    free = [
        {dim: Dim.AUTO for dim, step in enumerate(spec.batch_step) if step} if free_batch else {}
        for i, spec in enumerate(part.inputs)
        if i not in part.numbers
    ]
    # Outside of inference mode, whose tensors torch.export does not follow.
    with torch.inference_mode(False), torch.no_grad(), traceback.preserve_node_meta():
        tensors = tuple(tensor.detach().clone().contiguous() for tensor in part.computed(example))
        try:
            return torch.export.export(module, tensors, dynamic_shapes=(tuple(free),), strict=False)
        except Exception as caught:
            error = caught.error if isinstance(caught, _Stopped) else caught
            if by_signal_handler(error):
                raise error from None
            where = "the part " if follower.layer is None else f"layer {short(follower.layer, 100)} "
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
            message = f"{where}cannot be exported: {type(error).__name__}: {lines[0][:200]}"
            raise BackendError(message, follower.layer) from error


def layer_of(program: ExportedProgram, message: str) -> str | None:
    """Return the layer of the first operator of a program that a message of a converter names; None where none is."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        base = name.rpartition(".")[0] if name.count(".") > 1 else name
        if any(form in message for form in (name, f"{base}'", f"{base} ", base.replace(".", "::"))):
            layer = node.meta.get("custom", {}).get(_LAYER)
            if layer is not None:
                return str(layer)
    return None


class _Stopped(Exception):
    """Carries an error of a part out of ``torch.export``, which would print a graph of thousands of lines with it."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.error = error


class _Follower:
    """Marks the operators of each layer with the layer's name, while the part is exported."""

    def __init__(self) -> None:
        self.layer: str | None = None

    def before(self, step: Step, environment: Environment) -> contextlib.AbstractContextManager[Any]:
        self.layer = step.name
        marked = traceback.annotate({_LAYER: step.name})
        marked.__enter__()
        return marked

    def after(self, step: Step, environment: Environment, token: contextlib.AbstractContextManager[Any]) -> None:
        token.__exit__(None, None, None)


class _Followed(nn.Module):
    """A segment that is called without the tensors of its numbers."""

    def __init__(self, segment: Segment, follower: _Follower, size: int, fixed: frozenset[int]) -> None:
        super().__init__()
        self.segment = segment
        self._follower, self._size, self._fixed = follower, size, fixed

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        # What is fixed is not read, whatever stands in its place.
        all_tensors: list[Any] = [None if i in self._fixed else next(given) for i in range(self._size)]
        try:
            environment = self.segment.watched(all_tensors, self._follower)
        except RuntimeError as error:
            raise _Stopped(error) from error
        # What torch.export raises after the last layer is not that layer's fault.
        self._follower.layer = None
        return self.segment.result(environment)
