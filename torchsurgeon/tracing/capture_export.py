"""From a model to its steps, by torch.export, for models whose calls cannot be recorded.

The steps are ATen operators. A layer that is one operator of one ``torch.nn`` module is named by that module's path;
any other by the path of the module that calls it and the operator's name. Export decides branches that depend on sizes
by the example's sizes. What it assumed of them becomes a guard, which is checked at every call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from torchsurgeon.errors import TraceError, short
from torchsurgeon.tracing.alone import TRACING, exporting
from torchsurgeon.tracing.call import Call, Output, check_result, path_name
from torchsurgeon.tracing.kernels import kernels_kept
from torchsurgeon.tracing.step import Constant, ModelDevice, Ref, Step, function_name, plain, unique
from torchsurgeon.tracing.structure import LeafPath, flatten

_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)

# Start and end of ``x[:]``. Only some versions of PyTorch keep it, so it is left out: fingerprints must be the same.
_EVERYTHING = (0, 2**63 - 1)

Guard = Callable[[Sequence[torch.Tensor]], None]


def capture_export(model: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> tuple[list[Step], Guard]:
    """Follow the model with torch.export.

    Args:
        model: the model, in eval mode.
        call: how it is called.
        tensors: the example's tensors, in the order of ``call.names``.

    Returns:
        The model's steps, inputs first and output last, and a guard, which raises ``TypeError`` for tensors whose
        sizes would have taken another path through the model's source than the example's.

    Raises:
        TraceError: torch.export cannot follow the model; the message holds its reason.
    """
    steps, guard = _exported(model, call, tensors)
    try:
        guard(tensors)
    except Exception as error:
        raise TraceError(
            f"the guards that torch.export made do not hold for the example itself: {short(error)}"
        ) from error
    many = _with_batch(tensors, 1024)
    if many is None or _passes(guard, many):
        return steps, guard
    # A batch of one may take a path of its own, by broadcasting. Where a batch of two gives the same steps, they hold
    # for both, and sizes that either guard lets through are allowed.
    try:
        same, guard_of_two = _exported(model, call, _with_batch(tensors, 2) or tensors)
    except TraceError:
        return steps, guard
    return steps, _either(guard, guard_of_two) if _alike(steps, same) else guard


def _with_batch(tensors: Sequence[torch.Tensor], batch: int) -> Sequence[torch.Tensor] | None:
    """Return the example's one sample repeated ``batch`` times; None where the example holds another number.

    A tensor that was given as two arguments is one tensor again.
    """
    if any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    repeated = {id(t): t.to("meta").expand(batch, *t.shape[1:]) if batch > 2 else torch.cat([t, t]) for t in tensors}
    return [repeated[id(t)] for t in tensors]


def _passes(guard: Guard, tensors: Sequence[torch.Tensor]) -> bool:
    try:
        guard(tensors)
    except TypeError:
        return False
    return True


def _either(first: Guard, second: Guard) -> Guard:
    """Return a guard that lets through what either guard does; its error is that of the first."""

    def guard(tensors: Sequence[torch.Tensor]) -> None:
        if not _passes(second, tensors):
            first(tensors)

    return guard


def _alike(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    """Return whether two programs compute the same."""

    def same(a: Step, b: Step) -> bool:
        if isinstance(a.target, Constant) and isinstance(b.target, Constant):
            return a.target.tensor.shape == b.target.tensor.shape and torch.equal(a.target.tensor, b.target.tensor)
        return (a.name, a.kind, a.target, a.args, a.kwargs) == (b.name, b.kind, b.target, b.args, b.kwargs)

    return len(steps) == len(others) and all(map(same, steps, others))


def _exported(model: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> tuple[list[Step], Guard]:
    args, kwargs = call.rebuild(dict(zip(call.paths, tensors, strict=True)))
    free = ShapesCollection()
    same_batch = len({t.shape[0] for t in tensors if t.dim()}) == 1
    for tensor in {id(t): t for t in tensors}.values():
        # Sequences (of numbers, of embeddings) may have any length; sizes of images are part of what a model is built
        # for, and leaving them free would make export several times slower.
        dims = ([0] if same_batch else []) + ([1] if tensor.dim() in (2, 3) else [])
        if tensor.dim() and dims:
            free[tensor] = dict.fromkeys(dims, Dim.AUTO)
    try:
        with (
            TRACING,
            exporting(),
            _quietly(),
            torch.no_grad(),
            _any_size(),
            _fused_as_in_eager(),
            kernels_kept(model, tensors),
            _returning_leaves(model) as results,
        ):
            program = torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=free, strict=False)
            root = program.module()
    except TraceError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n\n")[0]
        raise TraceError(f"torch.export cannot follow {type(model).__name__}: {reason}") from error
    return _steps(model, call, root, results[-1]), _guard(root, call)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # Export logs warnings and prints half a graph when it fails. The reason is in its error, and another way to follow
    # the model may still work.
    chatty, printing = logging.getLogger("torch.fx.experimental.symbolic_shapes"), import_module("torch.export._trace")
    before, chatty.disabled = chatty.disabled, True
    printing.__dict__["print"] = lambda *_, **__: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.disabled = before
        del printing.__dict__["print"]


@contextlib.contextmanager
def _fused_as_in_eager() -> Iterator[None]:
    """Let attention and encoder layers take their fused kernels, as they do when the model runs.

    While they are traced they would take other kernels, whose answers differ in the last bits.
    """
    # These are patches of PyTorch itself, so other threads, which may run models meanwhile, get the original.
    own_thread, encoder = threading.get_ident(), nn.TransformerEncoder.forward
    overridden = torch.overrides.has_torch_function

    @functools.wraps(encoder)
    def forward(self: nn.TransformerEncoder, *args: Any, **kwargs: Any) -> Any:
        padding = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
        if padding is not None and self.use_nested_tensor and threading.get_ident() == own_thread:
            raise TraceError(
                "nn.TransformerEncoder packs padded sequences by the values of their mask, which no trace can follow; "
                "create it with enable_nested_tensor=False"
            )
        return encoder(self, *args, **kwargs)

    replaced = [
        (torch.overrides, "has_torch_function", lambda t: threading.get_ident() != own_thread and overridden(t)),
        (nn.modules.activation, "_is_make_fx_tracing", lambda: False),
        (nn.TransformerEncoder, "forward", forward),
    ]
    with contextlib.ExitStack() as undo:
        for owner, name, value in replaced:
            if hasattr(owner, name):
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        yield


@contextlib.contextmanager
def _returning_leaves(model: nn.Module) -> Iterator[list[Output]]:
    """Make the model return the computed leaves of its result as a tuple, and yield a list that gets the result's form.

    Export refuses results of classes that it does not know.
    """
    results: list[Output] = []
    original, own_thread = model.forward, threading.get_ident()

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != own_thread:
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        check_result(model, result, lambda leaf: isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)))
        leaves, structure = flatten(result)
        numbers = {path: int for path, leaf in leaves if isinstance(leaf, torch.SymInt)}
        if any(isinstance(leaf, (torch.SymFloat, torch.SymBool)) for _, leaf in leaves):
            raise TraceError("the model returns a number that torch.export does not return as a number")
        traced = [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor) or path in numbers]
        paths = tuple(path for path, _ in traced)
        fixed = {path: leaf for path, leaf in leaves if path not in set(paths)}
        results.append(Output(structure, paths, fixed, numbers))
        return tuple(leaf for _, leaf in traced)

    own = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield results
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _any_size() -> contextlib.AbstractContextManager[Any]:
    """Let free sizes be 0 and 1.

    Export otherwise assumes that they are neither, and its guards do not say so: wrong for a batch of one.
    """
    from torch.fx.experimental import _config

    if hasattr(_config, "backed_size_oblivious"):
        return _config.patch(backed_size_oblivious=True)  # type: ignore[no-any-return, attr-defined]
    raise TraceError(
        f"torch.export of PyTorch {torch.__version__} does not leave sizes of one free; use torch 2.10 or newer"
    )


def _guard(root: fx.GraphModule, call: Call) -> Guard:
    """Return the guard of an exported program, which also holds for sizes that export took as constants."""
    check = getattr(root, "_guards_fn", None)
    leaves = [leaf.path for leaf in _inputs(call, root)]
    nodes = [node for node in root.graph.nodes if node.op == "placeholder"]
    sizes = {path: node.meta["val"].shape for path, node in zip(leaves, nodes, strict=True) if path not in call.fixed}

    def guard(tensors: Sequence[torch.Tensor]) -> None:
        wrong = ""
        given = call.fixed | dict(zip(call.paths, tensors, strict=True))
        for path, needed in sizes.items():
            shape = given[path].shape
            for dim, size in enumerate(needed):
                if type(size) is int and shape[dim : dim + 1] != (size,):
                    wrong = f"dimension {dim} of {short(path_name(path), 100)} must be {size}; got shape {list(shape)}"
        try:
            if not wrong and check is not None:
                check(*(given[path] for path in leaves))
        except AssertionError as error:
            wrong = short(error)
        if wrong:
            raise TypeError(
                f"with tensors of these sizes the model takes another path than with the example it was traced with "
                f"({wrong}); trace it again with an example of these sizes"
            )

    return guard


def _steps(model: nn.Module, call: Call, root: fx.GraphModule, result: Output) -> list[Step]:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    stored = {
        name
        for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    }
    steps: list[Step] = []
    position: dict[fx.Node, Any] = {}
    taken: set[str] = set()
    inputs = iter(_inputs(call, root))
    device_step: Ref | None = None

    def add(kind: str, name: str, target: Any, args: Any = (), kwargs: Any = None, path: str = "") -> Ref:
        taken.add(name)
        steps.append(Step(len(steps), name, kind, target, args, kwargs or {}, path))
        return Ref(len(steps) - 1)

    for node in root.graph.nodes:
        args = plain(fx.node.map_arg(node.args, position.__getitem__))
        kwargs = plain(fx.node.map_arg(node.kwargs, position.__getitem__))
        if node.op == "placeholder":
            leaf = next(inputs).path
            position[node] = call.fixed[leaf] if leaf in call.fixed else add("input", path_name(leaf), node.target)
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(root)
            if node.target in stored:
                position[node] = add("attr", node.target, node.target)
            elif isinstance(value, FakeTensor):
                raise TraceError("torch.export keeps a tensor without elements as a constant")
            elif isinstance(value, torch.Tensor):
                position[node] = add("attr", unique("constant", taken), Constant(value))
            else:
                position[node] = value
        elif node.op == "output":
            add("output", "output", *_settled(result, args[0]))
        elif node.op == "call_module" or _is_check(node):
            _refuse_assumed_values(node)
        elif "as_strided" in str(node.target):
            raise TraceError(f"{node.target} may read memory outside of its tensor, which does not cross at a cut")
        elif getattr(node.target, "__module__", "").startswith("torch._functorch"):
            raise TraceError(
                f"torch.export keeps a part of torch.func ({function_name(node.target)}), which works only as a whole"
            )
        elif node.target is torch.ops.aten.slice.Tensor and tuple(args[2:]) == _EVERYTHING:
            position[node] = args[0]
        else:
            if device in kwargs.values():
                # Export fixes the device the model is on; the other side may run on another one.
                device_step = device_step or add("call", unique("device", taken), ModelDevice(model))
                kwargs = {k: device_step if v == device else v for k, v in kwargs.items()}
            path, name = _name(model, node)
            position[node] = add("call", unique(name, taken), node.target, args, kwargs, path)
    return steps


@dataclasses.dataclass(frozen=True)
class _Leaf:
    path: LeafPath


def _inputs(call: Call, root: fx.GraphModule) -> list[_Leaf]:
    """Return the leaves that torch.export makes placeholders of: every leaf of the call, constants too, in order."""
    args, kwargs = call.rebuild({path: _Leaf(path) for path in (*call.paths, *call.fixed)})
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    count = sum(node.op == "placeholder" for node in root.graph.nodes)
    if count != len(leaves):
        raise TraceError(
            f"torch.export must make one input of each of the call's {len(leaves)} leaves; it made {count}. Pass the "
            "tensors as separate arguments"
        )
    return leaves


def _settled(result: Output, leaves: Sequence[Any]) -> tuple[Output, tuple[Ref, ...]]:
    """Return the result's form, with the leaves that export found constant fixed, and the steps of the others."""
    pairs = list(zip(result.paths, leaves, strict=True))
    constant = {path: leaf for path, leaf in pairs if not isinstance(leaf, Ref)}
    paths = tuple(path for path in result.paths if path not in constant)
    restore = {path: make for path, make in result.restore.items() if path not in constant}
    refs = tuple(leaf for _, leaf in pairs if isinstance(leaf, Ref))
    return Output(result.structure, paths, {**result.fixed, **constant}, restore), refs


def _is_check(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _CHECKS


def _refuse_assumed_values(node: fx.Node) -> None:
    """Raise where torch.export took for granted what the values of tensors decide; sizes are left to the guards."""
    asserted = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    expression = getattr(getattr((asserted or node).meta.get("val"), "node", None), "expr", None)
    symbols = [str(symbol) for symbol in getattr(expression, "free_symbols", ())]
    if any(name.startswith(("u", "zuf")) for name in symbols) and not str(expression).endswith(">= 0"):
        raise TraceError(
            f"torch.export takes for granted that {short(str(expression), 100)}, which values of tensors decide"
        )


def _name(model: nn.Module, node: fx.Node) -> tuple[str, str]:
    """Return the path of the module that calls an operator, and the name of the layer."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].partition("@")[0] if stack else ""
    name = (
        node.target._opname
        if isinstance(node.target, torch._ops.OpOverload)
        else str(getattr(node.target, "__name__", node.target))
    )
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        owner = model
    if type(owner).__module__.startswith("torch.nn.") and not owner._modules and path:
        return path, path
    return path, ".".join(filter(None, (path, name.strip("_"))))
