"""Models that ask whether gradients are recorded, and calls that would be answered otherwise than in the trace.

A split model answers as ``model(x)`` does under ``torch.no_grad()``, outside of inference mode, for inputs that need no
gradients. Only there is the answer to each of these questions the same on both sides. A model that asks one of them is
not run in parts where its caller's tensors or settings would answer it otherwise.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchsurgeon.errors import short

# Of an input that needs gradients, these say something else.
OF_TENSORS = frozenset(("requires_grad", "is_leaf", "grad_fn", "retains_grad", "output_nr"))
# Inside of inference mode, these do.
_OF_INFERENCE = frozenset(("is_inference", "is_inference_mode_enabled"))
_RECORDING, _ENABLING = "is_grad_enabled", frozenset(("enable_grad", "set_grad_enabled"))
QUESTIONS = OF_TENSORS | _OF_INFERENCE


def asked_in(functions: Iterable[types.FunctionType], *, whole: bool) -> frozenset[str]:
    """Return the questions that functions may ask, by the names in their code.

    Args:
        functions: a model's functions.
        whole: whether they run in calls. What was only followed has taken the answer of ``torch.no_grad()``.
    """
    names: set[str] = set()
    for function in functions:
        names |= names_in(function.__code__)
    asked = names & (QUESTIONS | {_RECORDING} if whole else QUESTIONS)
    if names & _ENABLING and asked & OF_TENSORS:
        # Inference mode keeps the block that records gradients from doing so.
        asked.add("is_inference")
    return frozenset(asked)


def names_in(code: types.CodeType) -> set[str]:
    """Return the names that a function's code, and that of the functions in it, looks up."""
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


@contextlib.contextmanager
def noticed(asked: set[str], here: Callable[[], bool]) -> Iterator[None]:
    """Note in ``asked`` when the code inside the block asks whether inference mode is on.

    Args:
        asked: gets the name of the question.
        here: whether the code that asks is the one to watch, and not another thread's.
    """
    original = torch.is_inference_mode_enabled

    def is_inference_mode_enabled() -> bool:
        if here():
            asked.add("is_inference_mode_enabled")
        return original()

    torch.is_inference_mode_enabled = is_inference_mode_enabled
    try:
        yield
    finally:
        torch.is_inference_mode_enabled = original


def plain_example(example: Any) -> Any:
    """Return an example whose tensors neither require gradients nor belong to inference mode.

    Args:
        example: the positional and keyword arguments that a model was traced with.
    """
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.clone() if t.is_inference() else t.detach() if t.requires_grad else t,
            example,
        )


def check_asked(asked: frozenset[str], names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Check that a call's tensors and settings answer a model's questions as the trace has them.

    Args:
        asked: what the model may ask.
        names: the names of its input tensors.
        tensors: these tensors.

    Raises:
        TypeError: they do not; the message says what to do.
    """
    about = sorted(asked & OF_TENSORS)
    if about:
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.requires_grad:
                raise TypeError(
                    f"argument {short(name, 100)} requires gradients, and the model asks for that ({about[0]}), but a "
                    f"split model answers for tensors that require none; pass {name}.detach()"
                )
    about = sorted(asked & _OF_INFERENCE)
    if about and (torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors)):
        raise TypeError(
            f"the call stands in torch.inference_mode(), or gets a tensor made there, and the model asks for that "
            f"({about[0]}), but a split model answers as under torch.no_grad(); use that instead, and clone the tensor"
        )
    if _RECORDING in asked and torch.is_grad_enabled():
        raise TypeError(
            "the call records gradients, and a layer that is kept whole asks for that (is_grad_enabled), but a split "
            "model answers as under torch.no_grad(); call it inside of that"
        )
