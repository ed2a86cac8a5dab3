"""Why a model cannot be followed: errors of the recorder, and the message that names the user's line."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from torch import nn

from torchsurgeon.errors import TraceError, short

_LIBRARY = str(FilePath(torch.__file__).parent) + os.sep
_THIS_PACKAGE = str(FilePath(__file__).parent) + os.sep


class UnfollowedError(TraceError):
    """The model cannot be recorded.

    Args:
        message: what the user reads.
        module_path: the innermost module that failed; empty at the root.
        line: the line and the reason in one line, for ``LayerGraph.opaque``.

    Attributes:
        asks_whether_compiling: whether the model asks ``torch.compiler.is_compiling()``.
    """

    def __init__(self, message: str, module_path: str, line: str) -> None:
        super().__init__(message)
        self.module_path, self.line = module_path, line
        self.asks_whether_compiling = False


class Refusal(Exception):
    """Something that leaves no trace; whoever catches it in the model's own code does not change that."""


class NeedsElements(Exception):
    """A call cannot be made without the elements of tensors."""


class NeedsDevice(NeedsElements):
    """A call gives another dtype on the meta device than on a real one."""


def keeps_state(model: nn.Module, names: Sequence[str]) -> str:
    """Return the message for a model whose calls depend on earlier ones."""
    return (
        f"{type(model).__name__} keeps state between calls: a call reads what an earlier one left in "
        f"{', '.join(map(repr, names[:5]))}, so its answer depends on the calls before, and device and server would "
        "drift apart. Pass the state in and return it, or compute what is kept in __init__"
    )


def unfollowed(model: nn.Module, where: str, error: BaseException) -> TraceError:
    """Return the error that names the user's line: the last frame outside of PyTorch and torchsurgeon.

    Args:
        model: the model.
        where: the path of the innermost module that failed; empty at the root.
        error: what went wrong.
    """
    if isinstance(error, TraceError):
        return error
    owner = model.get_submodule(where) if where else model
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_LIBRARY, _THIS_PACKAGE))
    ]
    reason = short(str(error).strip() or type(error).__name__, quote=False)
    lines = [f"{type(model).__name__} cannot be followed: {reason}"]
    if frames:
        frame = frames[-1]
        code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()[:300]
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n    {code}')
        reason = f"{os.path.basename(frame.filename)}:{frame.lineno}: {code}: {reason}"
    if where:
        lines.append(
            f"What to try: keep {where!r} ({type(owner).__name__}) whole, as one layer: leaf_modules=[{where!r}]"
        )
    else:
        lines.append(
            "What to try: move the line's control flow into a submodule and keep that whole with leaf_modules=[…], "
            "or make it depend on configuration, not on the values of a tensor"
        )
    return UnfollowedError("\n".join(lines), where, reason)
