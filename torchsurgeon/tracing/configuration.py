"""What a step of a traced model computes, its weights aside, as plain data that is equal in every process and version.

Two machines compare digests of this to know that they mean the same layers. Whether a layer reuses memory changes no
answer, so it is left out: ``relu_(x)`` counts as ``relu(x)``, ``x += y`` as ``x + y``, and ``inplace`` is ignored.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.tracing.step import Constant, Ref, Step, function_name


def configuration(step: Step, names: Sequence[str]) -> list[Any]:
    """Return a step's name, type and settings as a list that JSON can hold.

    Args:
        step: the step.
        names: the name of every step of the program, by index.
    """
    row: list[Any] = [step.name, step.type_name, _text(step.args, names), _text(_without_inplace(step.kwargs), names)]
    if step.is_module:
        row.append([[path, type(part).__name__, _settings(part)] for path, part in step.target.named_modules()])
    return row


def constant_digest(constant: Constant) -> str:
    """Return a hex digest of a constant's dtype, shape and elements.

    A constant is in no state dict, so the comparison of weights does not see it.
    """
    tensor = constant.tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, str]:
    """Return a module's constructor arguments that differ from their defaults; for a user's class all plain attributes.

    Defaults are left out because classes of PyTorch gain arguments from version to version, whose defaults change
    nothing.
    """
    found: dict[str, str] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        value = getattr(module, name, None)
        if (_is_plain(value) or callable(value)) and not isinstance(value, nn.Module) and value != parameter.default:
            found[name] = _text(value)
    if not type(module).__module__.startswith("torch."):
        found |= {k: _text(v) for k, v in sorted(vars(module).items()) if not k.startswith("_") and _is_plain(v)}
    for unused in ("inplace", "training"):
        found.pop(unused, None)
    return found


def _is_plain(value: Any) -> bool:
    """Return whether a value is written the same in every process."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype))


def _without_inplace(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "inplace"}


def _text(value: Any, names: Sequence[str] = ()) -> str:
    """Return a text of a setting that is equal in every process and version of PyTorch."""
    if isinstance(value, Ref):
        return f"<{names[value.step]}>"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(v, names) for v in value)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_text(v, names)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"[{_text(value.start, names)}:{_text(value.stop, names)}:{_text(value.step, names)}]"
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout)):
        return str(value)
    # The text of another object may hold its address.
    return function_name(value) if callable(value) else type(value).__name__
