"""What the steps of a traced model compute, weights aside, as plain data that is equal in every process and version.

Two machines compare digests of this to know that they mean the same layers. Whether a layer reuses memory changes no
answer, so it is left out: ``relu_(x)`` counts as ``relu(x)``, ``x += y`` as ``x + y``, and ``inplace`` is ignored.

A layer that calls a module or function is known by its type and settings, if these are PyTorch's. The user's own code
counts by what it says (``source``), with all that it reads (``reading``): attributes, closures, global names, hooks.

Of a hook that was followed, what it computes are steps of their own. It counts by these alone, so a hook that computes
nothing, as one that only looks on, makes no difference.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon._cached import cached_property
from torchsurgeon.tracing.digests import part_digest, part_label, tensor_digest
from torchsurgeon.tracing.reading import PLAIN, Part, Reading
from torchsurgeon.tracing.source import code_of, function_of, is_library_code, is_library_module
from torchsurgeon.tracing.specs import Layer, TensorSpec
from torchsurgeon.tracing.step import Constant, Ref, Step, function_name

# How much of a model is told layer by layer; the fingerprint is of all of it.
_MOST_LAYERS = 10_000
_MOST_ASPECTS = 32


class Configuration:
    """What a traced model computes, its weights aside.

    Args:
        ends: the model's inputs and outputs.
        layers: its layers.
        steps: the steps that run.
        names: the name of every step of the program, by index.
        attributes: the names of tensors that the model keeps in plain attributes, by the tensors' ids. They are
            compared as weights, so a step that reads one counts by its name.
        replaced: functions of PyTorch's that a program has replaced by its own.
    """

    def __init__(
        self,
        ends: Sequence[TensorSpec],
        layers: Sequence[Layer],
        steps: Sequence[Step],
        names: Sequence[str],
        attributes: Mapping[int, str],
        replaced: Iterable[Part] = (),
    ) -> None:
        self._ends = [[spec.name, str(spec.dtype), spec.wire_shape] for spec in ends]
        self._shapes = {one.name: [[str(spec.dtype), spec.wire_shape] for spec in one.outputs] for one in layers}
        self._steps = [_step_row(step, names, attributes) for step in steps if step.kind != "input"]
        everywhere = _aspects(Reading({}, global_hooks=any(map(_runs_hooks, steps))))
        if everywhere:
            self._steps.append(["global hooks", "", "", "", [], everywhere])
        others = _aspects(Reading({}, {part.path: part.value for part in replaced}))
        if others:
            self._steps.append(["replaced functions of PyTorch", "", "", "", [], others])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all of it."""
        rows = [*self._ends, *self._shapes.values(), *self._steps]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def layers(self) -> dict[str, Any]:
        """Return by name of each step its type, and a short digest of each aspect of it, for 10,000 steps at most.

        An aspect is ``"arguments"``, ``"settings"``, ``"shapes"``, or what a part of the user's code is called.
        """
        found: dict[str, Any] = {}
        for name, dtype, shape in self._ends:
            found[f"{name} of the model"] = {"type": "tensor", "aspects": {"shapes": _short([dtype, shape])}}
        for row in self._steps[:_MOST_LAYERS]:
            name, kind, *rest = row
            aspects: dict[str, str] = {"shapes": _short(self._shapes[name])} if name in self._shapes else {}
            if len(row) == 2:
                aspects["values"] = kind[:12]
            else:
                aspects["arguments"] = _short(rest[:2])
                aspects |= {"settings": _short(rest[2])} if len(rest) > 2 else {}
            for label, digest in rest[3] if len(rest) > 3 else ():
                key = label if len(aspects) < _MOST_ASPECTS else "others"
                aspects[key] = digest if key != "others" else _short([aspects.get(key), label, digest])
            found[name] = {"type": "constant" if len(row) == 2 else kind, "aspects": aspects}
        return found


def _runs_hooks(step: Step) -> bool:
    """Return whether a step runs the hooks that PyTorch calls for every module, instead of following them."""
    return step.is_module and (not step.bare or any(True for _ in step.target.children()))


def _step_row(step: Step, names: Sequence[str], attributes: Mapping[int, str]) -> list[Any]:
    """Return a step's name, type and settings, and what its code reads, as a list that JSON can hold."""
    if isinstance(step.target, Constant):
        known = attributes.get(id(step.target.tensor))
        return [step.name, constant_digest(step.target) if known is None else f"attribute {known}"]
    row: list[Any] = [step.name, step.type_name, _text(step.args, names), _text(_without_inplace(step.kwargs), names)]
    if step.ambient is not None:
        row[1] += f" under {step.ambient}"
    values: dict[str, Any] = {}
    _own_values("argument", [step.args, step.kwargs], values)
    if step.is_module:
        row.append([[path, type(part).__name__, _settings(part)] for path, part in step.target.named_modules()])
        unhooked = step.target if step.bare else None
        read = _aspects(Reading(dict(step.target.named_modules()), values, unhooked=unhooked))
    else:
        if step.kind == "call" and not isinstance(step.target, str):
            _own_values("function", step.target, values)
        read = _aspects(Reading({}, values)) if values else []
    for path, value in values.items():
        if isinstance(value, torch.Tensor):
            known = attributes.get(id(value))
            read.append([path, tensor_digest(value).digest[:12] if known is None else f"attribute {known}"])
    if read:
        row += [[]] * (5 - len(row))
        row.append(read)
    return row


def _own_values(path: str, value: Any, found: dict[str, Any]) -> None:
    """Add what is the user's own among a call's arguments: tensors, functions and objects."""
    if isinstance(value, (tuple, list)):
        for i, one in enumerate(value):
            _own_values(f"{path}.{i}", one, found)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _own_values(f"{path}.{key}", one, found)
    elif not isinstance(value, (Ref, *PLAIN)) and not _is_library_callable(value):
        found[path] = value


def _is_library_callable(value: Any) -> bool:
    if isinstance(value, nn.Module) or not callable(value):
        return False
    code = code_of(value)
    if code is not None:
        return is_library_code(code) and not function_of(value).__closure__
    # A bound method of a tensor, or a partial, holds what it is called with.
    bound = value.__self__ if isinstance(value, types.BuiltinMethodType) else None
    return not isinstance(value, functools.partial) and not isinstance(bound, torch.Tensor)


def _aspects(reading: Reading) -> list[Any]:
    """Return a label and a short digest of every part that is not told by the settings of PyTorch's modules."""
    rows = [[part_label(part), part_digest(part)] for part in reading.parts if not _is_setting(part)]
    return rows if reading.complete else [*rows, ["more", ""]]


def _is_setting(part: Part) -> bool:
    if not isinstance(part.holder, nn.Module) or not is_library_module(type(part.holder).__module__):
        return False
    value = part.value
    of_library = _is_library_callable(value) or isinstance(value, nn.Module)
    return isinstance(value, (*PLAIN, tuple, list, torch.Tensor, torch.ScriptObject)) or of_library


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def constant_digest(constant: Constant) -> str:
    """Return a hex digest of a constant's dtype, shape and elements.

    A constant that is made in ``forward`` is in no attribute, so the comparison of weights does not see it.
    """
    return tensor_digest(constant.tensor).digest


def _settings(module: nn.Module) -> dict[str, str]:
    """Return a module's constructor arguments that differ from their defaults.

    Defaults are left out because classes of PyTorch gain arguments from version to version, whose defaults change
    nothing.
    """
    found: dict[str, str] = {}
    if not is_library_module(type(module).__module__):
        return found  # what its own code reads is looked at instead
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        value = getattr(module, name, None)
        if (_is_plain(value) or callable(value)) and not isinstance(value, nn.Module) and value != parameter.default:
            found[name] = _text(value)
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
