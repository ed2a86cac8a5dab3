"""From a model to its steps, by torch.fx.

Names come from module paths and from what the model's own source calls, never from what one version's tracer names its
nodes, so that two machines with different PyTorch versions mean the same layer by the same name.
"""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import operator
import os
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import fx, nn

from torchsurgeon.errors import TraceError
from torchsurgeon.program import Constant, Ref, Step, function_name, number_to_tensor, restorer
from torchsurgeon.structure import Path, Structure, flatten, leaf_name

_LIBRARY = str(FilePath(torch.__file__).parent) + os.sep
_HERE = str(FilePath(__file__).parent) + os.sep
# fx patches nn.Module for the time of a trace: one at a time.
_TRACING = threading.Lock()


class Call:
    """How a model is called: its signature, bound to an example.

    ``names`` lists the tensor leaves among the arguments, named after ``forward``'s parameters (``x``, ``images.0``);
    everything else in the example (flags, ``None``, numbers) is fixed at its example value.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.signature = inspect.signature(type(model).forward)
        parameters = list(self.signature.parameters.values())[1:]
        self.signature = self.signature.replace(parameters=parameters)
        try:
            arguments = self._bind(args, kwargs)
        except TypeError as error:
            raise TraceError(
                f"the example does not fit {type(model).__name__}.forward{self.signature}: {error}"
            ) from None
        leaves, self.structure = flatten(arguments)
        self.names = [path_name(path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.paths = [path for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.fixed: dict[Path, Any] = {path: leaf for path, leaf in leaves if not isinstance(leaf, torch.Tensor)}
        self._plain = all(path == (p.name,) for path, p in zip(self.paths, parameters, strict=False))
        self._count = len(self.paths)
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
        """Return a call's tensors in the order of ``names``. Raises ``TypeError`` for a call unlike the example."""
        if self._plain and not kwargs and len(args) == self._count and all(type(a) is torch.Tensor for a in args):
            return list(args)
        leaves, structure = flatten(self._bind(args, kwargs))
        if structure != self.structure:
            raise TypeError(
                "the call's arguments have another structure than the example the model was traced with; "
                "trace the model with an example of this form"
            )
        for path, leaf in leaves:
            if path in self.fixed and leaf is not self.fixed[path] and leaf != self.fixed[path]:
                raise TypeError(
                    f"argument {path_name(path)!r} is {leaf!r}, but the model was traced with {self.fixed[path]!r}; "
                    "trace it again with the value you need"
                )
        tensors = [leaf for path, leaf in leaves if path not in self.fixed]
        for name, leaf in zip(self.names, tensors, strict=True):
            if not isinstance(leaf, torch.Tensor):
                raise TypeError(f"argument {name!r} must be a tensor as in the example, not {type(leaf).__name__}")
        return tensors

    def rebuild(self, values: Mapping[Path, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return ``(args, kwargs)`` with ``values`` in the tensors' places."""
        arguments = self.structure.rebuild(self.fixed | dict(values))
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, value in arguments.items():
            parameter = self.signature.parameters.get(name)
            if parameter is None or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                kwargs[name] = value
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args += value
            else:
                args.append(value)
        return args, kwargs


def path_name(path: Path) -> str:
    """Return the dotted name of an argument's leaf."""
    return leaf_name(path[0], path[1:])


@dataclasses.dataclass(frozen=True)
class Output:
    """The form of a model's result: which leaves are traced, in order, and what the rest always is.

    ``restore`` holds, for each traced leaf that is a plain number, what makes it one again out of the tensor it travels as.
    """

    structure: Structure
    paths: tuple[Path, ...]
    fixed: Mapping[Path, Any]
    restore: Mapping[Path, Callable[[torch.Tensor], Any]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """``output`` for one tensor; ``out``, ``logits``, ``past.0`` by key; ``output.0`` for plain sequences."""
        by_key = all(path and not path[0].isdigit() for path in self.paths)
        return [path_name(path) if by_key else leaf_name("output", path) for path in self.paths]

    def __call__(self, *leaves: Any) -> Any:
        """Return the model's result with ``leaves`` in their places."""
        return self.structure.rebuild({**self.fixed, **dict(zip(self.paths, leaves, strict=True))})

    def build(self, *tensors: torch.Tensor) -> Any:
        """Return the model's result from tensors, numbers among the leaves included."""
        pairs = zip(self.paths, tensors, strict=True)
        return self(*(self.restore[path](t) if path in self.restore else t for path, t in pairs))

    def tensors(self, result: Any) -> dict[str, torch.Tensor]:
        """Return the traced leaves of a model's result by name, numbers as tensors."""
        leaves = dict(flatten(result)[0])
        found = {name: leaves[path] for name, path in zip(self.names, self.paths, strict=True)}
        return {name: v if isinstance(v, torch.Tensor) else number_to_tensor(v) for name, v in found.items()}


def settle_output(steps: list[Step], values: Sequence[Any]) -> bool:
    """Make each leaf of the model's result one tensor or number, now that the steps' values are known.

    A layer's tuple that is returned as it came is taken apart, by steps that are inserted; the result is whether that was
    done. What is neither tensor nor number (a dtype, a device) is fixed at its example value.
    """
    last = steps.pop()
    output: Output = last.target
    structure, fixed, restore = output.structure, dict(output.fixed), {}
    paths: list[Path] = []
    args: list[Ref] = []
    count = len(steps)
    for path, ref in zip(output.paths, last.args, strict=True):
        leaves, part = flatten(values[ref.step])
        structure = structure.replaced(path, part)
        for inner, leaf in leaves:
            kind = None if isinstance(leaf, torch.Tensor) else restorer(leaf)
            if kind is None and not isinstance(leaf, torch.Tensor):
                fixed[(*path, *inner)] = leaf
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


def _select(steps: list[Step], ref: Ref, structure: Structure, path: Path) -> Ref:
    for key in path:
        place = [str(k) for k in structure.keys].index(key)
        by_name = dataclasses.is_dataclass(structure.kind)
        target, real_key = (getattr, key) if by_name else (operator.getitem, structure.keys[place])
        name = _unique("getitem", {step.name for step in steps})
        steps.append(Step(len(steps), name, "call", target, (ref, real_key)))
        ref, structure = Ref(len(steps) - 1), structure.children[place]
    return ref


class _Proxy(fx.Proxy):
    """A traced value that also follows ``y += x`` and ``y[i] = x``, which fx takes for ``y + x`` and refuses."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Attribute(fx.proxy.Attribute, _Proxy):
    """``y.values`` or ``y.add``, of which nobody knows yet whether it will be called."""


def _in_place(name: str) -> Callable[[_Proxy, Any], Any]:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(_Proxy, f"__i{_name}__", _in_place(f"__i{_name}__"))


class _Stored(_Proxy):
    """A parameter or buffer: what configuration depends on (its shape, a flag kept in it) is read off the real one."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        return self._tensor.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    def size(self, dim: int | None = None) -> Any:
        return self._tensor.size() if dim is None else self._tensor.size(dim)

    def dim(self) -> int:
        return self._tensor.dim()

    def numel(self) -> int:
        return self._tensor.numel()

    def item(self) -> Any:
        return self._tensor.item()

    def tolist(self) -> Any:
        return self._tensor.tolist()

    def __bool__(self) -> bool:
        return bool(self._tensor)

    def __int__(self) -> int:
        return int(self._tensor)

    def __float__(self) -> float:
        return float(self._tensor)

    def __len__(self) -> int:
        return len(self._tensor)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self._tensor)))


# Memory made in forward may be filled there: making it has to be followed even when no traced value is involved.
_ALWAYS_FOLLOWED = ("zeros", "ones", "empty", "full")
_FOLLOWED_WITH_TRACED_SIZES = ("arange", "linspace", "eye", "tensor")


class _Tracer(fx.Tracer):
    """fx's tracer, which also keeps the module path every node was made under, and leaves the model as it was."""

    def __init__(self, model: nn.Module, call: Call, leaf_modules: Collection[str | type[nn.Module]]) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.leaf_paths = {leaf for leaf in leaf_modules if isinstance(leaf, str)}
        self.leaf_types = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
        self.stack: list[str] = [""]
        self.failed_in = ""
        self.where: dict[fx.Node, str] = {}
        self.thread = threading.get_ident()
        self.stored_names: dict[int, str] = {}
        self.stored: dict[str, _Stored] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.stored_names.setdefault(id(tensor), name)

    def follow(self) -> fx.Graph:
        """Return the traced graph. What ``forward`` assigns to attributes of modules is taken back."""
        attributes = [(module, dict(module.__dict__)) for module in self.model.modules()]
        with _TRACING, self._follow_factories():
            try:
                return self.trace(self.model)
            finally:
                for module, before in attributes:
                    if module.__dict__ != before:
                        module.__dict__.clear()
                        module.__dict__.update(before)

    @contextmanager
    def _follow_factories(self) -> Iterator[None]:
        originals = {name: getattr(torch, name) for name in (*_ALWAYS_FOLLOWED, *_FOLLOWED_WITH_TRACED_SIZES)}

        def follow(name: str) -> Callable[..., Any]:
            original = originals[name]

            def factory(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != self.thread:
                    return original(*args, **kwargs)
                traced = any(isinstance(leaf, fx.Proxy) for _, leaf in flatten([args, kwargs])[0])
                if traced or name in _ALWAYS_FOLLOWED:
                    return self.create_proxy("call_function", original, args, kwargs)
                return original(*args, **kwargs)

            return factory

        for name in originals:
            setattr(torch, name, follow(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self.stored_names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None or threading.get_ident() != self.thread:
            return attr_val
        if name not in self.stored:
            self.stored[name] = _Stored(self.create_node("get_attr", name, (), {}), self, attr_val)
        return self.stored[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and id(a) not in self.stored_names and a not in self.tensor_attrs:
            return self.create_node("call_function", Constant(a), (), {})
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaf_paths or (self.leaf_types and isinstance(m, self.leaf_types)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.stack.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.stack[-1]
            raise
        finally:
            self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.where[node] = self.stack[-1]
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = {
            path: self.create_proxy("placeholder", name.replace(".", "_"), (), {})
            for path, name in zip(self.call.paths, self.call.names, strict=True)
        }
        args, kwargs = self.call.rebuild(proxies)

        def run(root: nn.Module, *values: Any) -> tuple[Any, ...]:
            # fx would turn an OrderedDict into a dict and refuse classes it does not know: only the leaves go to it.
            leaves, structure = flatten(root_fn(root, *values, **kwargs))
            traced = [(path, leaf) for path, leaf in leaves if isinstance(leaf, (fx.Proxy, torch.Tensor))]
            fixed = {path: leaf for path, leaf in leaves if not isinstance(leaf, (fx.Proxy, torch.Tensor))}
            self.output = Output(structure, tuple(path for path, _ in traced), fixed)
            return tuple(leaf for _, leaf in traced)

        return run, [self.root, *args]


def capture(model: nn.Module, call: Call, leaf_modules: Collection[str | type[nn.Module]] = ()) -> list[Step]:
    """Return the model's steps, the inputs first and the output last.

    Raises :class:`~torchsurgeon.errors.TraceError` naming the line of the model that ``torch.fx`` cannot follow.
    """
    known = {name for name, _ in model.named_modules()}
    for leaf in leaf_modules:
        if isinstance(leaf, str) and leaf not in known:
            raise TraceError(f"leaf_modules names {leaf!r}, which is not a module of {type(model).__name__}")
    tracer = _Tracer(model, call, leaf_modules)
    try:
        graph = tracer.follow()
    except Exception as error:
        raise TraceError(_explain(model, tracer, error)) from error
    return _steps(model, tracer, graph)


def _steps(model: nn.Module, tracer: _Tracer, graph: fx.Graph) -> list[Step]:
    steps: list[Step] = []
    position: dict[fx.Node, Ref] = {}
    taken: set[str] = set()
    inputs = iter(tracer.call.names)
    checks = _checks_only(graph)
    for node in graph.nodes:
        if node in checks:
            continue
        args = fx.node.map_arg(node.args, position.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, position.__getitem__)
        step = Step(len(steps), "", "call", node.target, _plain(args), _plain(kwargs), tracer.where.get(node, ""))
        if node.op == "placeholder":
            step.kind, step.name = "input", next(inputs)
        elif node.op == "get_attr":
            step.kind, step.name = "attr", str(node.target)
        elif isinstance(node.target, Constant):
            step.kind, step.target, step.name = "attr", node.target, _unique("constant", taken)
        elif node.op == "output":
            step.kind, step.name, step.target, step.args = "output", "output", tracer.output, step.args[0]
        elif node.op == "call_module":
            step.target = model.get_submodule(str(node.target))
            step.name = step.module_path = str(node.target)
        else:
            step.name = ".".join(filter(None, (step.module_path, step.type_name)))
        if step.kind == "call":
            step.name = _unique(step.name, taken)
        taken.add(step.name)
        position[node] = Ref(step.index)
        steps.append(step)
    return steps


def _checks_only(graph: fx.Graph) -> set[fx.Node]:
    """Return the ``torch._assert`` nodes and what only they read: with the example's sizes they have passed."""
    checks: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target is torch._assert or (node.users and checks.issuperset(node.users) and node.op != "placeholder"):
            checks.add(node)
    return checks


def _plain(value: Any) -> Any:
    """fx's immutable lists and dicts as ordinary ones, which is what the eager model passes."""
    if isinstance(value, tuple):
        parts = [_plain(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _unique(name: str, taken: Collection[str]) -> str:
    """The second layer that would be called ``relu`` is ``relu_1``, as in torchvision's feature extraction."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _explain(model: nn.Module, tracer: _Tracer, error: Exception) -> str:
    where = tracer.failed_in
    owner = model.get_submodule(where) if where else model
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_LIBRARY, _HERE))]
    lines = [f"{type(model).__name__} cannot be traced: {error}".rstrip()]
    if frames:
        frame = frames[-1]
        code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n    {code}')
    if where:
        lines.append(
            f"What to try: keep {where!r} ({type(owner).__name__}) whole, as one layer: leaf_modules=[{where!r}]"
        )
    else:
        lines.append(
            "What to try: move the line's control flow into a submodule and keep that whole with leaf_modules=[…], "
            "or make it depend on configuration, not on the values of a tensor"
        )
    return "\n".join(lines)
