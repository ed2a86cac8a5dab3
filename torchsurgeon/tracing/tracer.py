"""Turn a model and an example of its input into a ``LayerGraph``.

``trace()`` records the model or follows it by torch.export, learns shapes and which tensors share memory from meta
tensors, and then runs model and steps to see that they give the same answer.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import _pop_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

from torchsurgeon.errors import TraceError, UnrepeatableWarning, short, warn_caller
from torchsurgeon.tracing.admission import admit, is_split
from torchsurgeon.tracing.alone import alone
from torchsurgeon.tracing.call import Call, settle_output
from torchsurgeon.tracing.capture import Captured, Ways
from torchsurgeon.tracing.flow import DataFlow
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.shapes import (
    MetaModel,
    RealModel,
    Shapes,
    propagate,
    tensors_in,
    with_selections,
    without_elements,
)
from torchsurgeon.tracing.specs import Specs
from torchsurgeon.tracing.state import State, left_as_it_was
from torchsurgeon.tracing.step import Step
from torchsurgeon.tracing.verify import LeavesOut, Mismatch, Unrepeatable
from torchsurgeon.tracing.verify import verify as verify_steps

_count_function_modes = torch._C._len_torch_function_stack
_count_dispatch_modes = torch._C._len_torch_dispatch_stack


def trace(
    model: nn.Module,
    *example_args: Any,
    leaf_modules: Collection[str | type[nn.Module]] = (),
    verify: bool = True,
    **example_kwargs: Any,
) -> LayerGraph:
    """Trace ``model``, called with the example, into a ``LayerGraph``.

    The model is called, and its calls of PyTorch are recorded. Where that fails it is followed by torch.export, and
    where that fails too, it is recorded with the modules that cannot be followed kept whole. A model that
    ``torch.compile`` wrapped is traced unwrapped.

    Then the model and what was traced both run, on the example, on other values, and on one more sample where the
    batch is free. If their bits differ, the next way is tried; ``LayerGraph.verified`` says what was compared.

    Other threads may call the model meanwhile, unless its ``forward`` assigns attributes, or fills dicts or lists, or
    it is followed by torch.export. Their calls then raise ``TraceError`` as soon as that is known. Before, and where a
    call had begun before ``trace()``, it may read what tracing leaves in the model, and the model may be refused as one
    that keeps state. So do not call such a model in other threads while it is traced for the first time.

    Dimension 0 of the input tensors is the batch if it has the same size in all of them that have dimensions.

    Args:
        model: the model, in eval mode. It is left as it was.
        *example_args: the positional arguments that the model is called with.
        leaf_modules: modules to keep whole, as one layer each, by path or class.
        verify: whether to run the model and compare. Without it nothing is computed, unless shapes depend on values;
            so a model can be traced where it cannot run. A model that asks whether it is compiled, to test no values
            then, is trusted to give the same answer either way.
        **example_kwargs: the keyword arguments that the model is called with.

    Raises:
        TraceError: the model is in training mode, cannot be followed (the message names the line and what to try),
            changes its own parameters or buffers while it runs, keeps state between calls, has dropout left on, or
            answers otherwise than what was traced (the message names the first layer that differs).

    Warns:
        UnrepeatableWarning: the model draws random numbers, or its answers differ from run to run.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes an nn.Module; got {type(model).__name__}; call trace(model, example)")
    if not is_split(model):
        model = getattr(model, "_orig_mod", model)
    admit(model, example_args, example_kwargs, verify=verify)
    _refuse_training(model)
    with alone(model), left_as_it_was(model) as state, _random_numbers_kept(), _modes_kept():
        call = Call(model, example_args, example_kwargs)
        tensors = call.tensors(example_args, example_kwargs)
        return _traced(model, call, tensors, leaf_modules, verify, state)


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave all generators of random numbers as they are: PyTorch's, NumPy's and Python's."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextlib.contextmanager
def _modes_kept() -> Iterator[None]:
    """Leave no mode behind that sees this thread's operators, also where Ctrl-C comes just as one is to be ended."""
    functions, dispatches = _count_function_modes(), _count_dispatch_modes()
    try:
        yield
    finally:
        while _count_function_modes() > functions:
            _pop_mode()
        while _count_dispatch_modes() > dispatches:
            _pop_dispatch_mode()


def _traced(
    model: nn.Module,
    call: Call,
    tensors: list[torch.Tensor],
    leaf_modules: Collection[str | type[nn.Module]],
    verifying: bool,
    state: State,
) -> LayerGraph:
    ways = Ways(model, call, tensors, leaf_modules, state)
    for captured in ways:
        try:
            graph = _graph(model, call, tensors, captured)
        except TraceError:
            raise
        except Exception as error:
            # torch.export may leave calls that only make sense inside of it, such as those of torch.func.
            ways.failed("", f"{captured.traced_by}: the traced steps do not run: {short(error)}")
            continue
        if not verifying:
            return graph
        try:
            graph.verified = verify_steps(
                model,
                call,
                graph.steps,
                tensors,
                graph.batch_free,
                layouts=captured.traced_by == "export",
                masks=captured.as_compiled,
                whole=captured.opaque,
                check_values=captured.check_values,
                noted=functools.partial(setattr, graph, "left"),
            )
        except Unrepeatable:
            if not graph.shapes.random:
                if tensors[0].device.type == "cpu":
                    raise TraceError(
                        f"{type(model).__name__} answers differently from run to run, although no layer draws random "
                        "numbers: it reads something outside of its tensors, such as the random numbers of Python or "
                        "NumPy, the time, a counter or an iterator; pass that in as a tensor"
                    ) from None
                warn_caller(
                    f"the answers of {type(model).__name__} to one input differ from run to run, and so do those of "
                    "the split model",
                    UnrepeatableWarning,
                )
        except Mismatch as mismatch:
            reason = f"{captured.traced_by}: {mismatch}"
            ways.failed(mismatch.module_path, reason, leaves_out=isinstance(mismatch, LeavesOut))
            continue
        return graph
    raise TraceError("\n".join(dict.fromkeys(ways.reasons)))


def _graph(model: nn.Module, call: Call, tensors: list[torch.Tensor], captured: Captured) -> LayerGraph:
    steps = captured.steps
    shapes, source, values_decide = captured.shapes, captured.source, captured.values_decide
    if shapes is None or source is None:
        try:
            source = MetaModel(model)
            shapes = propagate(steps, tensors, source)
        except TraceError:
            raise
        except Exception:
            # A step needs the values of tensors, not only their shapes, or fails. Running the example for real gives
            # the shapes, or the error that the user would see.
            source, values_decide = RealModel(model), True
            shapes = propagate(steps, tensors, source)
    if settle_output(steps, shapes.values, tensors[0].device):
        shapes = with_selections(steps, shapes)
    # A second pass with one more sample shows which dimensions follow the batch, and by how much.
    sizes = {t.shape[0] for t in tensors if t.dim()}
    more = None
    if len(sizes) == 1 and _any_batch(captured, tensors):
        alike = [t if isinstance(source, RealModel) else without_elements(t) for t in tensors]
        more = _try_propagate(steps, list(map(_one_more, alike)), source, shapes)
    _refuse_randomness([steps[i] for i in shapes.random])
    flow = DataFlow(steps, shapes, model)
    if not flow.layers:
        raise TraceError(
            f"{type(model).__name__} computes nothing from its input, so there is no layer to cut after; trace a model "
            "that calls a layer or function on its input"
        )
    specs = Specs(shapes, more, (next(iter(sizes)) if more is not None else 1) or 1, values_decide)
    graph = LayerGraph(model, call, captured, flow, specs)
    try:
        graph.check_memory(tensors)
    except TypeError as error:
        raise TraceError(f"the example for {type(model).__name__} cannot be traced: {error}") from None
    return graph


def _one_more(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with one more sample, and the same order of dimensions in memory."""
    if not tensor.dim():
        return tensor
    if tensor.is_meta and tensor.is_contiguous():
        # Without PyTorch's own ``cat``, whose first call on the meta device takes a second to import what it needs.
        return torch.empty((tensor.shape[0] + 1, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
    return torch.cat([tensor[:1], tensor])


def _any_batch(captured: Captured, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether batches of other sizes take the same path through the model's source as the example."""
    try:
        # Some models take another path for batches of 64 and more, whose calls are then refused.
        for extra in (1, 31):
            more = [
                torch.empty((t.shape[0] + extra, *t.shape[1:]), dtype=t.dtype, device="meta") if t.dim() else t
                for t in tensors
            ]
            if captured.guard is not None:
                captured.guard(more)
    except TypeError:
        return False
    return True


def _try_propagate(
    steps: Sequence[Step], tensors: list[torch.Tensor], source: MetaModel, like: Shapes
) -> Shapes | None:
    """Return the shapes for other inputs; None where the model does not take them or gives tensors of other ranks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = propagate(steps, tensors, source, count_flops=False)
    except Exception:
        return None
    for one, other in zip(like.values, more.values, strict=True):
        pair = tensors_in(one), tensors_in(other)
        if len(pair[0]) != len(pair[1]) or any(a.dim() != b.dim() for a, b in zip(*pair, strict=True)):
            return None
    return more


def _refuse_randomness(drawing: list[Step]) -> None:
    """Raise for dropout that is left on; warn of other steps that draw random numbers."""
    for step in drawing:
        if "dropout" in step.type_name:
            raise TraceError(
                f"layer {step.name!r} drops values at random although the model is in eval mode: pass "
                "training=self.training to it, or remove it"
            )
    if drawing:
        names = ", ".join(repr(step.name) for step in drawing[:5])
        draw = "draws" if len(drawing) == 1 else "draw"
        warn_caller(
            f"{names} {draw} random numbers: the model's answers differ from run to run, and so do those of the split "
            "model",
            UnrepeatableWarning,
        )


def _refuse_training(model: nn.Module) -> None:
    name = next((path for path, module in model.named_modules() if module.training), None)
    if name is not None:
        what = f"submodule {name!r} of {type(model).__name__}" if name else type(model).__name__
        raise TraceError(
            f"{what} is in training mode: dropout and batch statistics would make head and tail give other answers "
            "than the model; call model.eval() first"
        )
