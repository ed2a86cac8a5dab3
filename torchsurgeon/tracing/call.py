"""How a model is called and what it returns: named tensors in, named tensors out, everything else fixed.

A model may take flags beside tensors, and return tensors inside dicts or objects. Only the tensors travel, by name; all
else keeps the value it has in the traced example.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.step import Ref, Step, restorer, unique
from torchsurgeon.tracing.structure import LeafPath, Structure, flatten, is_mapping, leaf_name, lost_in


class Call:
    """How a model is called: its signature, bound to an example.

    Attributes:
        names: the tensors among the arguments, named after ``forward``'s parameters (``x``, ``images.0``).
        paths: where each of them lies in the arguments.
        fixed: by path, every other leaf of the example (flags, ``None``, numbers); a call must repeat it.
        structure: how the arguments are nested.
        signature: that of the model's ``forward``, without ``self``.

    Raises:
        TraceError: the example does not fit ``forward``, or holds no tensor.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.signature = inspect.signature(type(model).forward)
        parameters = list(self.signature.parameters.values())[1:]
        self.signature = self.signature.replace(parameters=parameters)
        try:
            # A decorated forward may tell an argument that was left out from one that was passed as its default, so
            # ``rebuild`` leaves out what the example left out.
            passed = self.signature.bind(*args, **kwargs).arguments.keys()
            self._left_out = self.signature.parameters.keys() - passed
            self._positional = set(list(self.signature.parameters)[: len(args)])
            arguments = self._bind(args, kwargs)
        except TypeError as error:
            raise TraceError(
                f"the example does not fit {type(model).__name__}.forward{self.signature}: {short(error)}"
            ) from None
        leaves, self.structure = flatten(arguments)
        self.names = [path_name(path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.paths = [path for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.fixed: dict[LeafPath, Any] = {path: leaf for path, leaf in leaves if not isinstance(leaf, torch.Tensor)}
        self._count = len(self.paths)
        given = [leaf for _, leaf in leaves if isinstance(leaf, torch.Tensor)]
        # A parameter is followed as an ordinary tensor; ``questions`` sees to models that ask for it.
        self._kinds = [torch.Tensor if type(tensor) is nn.Parameter else type(tensor) for tensor in given]
        # Whether the example passes ordinary tensors and nothing else, so that other arguments have their defaults.
        self._plain = (
            all(path == (p.name,) for path, p in zip(self.paths, parameters, strict=False))
            and passed == {path[0] for path in self.paths}
            and all(kind is torch.Tensor for kind in self._kinds)
        )
        # PyTorch puts private ones on tensors, for torch.export.
        marked = next(
            (name for name, t in zip(self.names, given, strict=True) if any(not k.startswith("_") for k in t.__dict__)),
            None,
        )
        if marked is not None:
            raise TraceError(
                f"the example's tensor {short(marked, 100)} has attributes of its own, which do not cross; pass what "
                "they hold as separate arguments"
            )
        # Which of the example's tensors are one and the same; a model may ask for that (``key is value``).
        self._same = _sameness(given)
        if not self.names:
            raise TraceError(
                f"the example for {type(model).__name__} holds no tensor; give the tensors the model is called with"
            )

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            else:
                arguments[name] = value
        return arguments

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return a call's tensors in the order of ``names``.

        Raises:
            TypeError: the arguments are nested differently from the example's, differ in what is fixed, or hold
                something else where the example has a tensor.
        """
        # The common case first: tensors only, by position. It needs no look at how the arguments are nested.
        if self._plain and not kwargs and len(args) == self._count and all(type(a) is torch.Tensor for a in args):
            if self._count > 1:
                self._check_sameness(args)
            return list(args)
        leaves, structure = flatten(self._bind(args, kwargs))
        if structure != self.structure:
            raise TypeError(
                "the call's arguments have another structure than the example the model was traced with; "
                "trace the model with an example of this form"
            )
        for path, leaf in leaves:
            if path in self.fixed and not _is_fixed_at(leaf, self.fixed[path]):
                raise TypeError(
                    f"argument {short(path_name(path), 100)} is {short(leaf, 80)}, but the model was traced with "
                    f"{short(self.fixed[path], 80)}; trace it again with the value you need"
                )
        tensors = [leaf for path, leaf in leaves if path not in self.fixed]
        for name, leaf in zip(self.names, tensors, strict=True):
            if not isinstance(leaf, torch.Tensor):
                raise TypeError(
                    f"argument {short(name, 100)} must be a tensor as in the example; got {type(leaf).__name__}"
                )
        for name, tensor, kind in zip(self.names, tensors, self._kinds, strict=True):
            if type(tensor) is not kind and type(tensor) is not nn.Parameter:
                raise TypeError(
                    f"argument {short(name, 100)} is a {type(tensor).__name__}, unlike the example's {kind.__name__}, "
                    f"and a model may ask for that; pass its .as_subclass({kind.__name__}), or trace it again"
                )
        self._check_sameness(tensors)
        return tensors

    def _check_sameness(self, tensors: Sequence[torch.Tensor]) -> None:
        same = _sameness(tensors)
        if same != self._same:
            name = next(n for n, a, b in zip(self.names, same, self._same, strict=True) if a != b)
            raise TypeError(
                f"argument {short(name, 100)} {'is' if len(set(same)) < len(set(self._same)) else 'is not'} the same "
                "tensor as another one, unlike in the example, and a model may ask for that; trace it again with "
                "such an example, or pass a clone of the tensor"
            )

    def rebuild(self, values: Mapping[LeafPath, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call, as ``(args, kwargs)``.

        Args:
            values: by path, what stands in the place of each tensor: a tensor, or a tracer's stand-in for it.
        """
        arguments = self.structure.rebuild(self.fixed | dict(values))
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, value in arguments.items():
            parameter = self.signature.parameters.get(name)
            if name in self._left_out:
                continue
            if parameter is not None and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args += value
            elif name in self._positional:
                args.append(value)
            else:
                kwargs[name] = value
        return args, kwargs


def _is_fixed_at(leaf: Any, known: Any) -> bool:
    """Return whether an argument is what it was in the example. 1, 1.0 and True are equal, and compute otherwise."""
    if leaf is known:
        return True
    # 0.0 and -0.0 are equal, too, and have other texts.
    is_zero = type(leaf) is float and not leaf
    return type(leaf) is type(known) and leaf == known and (not is_zero or repr(leaf) == repr(known))


def _sameness(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return, for each tensor, the place of the first one that is the same object."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)])


def call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that an example stands for, as ``(args, kwargs)``.

    Args:
        example: a tuple of positional arguments, a mapping of keyword arguments (a dict, or what a tokenizer returns),
            or else the only argument.

    Raises:
        TypeError: a key of the mapping is no name of an argument.
    """
    if isinstance(example, tuple):
        return example, {}
    if is_mapping(example):
        named = dict(example)
        unnamed = next((key for key in named if not isinstance(key, str)), None)
        if unnamed is not None:
            raise TypeError(
                "a mapping stands for a call's keyword arguments, so its keys must be texts; got "
                f"{short(unnamed, 100)}; give a tuple with the mapping in it if the model takes it as one argument"
            )
        return (), named
    return (example,), {}


def path_name(path: LeafPath) -> str:
    """Return the dotted name of an argument's leaf."""
    return leaf_name(path[0], path[1:])


def check_result(model: nn.Module, result: Any, is_followed: Callable[[Any], bool] = lambda _: False) -> None:
    """Check that a model's result can be put together again from its tensors and numbers.

    Args:
        model: the model.
        result: what it has returned.
        is_followed: tells of a leaf that is no tensor whether it is followed otherwise.

    Raises:
        TraceError: a part of it would be lost.
    """
    lost = lost_in(result, is_followed)
    if lost is not None:
        raise TraceError(
            f"{type(model).__name__} returns {lost}; a split model returns tensors and numbers, and tuples, lists, "
            "dicts, dataclasses and objects that hold them as attributes: return one of these"
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """The form of a model's result: which leaves are computed, in order, and what the others always are.

    Attributes:
        structure: how the result is nested.
        paths: where the computed leaves (tensors and numbers) lie in it.
        fixed: by path, the leaves that are the same in every call.
        restore: for each computed leaf that is a number, what makes it one again from the tensor it travels as.
    """

    structure: Structure
    paths: tuple[LeafPath, ...]
    fixed: Mapping[LeafPath, Any]
    restore: Mapping[LeafPath, Callable[[torch.Tensor], Any]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The leaves' names: ``output`` for one tensor; ``out``, ``past.0`` by key; ``output.0`` for sequences."""
        by_key = all(path and not path[0].isdigit() for path in self.paths)
        return [path_name(path) if by_key else leaf_name("output", path) for path in self.paths]

    def __call__(self, *leaves: Any) -> Any:
        """Return the model's result with ``leaves`` in their places."""
        return self.structure.rebuild({**self.fixed, **dict(zip(self.paths, leaves, strict=True))})

    def build(self, *tensors: torch.Tensor) -> Any:
        """Return the model's result from its tensors; those that carry numbers become numbers again."""
        if self.structure.kind is None and not self.restore and len(tensors) == len(self.paths) == 1:
            return tensors[0]  # a model that returns one tensor, as most do
        pairs = zip(self.paths, tensors, strict=True)
        return self(*(self.restore[path](t) if path in self.restore else t for path, t in pairs))


def settle_output(steps: list[Step], values: Sequence[Any], device: torch.device) -> bool:
    """Make each leaf of the model's result one tensor or number, now that the steps' values are known.

    Where the model returns a layer's tuple as it is, getitem steps are inserted that take its leaves. A leaf that is
    neither tensor nor number (a dtype, a device) is fixed at its example value.

    Args:
        steps: the traced program; its last step is replaced.
        values: what each step gave for the example.
        device: where the example is, which stands in for the meta device.

    Returns:
        Whether any steps were inserted.
    """
    last = steps.pop()
    output: Output = last.target
    structure, fixed, restore = output.structure, dict(output.fixed), {}
    paths: list[LeafPath] = []
    args: list[Ref] = []
    count = len(steps)
    for path, ref in zip(output.paths, last.args, strict=True):
        leaves, part = flatten(values[ref.step])
        structure = structure.replaced(path, part)
        for inner, leaf in leaves:
            kind = None if isinstance(leaf, torch.Tensor) else restorer(leaf)
            if kind is None and not isinstance(leaf, torch.Tensor):
                fixed[(*path, *inner)] = device if leaf == torch.device("meta") else leaf
                continue
            if kind is not None:
                restore[(*path, *inner)] = kind
            paths.append((*path, *inner))
            args.append(_select(steps, ref, part, inner))
    steps.append(
        dataclasses.replace(
            last, index=len(steps), target=Output(structure, tuple(paths), fixed, restore), args=tuple(args)
        )
    )
    return len(steps) > count + 1


def _select(steps: list[Step], ref: Ref, structure: Structure, path: LeafPath) -> Ref:
    """Append the steps that take the leaf at ``path`` out of a step's value, and return a reference to the last."""
    for key in path:
        place = [str(k) for k in structure.keys].index(key)
        by_name = structure.is_by_attribute
        target, real_key = (getattr, key) if by_name else (operator.getitem, structure.keys[place])
        name = unique("getitem", {step.name for step in steps})
        steps.append(Step(len(steps), name, "call", target, (ref, real_key)))
        ref, structure = Ref(len(steps) - 1), structure.children[place]
    return ref
