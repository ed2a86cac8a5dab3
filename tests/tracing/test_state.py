"""What a model keeps between calls: followed where it decides nothing, else refused by name; left as it was."""

from __future__ import annotations

import collections
import copy
import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from partitions import assert_same, check
from small_models import model
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.state import State, left_as_it_was

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


class Box:
    """An object that is no module."""

    def __init__(self, held: Any = None) -> None:
        self.held = held
        self.items: list[Any] = []
        self.table: dict[str, Any] = {}


def identities(made: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, what is in its containers and objects, and the tensors' elements."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.detach().clone(), value._version
        if isinstance(value, (list, tuple, set, collections.deque)):
            return id(value), [of(one) for one in value]
        if isinstance(value, dict):
            return id(value), list(value), [of(one) for one in value.values()]
        return (id(value), of(value.__dict__)) if isinstance(value, Box) else id(value)

    return {path: {key: of(value) for key, value in m.__dict__.items()} for path, m in made.named_modules()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def untouched(made: nn.Module, trace: Callable[[], Any]) -> None:
    before = identities(made)
    trace()
    after = identities(made)
    assert same(before, after), [path for path in before if not same(before[path], after.get(path))]


# --- what is only left behind ---


def attribute(self: Any, x: Tensor) -> Tensor:
    self.attention = (self.l(x) @ x.mT).softmax(-1)
    return self.attention @ x  # type: ignore[no-any-return]


def attribute_that_was_not_there(self: Any, x: Tensor) -> Tensor:
    self.seen = self.l(x)
    return self.seen * 2  # type: ignore[no-any-return]


def attribute_of_a_part(self: Any, x: Tensor) -> Tensor:
    self.l.H, self.l.shape = x.shape[0], x.shape
    return self.l(x) * self.l.H  # type: ignore[no-any-return]


def in_a_dict(self: Any, x: Tensor) -> Tensor:
    self.kept["features"] = self.l(x)
    return self.kept["features"].relu()  # type: ignore[no-any-return]


def in_a_list(self: Any, x: Tensor) -> Tensor:
    self.order.clear()
    for _ in range(2):
        x = self.l(x)
        self.order.append(x)
    return sum(self.order)  # type: ignore[return-value]


def in_a_deque(self: Any, x: Tensor) -> Tensor:
    self.recent.append(self.l(x))
    return self.recent[-1] + x  # type: ignore[no-any-return]


def in_a_set(self: Any, x: Tensor) -> Tensor:
    self.names.add(str(x.dtype))
    return self.l(x)  # type: ignore[no-any-return]


def in_an_object(self: Any, x: Tensor) -> Tensor:
    self.box.held = self.l(x)
    self.box.table["last"] = self.box.held
    self.box.items[:] = [self.box.held]
    return self.box.held * 2 + self.box.items[0]  # type: ignore[no-any-return]


def counted_only(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    self.total = self.total + x.shape[0]
    return self.l(x)  # type: ignore[no-any-return]


def in_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.mean = self.l(x).mean(0)
    return self.l(x) - self.mean  # type: ignore[no-any-return]


LEFT = [
    *(attribute, attribute_that_was_not_there, attribute_of_a_part, in_a_dict, in_a_list, in_a_deque, in_a_set),
    *(in_an_object, counted_only, in_a_buffer),
]


def keeping(forward: Any) -> Any:
    made = model(forward, l=linear(), mean=torch.zeros(8))
    made.attention, made.kept, made.order, made.names, made.box = None, {}, [], set(), Box()
    made.calls, made.total, made.recent = 0, 0, collections.deque(maxlen=3)
    made.config = {"width": 8, "parts": [1, 2, {"deep": [3]}]}
    return made


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
def test_what_forward_only_leaves_behind_is_followed_and_taken_back(forward: Any, warm: bool) -> None:
    made = keeping(forward)
    if warm:
        with torch.no_grad():
            made(MORE)
    untouched(made, lambda: ts.trace(made, X))
    inside = nn.Sequential(made, nn.ReLU()).eval()
    # A part kept whole shows only that it writes its buffer, which others could read.
    for leaves in [[]] if forward is in_a_buffer else [[], ["0"]]:
        untouched(inside, lambda leaves=leaves: ts.trace(inside, X, leaf_modules=leaves))  # type: ignore[misc]
    graph = check(made, X, batches=[(MORE,)], at_least=1)
    assert (graph.traced_by, dict(graph.opaque)) == ("recorded", {})


def untraceable(self: Any, x: Tensor) -> Tensor:
    in_a_dict(self, x)
    in_a_list(self, x)
    attribute(self, x)
    self.calls += 1
    return self.l(x) if x.sum() > 0 else x  # type: ignore[no-any-return]


def failing(self: Any, x: Tensor) -> Tensor:
    in_an_object(self, x)
    self.l.weight = nn.Parameter(self.l.weight * 2)
    raise ValueError("never")


@pytest.mark.parametrize("forward", [untraceable, failing], ids=lambda f: f.__name__)
def test_a_refused_trace_leaves_the_model_as_it_was(forward: Any) -> None:
    made = keeping(forward)

    def refused() -> None:
        with pytest.raises(TraceError):
            ts.trace(made, X)

    untouched(made, refused)


def test_a_trace_that_keeps_a_part_whole_leaves_the_model_as_it_was() -> None:
    made = nn.Sequential(linear(), keeping(untraceable), linear()).eval()
    untouched(made, lambda: ts.trace(made, X))
    assert list(ts.trace(made, X).opaque) == ["1"]


def test_export_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchsurgeon.tracing import capture

    monkeypatch.setattr(capture.Ways, "_attempt", lambda self, traced_by: None)
    made = keeping(attribute)
    untouched(made, lambda: ts.trace(made, X))
    assert ts.trace(made, X).traced_by == "export"


# --- caches ---


def by_hasattr(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "position"):
        self.position = torch.arange(8.0) / 8
    return self.l(x) + self.position  # type: ignore[no-any-return]


def by_none(self: Any, x: Tensor) -> Tensor:
    if self.attention is None:
        self.attention = self.l.weight.abs().sum(0)
    return self.l(x) * self.attention  # type: ignore[no-any-return]


def by_key(self: Any, x: Tensor) -> Tensor:
    key = (x.shape[1], x.dtype)
    if key not in self.kept:
        self.kept[key] = torch.linspace(0, 1, x.shape[1])
    return self.l(x) + self.kept[key]  # type: ignore[no-any-return]


def in_the_object(self: Any, x: Tensor) -> Tensor:
    if "table" not in self.box.table:
        self.box.table["table"] = self.mean + 1
    return self.l(x) * self.box.table["table"]  # type: ignore[no-any-return]


def grown_by_length(self: Any, x: Tensor) -> Tensor:
    if self.mean.shape[0] < x.shape[-1]:
        self.mean = torch.arange(float(x.shape[-1]))
    return self.l(x) + self.mean[: x.shape[-1]]  # type: ignore[no-any-return]


CACHES = [by_hasattr, by_none, by_key, in_the_object, grown_by_length]


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize("forward", CACHES, ids=lambda f: f.__name__)
def test_caches_that_are_filled_in_the_first_call_are_followed(forward: Any, warm: bool) -> None:
    made = keeping(forward)
    if warm:
        with torch.no_grad():
            made(MORE)
    untouched(made, lambda: ts.trace(made, X))
    graph = ts.trace(made, X)
    assert (graph.traced_by, dict(graph.opaque)) == ("recorded", {})
    with torch.no_grad():
        expected = copy.deepcopy(made)(MORE)
        for point in graph.points:
            part = ts.cut(graph, point)
            assert_same(part.tail(*part.head(MORE)), expected, str(point))


def test_a_cache_filled_from_the_values_of_the_first_call_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.attention is None:
            self.attention = x.mean(0)
        return self.l(x) - self.attention  # type: ignore[no-any-return]

    with pytest.raises(TraceError, match=r"Small keeps state between calls.*'attention'"):
        ts.trace(keeping(forward), X)
    # Used before, it is a constant.
    made = keeping(forward)
    with torch.no_grad():
        made(MORE)
    check(made, X, batches=[(MORE,)])


# --- state that matters ---


def membrane(self: Any, x: Tensor) -> Tensor:
    self.attention = self.l(x) if self.attention is None else self.attention * 0.9 + self.l(x)
    return (self.attention > 0).float()  # type: ignore[no-any-return]


def memory_in_a_dict(self: Any, x: Tensor) -> Tensor:
    self.kept["state"] = self.kept.get("state", 0) + self.l(x)
    return self.kept["state"] * 2  # type: ignore[no-any-return]


def memory_in_a_list(self: Any, x: Tensor) -> Tensor:
    self.order.append(self.l(x))
    return torch.stack(list(self.order)).sum(0)


def memory_in_a_deque(self: Any, x: Tensor) -> Tensor:
    self.recent.append(self.l(x))
    return torch.stack(list(self.recent)).mean(0)


def memory_in_an_object(self: Any, x: Tensor) -> Tensor:
    before, self.box.held = self.box.held, self.l(x)
    return self.box.held if before is None else self.box.held + before  # type: ignore[no-any-return]


def counter(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.l(x) * self.calls  # type: ignore[no-any-return]


def alternating(self: Any, x: Tensor) -> Tensor:
    self.calls = 1 - self.calls
    return self.l(x) if self.calls else self.l(x) * 2  # type: ignore[no-any-return]


def first_call_differs(self: Any, x: Tensor) -> Tensor:
    y = self.l(x) if self.names else x
    self.names.add("called")
    return self.l(y)  # type: ignore[no-any-return]


def running_buffer(self: Any, x: Tensor) -> Tensor:
    self.mean = self.mean * 0.9 + x.mean(0) * 0.1
    return self.l(x - self.mean)  # type: ignore[no-any-return]


def written_in_place(self: Any, x: Tensor) -> Tensor:
    self.mean.add_(x.mean(0))
    return self.l(x - self.mean)  # type: ignore[no-any-return]


def written_by_index(self: Any, x: Tensor) -> Tensor:
    self.mean[0] = x.sum()
    return self.l(x * self.mean)  # type: ignore[no-any-return]


REMEMBERING: dict[Any, str] = {
    membrane: "attention",
    memory_in_a_dict: "kept",
    memory_in_a_list: "order",
    memory_in_a_deque: "recent",
    memory_in_an_object: "box",
    counter: "calls",
    alternating: "calls",
    first_call_differs: "names",
    running_buffer: "mean",
    written_in_place: "mean",
    written_by_index: "mean",
}


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize(("forward", "name"), REMEMBERING.items(), ids=lambda f: getattr(f, "__name__", ""))
def test_models_whose_answer_depends_on_earlier_calls_are_refused_by_name(forward: Any, name: str, warm: bool) -> None:
    made = keeping(forward)
    if warm:
        with torch.no_grad():
            made(X)
    if forward is first_call_differs and warm:
        check(made, X, batches=[(MORE,)])
        return

    def refused(whole: nn.Module, path: str) -> None:
        with pytest.raises(TraceError, match=f"(keeps state between calls|overwrites).*'{path}{name}[.\\w]*'"):
            ts.trace(whole, X)

    untouched(made, lambda: refused(made, ""))
    around = nn.Sequential(linear(), made, linear()).eval()
    untouched(around, lambda: refused(around, "1."))


def test_a_cache_that_a_larger_batch_leaves_for_smaller_ones_is_refused() -> None:
    """The example alone, called twice, does not show it."""

    def grows(self: Any, x: Tensor) -> Tensor:
        if self.cache is None or len(self.cache) < len(x):
            self.cache = torch.arange(len(x)) * 1.0
        return self.l(x) + self.cache[: len(x), None] / len(self.cache)

    def repeats(self: Any, x: Tensor) -> Tensor:
        if self.cache is None or len(self.cache) < len(x):
            self.cache = torch.arange(len(x)) * 1.0
        return self.l(x) + self.cache[: len(x), None]

    for forward, kept in ((grows, True), (repeats, False)):
        made = model(forward, l=linear(), cache=None)
        if kept:
            with pytest.raises(TraceError, match=r"keeps state between calls.*'cache'"):
                ts.trace(made, X)
        else:
            ts.trace(made, X)


@pytest.mark.parametrize("forward", [membrane, memory_in_a_list, counter], ids=lambda f: f.__name__)
def test_state_in_a_part_kept_whole_is_refused_too(forward: Any) -> None:
    made = nn.Sequential(linear(), keeping(forward), linear()).eval()
    with pytest.raises(TraceError, match="state between calls"):
        ts.trace(made, X, leaf_modules=["1"])


def warming_up(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.l(x) * (1 if self.calls < 10 else 2)  # type: ignore[no-any-return]


@pytest.mark.parametrize("whole", [[], ["1"]], ids=["followed", "kept whole"])
def test_a_count_of_calls_that_decides_after_many_is_refused(whole: list[str]) -> None:
    made = nn.Sequential(linear(), keeping(warming_up), linear()).eval()

    def refused() -> None:
        with pytest.raises(TraceError, match=r"state between calls.*'1.calls'"):
            ts.trace(made, X, leaf_modules=whole)

    untouched(made, refused)


def test_a_size_that_is_kept_is_no_count_of_calls() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.calls != x.shape[0]:
            self.calls, self.kept["rows"] = x.shape[0], torch.arange(float(x.shape[0]))
        return self.l(x) + self.kept["rows"][: self.calls, None]  # type: ignore[no-any-return]

    check(keeping(forward), X)


# --- state outside of the modules ---

_calls = 0
_kept: list[Tensor] = []
_table: dict[str, Tensor] = {}


def global_counter(self: Any, x: Tensor) -> Tensor:
    global _calls
    _calls += 1
    return self.l(x) * _calls  # type: ignore[no-any-return]


def global_list(self: Any, x: Tensor) -> Tensor:
    _kept.append(self.l(x))
    return torch.stack(list(_kept)).sum(0)


def global_dict(self: Any, x: Tensor) -> Tensor:
    _table["state"] = self.l(x) + _table.get("state", 0)
    return _table["state"]


@pytest.mark.parametrize("forward", [global_counter, global_list, global_dict], ids=lambda f: f.__name__)
def test_state_in_globals_is_refused_and_taken_back(forward: Any) -> None:
    with pytest.raises(TraceError, match="state between calls"):
        ts.trace(model(forward, l=linear()), X)
    assert (_calls, _kept, _table) == (0, [], {})


def test_state_in_closures_is_refused_and_taken_back() -> None:
    def counting() -> tuple[Any, Callable[[], int]]:
        calls = 0

        def forward(self: Any, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.l(x) * calls  # type: ignore[no-any-return]

        return forward, lambda: calls

    forward, calls = counting()
    with pytest.raises(TraceError, match=r"state between calls.*'calls'"):
        ts.trace(model(forward, l=linear()), X)
    assert calls() == 0


def test_features_that_a_hook_keeps_in_a_closure_are_followed_and_taken_back() -> None:
    features: dict[str, Tensor] = {}
    latest = None

    def keep(module: nn.Module, args: Any, result: Tensor) -> None:
        nonlocal latest
        features["first"] = latest = result

    made = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
    made[0].register_forward_hook(keep)
    made.register_forward_hook(lambda module, args, result: result + features["first"] + latest)
    ts.trace(made, X)
    assert not features
    assert latest is None
    check(made, X, batches=[(MORE,)])


# --- weights ---


@pytest.mark.parametrize(
    "write",
    [
        lambda self: self.l.weight.data.mul_(0.5),
        lambda self: self.l.weight.data.copy_(self.l.weight * 0.5),
        lambda self: self.l.weight.detach().zero_(),
        lambda self: self.l.bias.mul_(0.5),
        lambda self: self.l.bias.view(2, 4)[0].fill_(1.0),
        lambda self: nn.init.ones_(self.l.weight),
        lambda self: torch.mul(self.l.bias, 0.5, out=self.l.bias),
        lambda self: self.mean.copy_(torch.ones(8)),
    ],
    ids=["data", "data copied", "detached", "in place", "view", "init", "out", "buffer"],
)
def test_weights_that_forward_writes_are_refused_before_they_are_written(write: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        write(self)
        return self.l(x) + self.mean  # type: ignore[no-any-return]

    made = keeping(forward)

    def refused() -> None:
        with pytest.raises(TraceError):
            ts.trace(made, X)

    untouched(made, refused)


@pytest.mark.parametrize("make", [lambda self: nn.Parameter(self.l.weight * 0.5), lambda self: self.l.weight])
def test_weights_that_forward_replaces_are_put_back(make: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.l.weight
        self.l.weight = make(self)
        try:
            return self.l(x)  # type: ignore[no-any-return]
        finally:
            self.l.weight = weight

    made = keeping(forward)
    untouched(made, lambda: _traced_or_refused(made))


def _traced_or_refused(made: nn.Module) -> None:
    try:
        graph = ts.trace(made, X)
    except TraceError:
        return
    part = ts.cut(graph, 0)
    with torch.no_grad():
        assert torch.equal(part.tail(*part.head(X)), copy.deepcopy(made)(X))


# --- State itself ---


def test_state_says_what_changed_and_puts_it_back() -> None:
    made = keeping(attribute)
    made.l.register_buffer("count", torch.zeros(3))
    state, before = State(made), identities(made)
    assert state.changed() == []
    with torch.no_grad():
        made.l.count.add_(1)
    made.kept["a"] = made.order
    made.config["parts"][2]["deep"].append(4)
    made.box.held = 5
    made.recent.append(1)
    made.new = 1
    del made.calls
    names = state.changed()
    assert names == ["box.held", "calls", "config", "kept.a", "l.count", "new", "recent"]
    state.restore()
    assert state.changed() == []
    after = identities(made)
    assert list(made.__dict__) == list(before[""])
    assert after["l"]["_buffers"][2][0][0] == before["l"]["_buffers"][2][0][0]
    assert torch.equal(made.l.count, torch.zeros(3))
    assert made.config == {"width": 8, "parts": [1, 2, {"deep": [3]}]}


def test_a_block_puts_back_what_fails_inside_left() -> None:
    made = keeping(attribute)
    before = identities(made)

    def fail() -> None:
        with left_as_it_was(made):
            made.kept["a"] = 1
            raise ValueError("never")

    with pytest.raises(ValueError, match="never"):
        fail()
    assert same(identities(made), before)


# --- caches outside of modules ---


@functools.cache
def _mask(size: int) -> torch.Tensor:
    return torch.ones(size, size).tril()


class _Shared:
    kept: ClassVar[dict[str, torch.Tensor]] = {}


def _ones(into: dict[str, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
    return into.setdefault("ones", torch.ones(8))


@pytest.mark.parametrize(
    "cached",
    [
        lambda x: x @ _mask(x.shape[-1]),
        lambda x: x + _Shared.kept.setdefault("a", torch.ones(8)),
        lambda x: x + _ones(),
    ],
    ids=["lru_cache", "attribute of a class", "default argument"],
)
def test_caches_that_python_keeps_hold_nothing_without_elements_afterwards(cached: Any) -> None:
    made = model(lambda self, x: cached(self.l(x)), l=linear())
    ts.trace(made, X)
    with torch.no_grad():
        expected = cached(made.l(X))
    assert expected.device.type == "cpu"
    graph = ts.trace(made, X)
    part = ts.cut(graph, 1)
    with torch.no_grad():
        assert torch.equal(part.tail(*part.head(X)), expected)


def test_random_numbers_of_every_kind_are_where_they_were() -> None:
    made = model(lambda self, x: self.l(x) + torch.rand_like(x), l=linear())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.warns(ts.UnrepeatableWarning):
        ts.trace(made, X)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_numbers_drawn_outside_of_pytorch_are_refused() -> None:
    made = model(lambda self, x: self.l(x) * random.random(), l=linear())
    with pytest.raises(TraceError, match="answers differently from run to run, although no layer draws random numbers"):
        ts.trace(made, X)
