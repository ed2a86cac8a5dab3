"""What a model may ask of its input tensors besides elements, sizes and dtypes, and calls that would answer otherwise.

A trace is for ordinary tensors: no parameters, none that is lazily conjugated or negated, and none with attributes of
its own. Most models do not tell these from others, and a call with them is cut like any other. A model whose code may
ask for one of these is not run in parts where its caller's tensors would answer it otherwise.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from torchsurgeon.errors import short
from torchsurgeon.tracing.gradients import names_in

_PARAMETERS, _LAZY, _ATTRIBUTES = "whether it is a parameter", "whether it is lazy", "whether it has an attribute"
# By what the code may ask, the names of which one is in code that asks for it.
_ASKING = {
    _PARAMETERS: frozenset(("Parameter", "_is_param", "type", "__class__")),
    _LAZY: frozenset(("is_conj", "is_neg", "resolve_conj", "resolve_neg", "view_as_real")),
    _ATTRIBUTES: frozenset(("getattr", "hasattr", "vars", "__dict__", "AttributeError", "Exception", "Buffer")),
}
# PyTorch puts these on tensors for its compiler.
_OF_THE_COMPILER = "_dynamo"


def asked_of_inputs(functions: Iterable[types.FunctionType]) -> frozenset[str]:
    """Return what functions may ask of the tensors that a model is called with.

    Args:
        functions: the model's functions.
    """
    names: set[str] = set()
    for function in functions:
        names |= names_in(function.__code__)
    return frozenset(question for question, asking in _ASKING.items() if names & asking)


def check_inputs(asked: frozenset[str], names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Check that a call's tensors answer the model's questions as those of the trace do.

    Args:
        asked: what the model may ask.
        names: the names of its input tensors.
        tensors: these tensors.

    Raises:
        TypeError: they do not; the message says what to do.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if type(tensor) is nn.Parameter and _PARAMETERS in asked:
            raise TypeError(
                f"argument {short(name, 100)} is a parameter, and the model may ask for that, but a split model "
                f"answers for tensors that are none; pass {name}.detach()"
            )
        if tensor.__dict__ and _ATTRIBUTES in asked:
            own = next((key for key in tensor.__dict__ if not key.startswith(_OF_THE_COMPILER)), None)
            if own is not None:
                raise TypeError(
                    f"argument {short(name, 100)} has an attribute of its own, {short(own, 100)}, which does not "
                    f"cross, and the model may ask for it; pass {name}.detach()"
                )
        if _LAZY in asked and (tensor.is_conj() or tensor.is_neg()):
            raise TypeError(
                f"argument {short(name, 100)} is lazily conjugated or negated, and the model may ask for that, but a "
                f"split model answers for tensors that are not; pass {name}.resolve_conj().resolve_neg()"
            )
