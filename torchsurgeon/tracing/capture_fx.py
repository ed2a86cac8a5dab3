"""From a model to its steps, by torch.fx.

Layers are named by module paths and by the functions that the model's own source calls. What torch.fx names its nodes
differs between versions of PyTorch, and two machines with different versions must give a layer the same name.
"""

from __future__ import annotations

import linecache
import operator
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import fx, nn

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.adapters import adapter_for
from torchsurgeon.tracing.call import Call, Output
from torchsurgeon.tracing.step import Constant, Ref, Step, plain, unique
from torchsurgeon.tracing.structure import flatten

_LIBRARY = str(FilePath(torch.__file__).parent) + os.sep
_THIS_PACKAGE = str(FilePath(__file__).parent) + os.sep
# torch.fx patches nn.Module while it traces, for all threads, so only one thread traces at a time.
TRACING = threading.Lock()

# The attributes that a proxy itself keeps; any other assignment is the model's.
_OF_PROXIES = {"tracer", "node", "root", "attr", "_node", "_tensor"}


class _Proxy(fx.Proxy):
    """A traced value that also follows ``y += x`` and ``y[i] = x``.

    torch.fx's own proxy records the first as ``y + x``, which reuses no memory, and refuses the second.
    """

    def __getattr__(self, name: str) -> _AttributeProxy:
        return _AttributeProxy(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:
            raise TypeError(f"the attribute {short(name)} of a traced value is assigned, which leaves no trace")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _AttributeProxy(fx.proxy.Attribute, _Proxy):
    """``y.values`` or ``y.add``: an attribute of a traced value, or a method that is about to be called."""


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
    """A traced parameter or buffer, whose shape and elements can be read: they are the same in every call."""

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
        return (self[i] for i in range(len(self._tensor)))  # type: ignore[index]


# A tensor made in forward may be written to there, so making it must be a step, even of constant sizes.
_ALWAYS_FOLLOWED = ("zeros", "ones", "empty", "full")
_FOLLOWED_WITH_TRACED_SIZES = ("arange", "linspace", "eye", "tensor")

_OF_MODULES = set(nn.Module().__dict__) - {"_buffers"}


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the dicts, lists and sets among a module's own attributes, each with a copy of what it holds."""
    own = (value for name, value in module.__dict__.items() if name not in _OF_MODULES)
    return [(value, value.copy()) for value in own if type(value) in (dict, list, set)]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo, at the end of the block, what ``forward`` changes in the model's modules.

    These are attributes that it assigns, and what it puts into their dicts, lists and sets: a cache must not keep
    proxies, which stand for values only while tracing.
    """
    attributes = [(module, dict(module.__dict__), _containers(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, before, containers in attributes:
            if module.__dict__ != before:
                module.__dict__.clear()
                module.__dict__.update(before)
            for container, contents in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(contents)


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which also uses adapters, follows tensors made in forward, and notes which module calls what.

    Its methods leave other threads alone, which may run models while torch.fx has patched PyTorch.
    """

    def __init__(self, model: nn.Module, call: Call, whole: Mapping[str, str], forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call, self.whole, self.forward = model, call, dict(whole), forward
        self.stack: list[str] = [""]
        self.failed_in = ""
        self.where: dict[fx.Node, str] = {}
        self.thread = threading.get_ident()
        self.stored_names: dict[int, str] = {}
        self.stored: dict[str, _Stored] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.stored_names.setdefault(id(tensor), name)

    def follow(self) -> fx.Graph:
        """Return the traced graph."""
        with TRACING, self._follow_factories():
            return self.trace(self.model)

    @contextmanager
    def _follow_factories(self) -> Iterator[None]:
        """Make ``torch.zeros`` and its kin steps of the trace."""
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
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if "_orig_mod" in m._modules:
            # torch.compile wraps a module in one that cannot be traced; the wrapped module is followed instead.
            return m._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]
        path = self.path_of_module(m)
        self.stack.append(path)
        try:
            adapter = None if path in self.whole else adapter_for(m)
            if adapter is not None and (adapter.applies is None or adapter.applies(*args, **kwargs)):
                self.whole |= {f"{path}.{part}": why for part, why in adapter.whole.items()}
                return adapter.forward(m, *args, **kwargs)
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
            # torch.fx would turn an OrderedDict into a dict, and refuse classes it does not know. It gets the computed
            # leaves as a tuple; ``Output`` puts them back.
            leaves, structure = flatten(self.forward(root, *values, **kwargs))
            traced = [(path, leaf) for path, leaf in leaves if isinstance(leaf, (fx.Proxy, torch.Tensor))]
            fixed = {path: leaf for path, leaf in leaves if not isinstance(leaf, (fx.Proxy, torch.Tensor))}
            self.output = Output(structure, tuple(path for path, _ in traced), fixed)
            return tuple(leaf for _, leaf in traced)

        return run, [self.root, *args]


class UnfollowedError(TraceError):
    """torch.fx cannot follow a line of the model.

    Args:
        message: what the user reads: the line, why it cannot be followed, and what to try.
        module_path: the innermost module that was being followed, "" for the model itself.
        line: the line and the reason in one line, for ``LayerGraph.opaque``.
    """

    def __init__(self, message: str, module_path: str, line: str) -> None:
        super().__init__(message)
        self.module_path, self.line = module_path, line


def capture_fx(
    model: nn.Module, call: Call, whole: Mapping[str, str], forward: Callable[..., Any]
) -> tuple[list[Step], Mapping[str, str]]:
    """Follow the model with torch.fx.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        whole: by path, the modules to keep as one layer each, and why.
        forward: what is followed in place of the model's own ``forward``.

    Returns:
        The model's steps, inputs first and output last; and, by path, the modules that stayed one layer each, and why.
        Those are the ones in ``whole`` and those that adapters of submodules keep whole.

    Raises:
        UnfollowedError: torch.fx cannot follow a line of the model.
    """
    tracer = _Tracer(model, call, whole, forward)
    try:
        graph = tracer.follow()
    except Exception as error:
        raise _unfollowed(model, tracer, error) from error
    return _steps(model, tracer, graph), tracer.whole


def _steps(model: nn.Module, tracer: _Tracer, graph: fx.Graph) -> list[Step]:
    steps: list[Step] = []
    position: dict[fx.Node, Ref] = {}
    taken: set[str] = set()
    inputs = iter(tracer.call.names)
    checks = _checks_only(graph)
    for node in graph.nodes:
        if node in checks:
            continue
        args: Any = fx.node.map_arg(node.args, position.__getitem__)  # type: ignore[arg-type]
        kwargs: Any = fx.node.map_arg(node.kwargs, position.__getitem__)  # type: ignore[arg-type]
        step = Step(len(steps), "", "call", node.target, plain(args), plain(kwargs), tracer.where.get(node, ""))
        if node.op == "placeholder":
            step.kind, step.name = "input", next(inputs)
        elif node.op == "get_attr":
            step.kind, step.name = "attr", str(node.target)
        elif isinstance(node.target, Constant):
            step.kind, step.target, step.name = "attr", node.target, unique("constant", taken)
        elif node.op == "output":
            step.kind, step.name, step.target, step.args = "output", "output", tracer.output, step.args[0]
        elif node.op == "call_module":
            step.target = model.get_submodule(str(node.target))
            step.name = step.module_path = str(node.target)
        else:
            step.name = ".".join(filter(None, (step.module_path, step.type_name)))
        if step.kind == "call":
            step.name = unique(step.name, taken)
        taken.add(step.name)
        position[node] = Ref(step.index)
        steps.append(step)
    return steps


def _checks_only(graph: fx.Graph) -> set[fx.Node]:
    """Return the ``torch._assert`` nodes and what only they read; they hold for the example, and are left out."""
    checks: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target is torch._assert or (node.users and checks.issuperset(node.users) and node.op != "placeholder"):
            checks.add(node)
    return checks


def _unfollowed(model: nn.Module, tracer: _Tracer, error: Exception) -> UnfollowedError:
    """Return the error that names the user's line: the last frame outside of PyTorch and torchsurgeon."""
    where = tracer.failed_in
    owner = model.get_submodule(where) if where else model
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_LIBRARY, _THIS_PACKAGE))
    ]
    reason = str(error).strip() or type(error).__name__
    lines = [f"torch.fx cannot follow {type(model).__name__}: {reason}"]
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
