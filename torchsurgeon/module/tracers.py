"""Refuses the calls that a tracer makes in order to write down what a module computes.

A tracer would take what comes back from a server for a constant, or the layers that happen to run on this device for
the whole model. So the call raises while it is traced, and not later, when the traced program gives wrong answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.admission import SPLIT_MODULE
from torchsurgeon.tracing.following import follower_here

# What is asked at every inference, looked up once.
_jit_traces = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_count_modes = torch._C._len_torch_dispatch_stack
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_Tensor = torch.Tensor
# Arguments of these types are no tracer's stand-ins for tensors.
_PLAIN = (bool, int, float, str, type(None))


def refuse_tracers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise where a call of a SplitModule is one that a tracer or a transform of functions makes.

    This is called at every inference. Where nothing is traced, it takes less than a microsecond.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments.

    Raises:
        TraceError: the call is traced (torch.jit, torch.fx, torch.export, make_fx, torchsurgeon), transformed
            (torch.func), or gives tensors that have no values.
    """
    # torch.fx gives stand-ins for the tuple and the dict of arguments, too.
    if type(args) is not tuple or type(kwargs) is not dict:
        raise TraceError(SPLIT_MODULE)
    if _jit_traces() is not None or _is_included(_PRE_DISPATCH) or follower_here() is not None:
        raise TraceError(SPLIT_MODULE)
    if _transforms() is not None:
        raise TraceError(
            "a SplitModule cannot be called within vmap, grad and other transforms of torch.func; transform its .model"
        )
    if _count_modes():
        _refuse_modes()
    for value in (*args, *kwargs.values()) if kwargs else args:
        # The common case first: an ordinary tensor.
        if type(value) is not _Tensor or value.is_meta:
            _refuse_stand_in(value)


def _refuse_modes() -> None:
    """Raise where a mode is active that records operators, or runs them without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    tracers = FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode
    if any(isinstance(mode, tracers) for mode in _get_current_dispatch_mode_stack()):
        raise TraceError(SPLIT_MODULE)


def _refuse_stand_in(value: Any) -> None:
    """Raise where an argument is, or holds, what a tracer puts in a tensor's place."""
    kind = type(value)
    if kind is _Tensor or kind is nn.Parameter:
        if value.is_meta:
            raise TraceError(
                f"a tensor of shape {short(tuple(value.shape), 100)} on the meta device has no values, and a "
                "SplitModule computes with values; call its .model"
            )
    elif kind in _PLAIN:
        pass
    elif isinstance(value, (tuple, list)):
        for item in value:
            _refuse_stand_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            _refuse_stand_in(item)
    elif _is_stand_in(value):
        raise TraceError(SPLIT_MODULE)


def _is_stand_in(value: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor
    from torch.fx import Proxy

    return isinstance(value, (FakeTensor, FunctionalTensor, Proxy))
