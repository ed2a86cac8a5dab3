"""A model is followed as it is really called: what its source asks, its hooks, its ways to be called."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partitions import check
from small_models import model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsurgeon as ts
from torchsurgeon.errors import TraceError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def names(graph: ts.LayerGraph) -> list[str]:
    return [layer.name for layer in graph.layers]


def followed(made: nn.Module, *args: Any, batches: Any = ((MORE,),), **kwargs: Any) -> ts.LayerGraph:
    """Check every cut of ``made``, which is followed all through, and answers other batches too."""
    graph = check(made, *args, batches=batches, **kwargs)
    assert (graph.traced_by, dict(graph.opaque)) == ("recorded", {})
    assert graph.verified[0] == "the example"
    return graph


# --- what the source asks of a tensor ---

TRUE: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda y: isinstance(y, Tensor),
    "is_tensor": torch.is_tensor,
    "exact type": lambda y: type(y) is Tensor,
    "no parameter": lambda y: not isinstance(y, nn.Parameter),
    "type's name": lambda y: type(y).__name__ == "Tensor",
    "type in a dict": lambda y: {Tensor: True}.get(type(y), False),
    "type()": lambda y: y.type() == "torch.FloatTensor",
    "dtype is": lambda y: y.dtype is torch.float32,
    "dtype in a set": lambda y: y.dtype in {torch.float32},
    "dtype in a dict": lambda y: {torch.float32: True}.get(y.dtype, False),
    "dtype's name": lambda y: str(y.dtype) == "torch.float32",
    "floating": lambda y: y.is_floating_point() and torch.is_floating_point(y) and not y.is_complex(),
    "finfo": lambda y: torch.finfo(y.dtype).bits == 32,
    "promotion": lambda y: torch.result_type(y, 1.5) is torch.float32 and torch.can_cast(y.dtype, torch.float64),
    "device": lambda y: y.device == torch.device("cpu") and y.device.type == "cpu" and y.is_cpu and not y.is_cuda,
    "not on meta": lambda y: not y.is_meta and y.device.type != "meta" and y.get_device() == -1,
    "layout": lambda y: y.layout is torch.strided and not y.is_sparse and not y.is_quantized and not y.is_nested,
    "rank": lambda y: y.dim() == 2 and y.ndim == 2 and len(y.shape) == 2 and y.ndimension() == 2,
    "no gradient": lambda y: not y.requires_grad and y.is_leaf and y.grad_fn is None,
    "hasattr": lambda y: hasattr(y, "relu") and not hasattr(y, "mask"),
    "getattr": lambda y: getattr(y, "weight_by", None) is None and not callable(getattr(y, "tensors", None)),
    "vars": lambda y: not vars(y) and "tensors" not in dir(y),
    "hash": lambda y: hash(y) == hash(y) and y in {y} and {y: True}[y],
    "identity": lambda y: y is y and id(y) == id(y) and y is not None,
    "size": lambda y: y.shape[1] == 8 and y.size(-1) == 8 and y.size()[1] > 7 and isinstance(y.shape[0], int),
    "size's type": lambda y: isinstance(y.shape, torch.Size) and isinstance(y.shape, tuple),
    "element": lambda y: y.element_size() == 4 and y.itemsize == 4 and y.dtype.itemsize == 4,
    "no subclass": lambda y: not torch.overrides.is_tensor_like(object()) and torch.overrides.is_tensor_like(y),
    "Iterable": lambda y: hasattr(y, "__iter__") and callable(y.__len__),
    "not tracing": lambda y: not torch.jit.is_tracing() and not torch.jit.is_scripting(),
    "not compiling": lambda y: not torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling(),
    "not exporting": lambda y: not torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export(),
    "no fx": lambda y: not torch.fx._symbolic_trace.is_fx_tracing(),
    "in eval mode": lambda y: not torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
}


@pytest.mark.parametrize("tell", TRUE.values(), ids=list(TRUE))
@pytest.mark.parametrize("of", ["input", "result"])
def test_what_forward_asks_of_a_tensor_is_answered_as_in_a_real_call(tell: Callable[[Any], Any], of: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * 2 if tell(x if of == "input" else y) else y)

    graph = followed(model(forward, first=linear(), last=linear()), X)
    assert names(graph) == ["first", "mul", "last"], "the question was not answered as true"


@pytest.mark.parametrize(
    "ask", [lambda y: y.missing, lambda y: y.tensors[0], lambda y: y.shape[2], lambda y: y.T + "a"]
)
def test_errors_of_the_source_are_those_of_a_real_call(ask: Callable[[Any], Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            ask(x)
        except (AttributeError, IndexError, TypeError):
            x = x * 2
        return self.last(x)

    assert "mul" in names(followed(model(forward, last=linear()), X))


def test_dtypes_decide_the_path_of_each_input_type() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x / 255
        return self.last(x.to(self.last.weight.dtype))

    made = model(forward, last=linear())
    assert "truediv" in names(followed(made, (X.abs() * 100).to(torch.uint8), batches=()))
    assert "truediv" not in names(followed(made, X.double(), batches=()))


# --- what cannot be followed, and is not answered otherwise ---


def suppressed(self: Any, x: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        if float(x.abs().max()) > 0:
            x = x * 2
    return self.last(x)


def caught(self: Any, x: Tensor) -> Tensor:
    try:
        large = bool((x.abs() > 1e6).any())
    except Exception:
        large = True
    return self.last(x * 2 if large else x)


def caught_with_everything(self: Any, x: Tensor) -> Tensor:
    try:
        large = x.sum().item() > 1e6
    except BaseException:
        large = True
    return self.last(x * 2 if large else x)


@pytest.mark.parametrize("forward", [suppressed, caught, caught_with_everything], ids=lambda f: f.__name__)
def test_a_refusal_that_the_model_catches_still_counts(forward: Any) -> None:
    with pytest.raises(TraceError, match="values of a tensor"):
        ts.trace(model(forward, last=linear()), X)
    # As a part it stays whole, and is right for values that take either path.
    around = nn.Sequential(linear(), model(forward, last=linear()), linear())
    graph = check(around, X, batches=[(1e9 * MORE,), (0 * MORE,)])
    assert graph.traced_by == "hierarchical"
    assert list(graph.opaque) == ["1"]


def test_the_innermost_part_that_cannot_be_followed_stays_whole_and_what_is_around_it_is_cut() -> None:
    def branching(self: Any, x: Tensor) -> Tensor:
        return self.low(x) if x.sum() < 0 else x

    inner = nn.Sequential(linear(), model(branching, low=linear()), nn.ReLU())
    graph = check(nn.Sequential(linear(), inner, linear()), X, batches=[(MORE,), (-MORE,)])
    assert graph.traced_by == "hierarchical"
    assert list(graph.opaque) == ["1.1"]
    assert "x.sum() < 0" in graph.opaque["1.1"]
    assert names(graph) == ["0", "1.0", "1.1", "1.2", "2"]


def test_several_parts_that_cannot_be_followed_each_stay_whole() -> None:
    def branching(self: Any, x: Tensor) -> Tensor:
        return x if x.sum() < 0 else x + 1

    made = nn.Sequential(linear(), model(branching), linear(), model(branching))
    graph = check(made, X, batches=[(MORE,), (-MORE,)])
    assert (graph.traced_by, list(graph.opaque)) == ("hierarchical", ["1", "3"])


def test_parts_that_the_caller_wants_whole_are_one_layer() -> None:
    made = nn.Sequential(linear(), nn.Sequential(linear(), nn.ReLU()), linear())
    graph = check(made, X, leaf_modules=["1"])
    assert names(graph) == ["0", "1", "2"]


# --- how a model is called ---


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(), linear()

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return self.last(self.first(x) * by)


class Called(Plain):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x * 3, by=2.0).relu()


def replaced(made: Any) -> None:
    before = made.forward
    made.forward = lambda x: before(x) * 2


def rebound(made: Any) -> None:
    made.forward = lambda x: Plain.forward(made, x).relu() * 2


def hooked(made: Any) -> None:
    made.register_forward_hook(lambda module, args, result: result * 2)


def hooked_with_keywords(made: Any) -> None:
    made.register_forward_hook(lambda module, args, kwargs, result: result * len(args), with_kwargs=True)
    made.register_forward_hook(lambda module, args, result: result + args[0], prepend=True)


def hooked_before(made: Any) -> None:
    made.register_forward_pre_hook(lambda module, args: args[0] * 2)
    made.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hooked_before_with_keywords(made: Any) -> None:
    made.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)


def hooked_always(made: Any) -> None:
    made.register_forward_hook(lambda module, args, result: result * 2, always_call=True)


WAYS = [replaced, hooked, hooked_with_keywords, hooked_before, hooked_before_with_keywords, hooked_always]


@pytest.mark.parametrize("change", [*WAYS, rebound], ids=lambda f: f.__name__)
def test_hooks_and_a_replaced_forward_of_the_root_are_followed(change: Callable[[Any], None]) -> None:
    made = Plain().eval()
    with torch.no_grad():
        before = made(X)
        change(made)
        assert not torch.equal(made(X), before)
    followed(made, X)


def test_a_call_of_ones_own_is_followed_at_the_root_and_inside() -> None:
    assert names(followed(Called(), X))[-1] == "relu"
    inside = followed(nn.Sequential(linear(), Called(), linear()), X)
    assert {"1.first", "1.last"} <= set(names(inside))


@pytest.mark.parametrize("change", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [linear, Plain], ids=["layer of PyTorch", "module of one's own"])
def test_hooks_and_a_replaced_forward_of_parts_are_followed(change: Callable[[Any], None], kind: Any) -> None:
    part = kind()
    change(part)
    graph = followed(nn.Sequential(linear(), part, linear()), X)
    assert any(name.startswith("1.") for name in names(graph)), names(graph)


@pytest.mark.parametrize("change", WAYS, ids=lambda f: f.__name__)
def test_hooks_of_parts_are_followed_where_a_number_is_read_off_values(change: Callable[[Any], None]) -> None:
    part = linear()
    change(part)
    made = model(lambda self, x: self.part(self.first(x) * x.max().item()), first=linear(), part=part)
    graph = check(made, X, batches=[(X + 1,)])
    assert (graph.traced_by, dict(graph.opaque)) == ("recorded", {})


def test_hooks_for_all_modules_are_followed() -> None:
    def double(module: nn.Module, args: Any, result: Any) -> Any:
        return result * 2 if isinstance(module, nn.Linear) else None

    def shift(module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,) if isinstance(module, nn.Linear) else None

    hooks = [
        nn.modules.module.register_module_forward_hook(double),
        nn.modules.module.register_module_forward_pre_hook(shift),
    ]
    try:
        graph = ts.trace(Plain().eval(), X)
        # What runs around a layer on either side runs when its forward does: hooks are steps of their own.
        assert names(graph) == ["first.add", "first", "first.mul", "mul", "last.add", "last", "last.mul"]
        with torch.no_grad():
            expected = graph.model(MORE)
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            part = ts.cut(graph, 3)
            assert torch.equal(part.tail(*part.head(MORE)), expected)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize("store", ["dict", "list", "attribute"])
def test_features_that_hooks_collect_are_those_of_the_same_call(store: str, warm: bool) -> None:
    class Collecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Sequential(linear(), nn.ReLU(), linear()), linear()
            self.kept: Any = {} if store == "dict" else []
            self.body[0].register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, result: Any) -> None:
            if store == "dict":
                self.kept["first"] = result
            elif store == "list":
                self.kept[:] = [result]
            else:
                self.kept = result

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            first = self.kept["first"] if store == "dict" else self.kept[0] if store == "list" else self.kept
            return self.last(y + first)

    made = Collecting().eval()
    if warm:
        with torch.no_grad():
            made(MORE)
    before, held = made.kept, copy.copy(made.kept)
    ts.trace(made, X)
    assert made.kept is before
    assert type(held) is Tensor or made.kept == held
    followed(made, X)


def test_a_hook_that_is_taken_off_in_forward_acts_only_until_then() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        handle = self.first.register_forward_hook(lambda module, args, result: result * 2)
        y = self.first(x)
        handle.remove()
        return self.first(y)

    made = model(forward, first=linear())
    followed(made, X)
    assert not made.first._forward_hooks


# --- modules and inputs ---


def test_a_module_that_is_called_again_is_a_layer_for_each_call() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x).tanh()
        return self.same(x)

    step = linear()
    graph = followed(model(forward, step=step, same=step), X)
    assert names(graph) == ["step", "tanh", "step_1", "tanh_1", "step_2", "tanh_2", "step_3"]


def test_a_module_outside_of_the_models_modules_is_followed() -> None:
    outside = nn.Sequential(linear(), nn.ReLU()).eval()
    followed(model(lambda self, x: self.last(outside(x)), last=linear()), X)


def test_a_part_whose_method_is_called_and_not_itself_is_followed() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = linear()

        def encode(self, x: Tensor) -> Tensor:
            return self.l(x).relu()

    graph = followed(model(lambda self, x: self.part.encode(x) + self.part.l.weight[0], part=Part()), X)
    assert "part.l" in names(graph)


def test_optional_keyword_and_listed_inputs_are_those_of_the_call() -> None:
    def forward(self: Any, xs: Any, *, mask: Any = None, scale: float = 2.0, named: Any = None) -> Tensor:
        y = sum(self.first(x) for x in xs)
        if mask is not None:
            y = y * mask
        if named:
            y = y + named["bias"]
        return self.last(y * scale)

    made = model(forward, first=linear(), last=linear())
    assert len(names(followed(made, [X, X + 1], batches=()))) == 6
    assert len(names(followed(made, [X], mask=X > 0, named={"bias": X}, batches=()))) == 6
    graph = ts.trace(made, [X, X], mask=None, scale=3.0)
    with torch.no_grad():
        part = ts.cut(graph, 2)
        assert torch.equal(part.tail(*part.head([X, X], scale=3.0)), made([X, X], scale=3.0))
    with pytest.raises(TypeError):
        graph.bind([X, X], mask=X > 0)


def test_one_tensor_given_twice_is_one_where_the_model_asks() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return self.last(x * 2 if x is y else x + y)

    made = model(forward, last=linear())
    assert names(followed(made, X, X, batches=[(MORE, MORE)])) == ["mul", "last"]
    apart = followed(made, X, X.clone(), batches=[(MORE, MORE.clone())])
    assert names(apart) == ["add", "last"]
    with pytest.raises(TypeError):
        apart.bind(X, X)
    with pytest.raises(TypeError):
        ts.trace(made, X, X).bind(X, X.clone())


def test_one_tensor_given_twice_and_overwritten_shows_the_write_in_both() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return self.last(x + y)

    followed(model(forward, last=linear()), X.clone(), X.clone(), batches=())
    same = X.clone()
    made = model(forward, last=linear())
    with torch.no_grad():
        part = ts.cut(ts.trace(made, same, same), 2)
        given = MORE.clone()
        assert torch.equal(part.tail(*part.head(given, given)), made(MORE.clone().requires_grad_(False), 2 * MORE))


# --- calls that leave no trace of their own ---


@pytest.fixture
def scripted() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.jit.script(_twice)


def _twice(x: Tensor) -> Tensor:
    return x * 2 + 1


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def test_functions_of_torch_script_are_followed_or_refused(scripted: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(scripted(self.first(x)))

    _right_or_refused(forward)


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap": lambda self, y: torch.func.vmap(lambda row: row * 2 + row.sum())(y),
    "vmap over a layer": lambda self, y: torch.func.vmap(self.last)(y),
    "grad": lambda self, y: torch.func.grad(lambda v: v.pow(3).sum())(y),
    "jvp": lambda self, y: torch.func.jvp(torch.sin, (y,), (torch.ones_like(y),))[1],
    "functional_call": lambda self, y: torch.func.functional_call(self.last, {"weight": self.first.weight * 2}, (y,)),
    "autograd.Function": lambda self, y: _Doubled.apply(y),
    "checkpoint": lambda self, y: checkpoint(self.last, y, use_reentrant=False),
    "checkpoint, reentrant": lambda self, y: checkpoint(self.last, y, use_reentrant=True),
    "partial": lambda self, y: functools.partial(F.linear, weight=self.first.weight)(y),
    "map_": lambda self, y: y.clone().map_(y, lambda a, b: a + b),
    "numpy": lambda self, y: torch.from_numpy(y.numpy() * 2),
    "data": lambda self, y: y.data * 2,
    "as_subclass": lambda self, y: y.as_subclass(Tensor) * 2,
    "new parameter": lambda self, y: nn.Parameter(y * 2, requires_grad=False),
    "copy": lambda self, y: copy.copy(y) * 2,
    "deepcopy": lambda self, y: copy.deepcopy(y) * 2,
    "from a list": lambda self, y: torch.tensor(y.tolist()) * 2,
    "assigned": lambda self, y: setattr(y, "data", y * 2) or y,
    "iteration": lambda self, y: torch.stack([row * 2 for row in y]),
    "unpacking": lambda self, y: torch.stack(list(y)) * 2,
    "out=": lambda self, y: torch.mul(y, 2, out=torch.empty_like(y)),
}


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("way", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_calls_that_python_cannot_see_into_are_followed_or_refused(way: Callable[[Any, Tensor], Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(way(self, self.first(x)))

    _right_or_refused(forward)


def _right_or_refused(forward: Any) -> None:
    """Check that a model is followed right or refused, and right with the part kept whole."""
    with contextlib.suppress(TraceError):
        check(model(forward, first=linear(), last=linear()), X, batches=[(X + 1,), (-X,)])
    inside = model(forward, first=linear(), last=linear())
    check(nn.Sequential(linear(), inside, linear()), X, batches=[(X + 1,), (-X,)], leaf_modules=["1"])


@pytest.mark.parametrize("name", ["autograd.Function", "checkpoint", "partial", "iteration", "out=", "data"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_common_calls_need_no_part_kept_whole(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(TRANSFORMS[name](self, self.first(x)))

    followed(model(forward, first=linear(), last=linear()), X, batches=())


def test_functions_that_are_told_to_be_opaque_are_one_layer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(ts.opaque(lambda y: y.sort(-1).values * 2, x))

    assert len(names(followed(model(forward, last=linear()), X))) == 2


def _dispatching(x: Tensor) -> Tensor:
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(_dispatching, (x,), x)  # type: ignore[no-any-return]
    return x * 2 if x.sum() > 0 else x


def test_functions_that_hand_themselves_to_torch_function_are_one_layer() -> None:
    graph = followed(model(lambda self, x: self.last(_dispatching(x)), last=linear()), X, batches=[(MORE,), (-MORE,)])
    assert names(graph) == ["dispatching", "last"]


def test_other_threads_run_their_models_undisturbed_while_one_is_traced() -> None:
    import threading

    other, wrong, stop = nn.Sequential(linear(), nn.ReLU()).eval(), [], threading.Event()
    with torch.no_grad():
        expected = other(X)

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(other(X), expected) or len(X) != 2:
                    wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            followed(Plain(), X)
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_the_calls_of_one_function_are_numbered_in_their_order() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for i in range(300):
            x = x * 2 if i % 2 else x + 1
        return self.l(x)

    names = [layer.name for layer in ts.trace(model(forward, l=nn.Linear(8, 8)), torch.rand(2, 8)).layers]
    numbered = ["", *(f"_{i}" for i in range(1, 150))]
    assert names == [f"{kind}{n}" for n in numbered for kind in ("add", "mul")] + ["l"]
