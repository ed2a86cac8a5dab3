"""Which models and calls can be traced at all, found out before anything of them runs.

What is refused here would fail later with an error of PyTorch's that names neither the module nor the remedy, or would
be answered differently by a split model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.crossing import obstacle, sparse_or_nested
from torchsurgeon.tracing.structure import FIXED, flatten

_INSIDE = "trace the model inside it: its attribute 'module'"
_GATHERED = "gather the weights into a plain copy of the model, and trace that"
# Wrappers that spread a model over devices or processes, by the name of their class, and what to trace instead. They
# are known by name because importing torch.distributed takes long, and deepspeed may not be installed.
_WRAPPERS = {
    "torch.DataParallel": _INSIDE,
    "torch.DistributedDataParallel": _INSIDE,
    "torch.FullyShardedDataParallel": _GATHERED,
    "torch.FSDPModule": _GATHERED,
    "deepspeed.DeepSpeedEngine": _INSIDE,
}
# Says why a SplitModule, whose tail runs on a server, is refused wherever a module is to be traced.
SPLIT_MODULE = "a SplitModule cannot be traced; trace its .model"
_CACHES = "transformers.cache_utils"


def admit(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, verify: bool = False) -> None:
    """Refuse a model or a call that cannot be traced; nothing of the model runs, and nothing is changed.

    Args:
        model: the model, without the wrapper of ``torch.compile``.
        args: the positional arguments of the example.
        kwargs: its keyword arguments.
        verify: whether the model is going to be run on the example, for which it needs weights with values.

    Raises:
        TraceError: the message names the module, weight or argument, and what to do.
    """
    for path, module in model.named_modules():
        _admit_module(model, path, module)
    for kind, table in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in table:
            _admit_weight(model, f"{kind} {short(name, 100)} of {_name(model)}", tensor, verify)
    for key, value in [*enumerate(args), *kwargs.items()]:
        what = f"argument {short(key, 100)} of the example for {_name(model)}"
        for part in _parts(value):
            _admit_argument(what, part, verify)


def is_split(module: nn.Module) -> bool:
    """Return whether a module is a ``SplitModule``, which is of a room above this one."""
    return any(base.__module__ == "torchsurgeon.module.split" for base in type(module).__mro__)


def refuse_changed_arguments(
    model: nn.Module, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], given: Collection[torch.Tensor]
) -> None:
    """Refuse a model that has changed the containers among its arguments, as one does that fills a cache.

    A split model is called with the caller's containers, but its parts only get the tensors in them. So the caller's
    containers would stay as they were.

    Args:
        model: the model.
        call: how it is called.
        args: the positional arguments after the model has run on them.
        kwargs: the keyword arguments, likewise.
        given: the tensors that were among them before, in the order of ``call.names``.

    Raises:
        TraceError: an argument differs from what it was.
    """
    try:
        now = call.tensors(tuple(args), kwargs)
        same = all(a is b for a, b in zip(now, given, strict=True))
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TraceError(
            f"{_name(model)} changes a list, dict or object among its arguments, such as a cache that it fills. A "
            "split model sends only the tensors, so the caller's object would stay as it was. Return the new values "
            "from forward instead, and pass them in as tensors at the next call"
        )


def _admit_module(model: nn.Module, path: str, module: nn.Module) -> None:
    what = f"module {short(path, 100)} of {_name(model)}" if path else f"the model ({_name(model)})"
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"{what} was compiled or loaded by torch.jit, which hides what it calls and which values it depends on; "
            "trace the module that it was made of, as it was before torch.jit.script or torch.jit.trace"
        )
    if is_split(module):
        raise TraceError(f"{what} is a SplitModule: {SPLIT_MODULE}" if path else SPLIT_MODULE)
    for base in type(module).__mro__:
        remedy = _WRAPPERS.get(f"{base.__module__.partition('.')[0]}.{base.__name__}")
        if remedy is not None:
            raise TraceError(f"{what} is a {base.__name__}, which spreads a model over devices or processes; {remedy}")


def _admit_weight(model: nn.Module, what: str, tensor: torch.Tensor, verify: bool) -> None:
    if is_lazy(tensor):
        raise TraceError(
            f"{what} has no shape before the first call, because its layer is lazy; run the model once on an example, "
            "then trace it"
        )
    if hasattr(tensor, "full_tensor"):
        raise TraceError(f"{what} is distributed over processes (DTensor); {_GATHERED}")
    form = sparse_or_nested(tensor)
    # Weights of a subclass, as of a quantized layer, compute on both sides and never cross.
    if form is not None and (tensor.is_nested or tensor.layout is not torch.strided):
        raise TraceError(
            f"{what} is {form}; device and server compare the bytes of dense weights only. Keep it as a dense tensor, "
            "and convert it in forward"
        )
    if verify and tensor.device.type == "meta":
        raise TraceError(
            f"{what} is on the meta device and has no values, so the trace of {_name(model)} cannot be compared with "
            "the model; load its weights first, or trace it with verify=False"
        )


def _admit_argument(what: str, value: Any, verify: bool) -> None:
    if isinstance(value, torch.Tensor):
        form = obstacle(value)
        if form is not None:
            raise TraceError(f"{what} is {form}, which is not sent; give a dense tensor, and convert it in forward")
        if verify and value.device.type == "meta":
            raise TraceError(
                f"{what} is on the meta device and has no values, so the trace cannot be compared with the model; give "
                "a tensor with values, or trace with verify=False"
            )
    elif isinstance(value, nn.Module) and _packs_weights(value):
        raise TraceError(
            f"{what} is a {_name(value)} that keeps its weights packed, as quantized modules do, and device and server "
            "compare those of the model's own modules only. Make it a submodule of the model"
        )
    elif isinstance(value, PackedSequence):
        raise TraceError(
            f"{what} is a PackedSequence, whose form depends on the values of its lengths; give the padded tensor and "
            "the lengths, and call pack_padded_sequence in forward"
        )
    elif any(base.__module__ == _CACHES for base in type(value).__mro__):
        raise TraceError(
            f"{what} is a {type(value).__name__}, which the model fills while it runs. A split model sends only "
            "tensors, so the caller's cache would stay as it was. Call the model with use_cache=False and without it"
        )
    elif not isinstance(value, (*FIXED, tuple, list, Mapping)) and flatten(value)[1].kind is None:
        raise TraceError(
            f"{what} is a {type(value).__name__}: an object without tensors, whose state may change from call to call "
            "and is not sent. Give tensors, numbers, texts, or tuples, lists, dicts or dataclasses of these"
        )


def _packs_weights(module: nn.Module) -> bool:
    return any(isinstance(value, torch.ScriptObject) for one in module.modules() for value in vars(one).values())


def _parts(value: Any) -> Iterator[Any]:
    """Return a value and what it holds, from the outside in."""
    yield value
    if isinstance(value, PackedSequence) or any(base.__module__ == _CACHES for base in type(value).__mro__):
        return
    if isinstance(value, Mapping):
        items: Collection[Any] = value.values()
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = value
    else:
        structure = flatten(value)[1]
        items = [getattr(value, key) for key in structure.keys]
    for item in items:
        yield from _parts(item)


def _name(model: nn.Module) -> str:
    return getattr(model, "original_name", type(model).__name__)
