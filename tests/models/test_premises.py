"""Which changes of a model after tracing are found, so that no answer depends on the cut, and what may change."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from serving import split
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import torchsurgeon as ts
from torchsurgeon.models.premises import Premises

X = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """Reads attributes of every plain kind, its own and its class's."""

    bias = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head = nn.Sequential(nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1))
        self.threshold, self.scale, self.size, self.mode = 0.5, 2, (6, 6), "nearest"
        self.softly, self.activation, self.wanted = True, functional.relu, torch.float32
        self.limit: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.activation(self.stem(x))) * self.scale + self.bias
        y = functional.interpolate(y, self.size, mode=self.mode).to(self.wanted)
        if self.limit is not None:
            y = y.clamp(max=self.limit)
        return y.sigmoid() if self.softly else torch.where(y > self.threshold, y, 0 * y)


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


@pytest.fixture(scope="module")
def module() -> Iterator[ts.SplitModule]:
    with split(detector(), X) as module:
        yield module


CHANGES: list[tuple[str, Any]] = [
    ("threshold", 0.99),
    ("scale", 3),
    ("scale", 2.0),
    ("softly", 1),
    ("size", (7, 6)),
    ("mode", "nearest-exact"),
    ("softly", False),
    ("limit", 0.1),
    ("activation", functional.relu6),
    ("wanted", torch.float64),
    ("bias", 0.5),
    ("scale", torch.rand(1, 4, 6, 6)),
    ("scale", np.float32(3)),
]


@pytest.mark.parametrize(("name", "value"), CHANGES, ids=[f"{name}={type(value).__name__}" for name, value in CHANGES])
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_with_a_changed_attribute_the_model_itself_answers_until_it_is_set_back(
    module: ts.SplitModule, name: str, value: Any
) -> None:
    model, before = module.model, getattr(module.model, name)
    module.partition = 1
    expected = model(X)
    assert torch.equal(module(X), expected)
    setattr(model, name, value)
    try:
        assert torch.equal(module(X), model(X))
        assert f"changed: attribute '{name}' of the model" in degraded(module)
    finally:
        setattr(model, name, before)
    assert torch.equal(module(X), expected)
    assert "changed" not in degraded(module)


@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_with_a_change_that_the_model_does_not_take_its_own_error_is_raised(module: ts.SplitModule) -> None:
    module.model.size = np.array([7, 7])  # type: ignore[assignment]
    with pytest.raises(TypeError, match="upsample"):
        module(X)
    module.model.size = (6, 6)  # type: ignore[assignment]
    assert torch.equal(module(X), module.model(X))


def degraded(module: ts.SplitModule) -> str:
    assert module.last is not None
    return str(module.last.degraded)


@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_attributes_of_modules_that_pytorch_defines_count_too(module: ts.SplitModule) -> None:
    leaky = module.model.get_submodule("head.0")
    assert isinstance(leaky, nn.LeakyReLU)
    leaky.negative_slope = 0.2
    assert torch.equal(module(X), module.model(X))
    assert re.search(r"'negative_slope' of module 'head\.0' was 0\.1 .* is 0\.2", degraded(module))
    leaky.negative_slope = 0.1
    module(X)


def test_an_attribute_that_is_gone_or_changed_for_the_whole_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector()
    premises = Premises(model)
    with monkeypatch.context() as patched:
        patched.setattr(Detector, "bias", -1.0)
        assert "'bias' of the model was 0.25" in str(premises.broken())
    assert premises.broken() is None
    del model.threshold
    assert "'threshold' of the model was 0.5 when it was traced, and is gone" in str(premises.broken())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["", "head.1"])
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_with_a_hook_that_was_added_the_model_itself_answers_until_it_is_removed(
    module: ts.SplitModule, register: str, path: str
) -> None:
    handle = getattr(module.model.get_submodule(path), register)(lambda *_: None)
    module(X)
    assert f"hooks of {f'module {path!r}' if path else 'the model'}" in degraded(module)
    handle.remove()
    module(X)
    assert "changed" not in degraded(module)


def test_a_hook_that_was_there_may_neither_go_nor_be_exchanged() -> None:
    model = detector()
    handle = model.stem.register_forward_hook(lambda *_: None)
    premises = Premises(model)
    assert premises.broken() is None
    handle.remove()
    assert "hooks of module 'stem'" in str(premises.broken())
    model.stem.register_forward_hook(lambda module, args, result: 2 * result)
    assert "hooks of module 'stem'" in str(premises.broken())


class Counting(nn.Module):
    """Keeps account of itself in attributes, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.threshold = 0.5
        self.calls, self.longest, self.seen, self._last, self.named, self.told, self.by_hook = 0, 0, 0, 0, 0, 0, 0
        self.body.register_forward_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        self.by_hook += 1

    @property
    def last(self) -> int:
        return self._last

    @last.setter
    def last(self, value: int) -> None:
        self._last = value

    def note(self, x: Tensor) -> None:
        self.seen = len(x)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.calls
        self.note(x)
        account(self)
        setattr(self, "named", self.calls)  # noqa: B010
        if len(x) > self.longest:
            self.longest = len(x)
        y: Tensor = self.body(x) * self.threshold
        return y


def account(module: nn.Module) -> None:
    module.told = 1 + module.told  # type: ignore[assignment, operator]


def test_what_forward_assigns_may_change_however_it_is_called() -> None:
    model = Counting().eval()
    with ts.SplitModule(model, torch.rand(2, 4), partition="device") as module:
        module.deadline_s = 10.0
        for size in (2, 5, 3):
            x = torch.rand(size, 4)
            assert torch.equal(module(x), model(x))
    premises = Premises(model)
    model(torch.rand(9, 4))
    assert premises.broken() is None
    model.threshold = 0.1
    assert "'threshold'" in str(premises.broken())


UNSEEN: list[Callable[[Detector], Any]] = [
    lambda model: setattr(model, "note", "of the user"),
    lambda model: setattr(model, "threshold", float("0.5")),
    lambda model: setattr(model, "_cache", {"x": X}),
    lambda model: model.eval(),
    lambda model: model.requires_grad_(False),
    lambda model: model.register_full_backward_hook(lambda *_: None),
    lambda model: model.double().float(),
]


@pytest.mark.parametrize("change", UNSEEN)
def test_what_changes_no_answer_is_not_held_against_a_model(change: Callable[[Detector], Any]) -> None:
    model = detector()
    premises = Premises(model)
    change(model)
    assert premises.broken() is None


def test_the_mode_and_submodules_are_premises_too() -> None:
    model = detector()
    premises = Premises(model)
    model.head[1].train()
    assert "training mode" in str(premises.broken())
    model.eval()
    model.head[1] = nn.Conv2d(4, 4, 1).eval()
    assert "'head.1'" in str(premises.broken())


class Settings:
    scale = 2.0

    def shifted(self, x: Tensor) -> Tensor:
        return x + 1


class WithObject(nn.Module):
    """Reads an attribute of its settings' class, and calls a method of that."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.settings = nn.Conv2d(3, 4, 1), Settings()

    def forward(self, x: Tensor) -> Tensor:
        return self.settings.shifted(self.body(x)) * self.settings.scale


@pytest.mark.parametrize(("name", "value"), [("scale", 3.0), ("shifted", torch.neg)])
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_an_attribute_of_an_object_that_hides_one_of_its_class_is_found(name: str, value: Any) -> None:
    model = WithObject().eval()
    with split(model, X) as module:
        module.partition = 1
        module(X)
        setattr(model.settings, name, value)
        assert torch.equal(module(X), model(X))
        assert f"attribute '{name}' of 'settings' was" in str(module.last and module.last.degraded)
        delattr(model.settings, name)
        assert torch.equal(module(X), model(X))
        assert module.last is not None
        assert module.last.degraded is None


class WithHiddenLayers(nn.Module):
    """Keeps its layers in a plain list, where ``modules()`` does not find them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.layers = [nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), nn.ReLU().eval()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def _hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, result: 3 * result)


def _forward(layer: nn.Module) -> None:
    layer.forward = torch.neg


def _child(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Sequential)
    layer.append(nn.Tanh())


@pytest.mark.parametrize("change", [_hook, _forward, _child, nn.Module.train])
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_a_change_of_a_layer_in_a_plain_list_is_found(change: Callable[[nn.Module], Any]) -> None:
    model = WithHiddenLayers().eval()
    with split(model, X) as module:
        module.partition = 1
        assert torch.equal(module(X), model(X))
        change(model.layers[0])
        assert torch.equal(module(X), model(X))
        assert str(module.last and module.last.degraded).startswith("changed: ")


def test_a_key_of_a_dict_that_is_another_with_the_same_value_is_found() -> None:
    class Scaled(nn.Linear):
        factors: dict[str, float]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factors.get("scale", 1.0)

    model = Scaled(4, 4).eval()
    model.factors = {"scale": 2.0}
    premises = Premises(model)
    model.factors["shift"] = model.factors.pop("scale")
    assert "'factors' of the model holds has changed" in str(premises.broken())
    model.factors["scale"] = model.factors.pop("shift")
    assert premises.broken() is None


def _twice(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "name", "replaced"),
    [
        (functional, "scaled_dot_product_attention", _twice),
        (nn.Module, "__call__", _twice),
        (nn.Module, "_call_impl", _twice),
        (nn.Module, "__getattr__", _wrapped),
    ],
)
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_what_every_module_calls_may_not_be_replaced(
    place: Any, name: str, replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    premises = Premises(nn.Linear(8, 8).eval())
    assert premises.broken() is None
    with monkeypatch.context() as patched:
        patched.setattr(place, name, replaced(getattr(place, name)))
        assert f"{name.strip('_')}" in str(premises.broken())
    assert premises.broken() is None


def test_a_model_that_is_traced_in_another_thread_breaks_no_premise(monkeypatch: pytest.MonkeyPatch) -> None:
    premises = Premises(nn.Linear(8, 8).eval())
    of_tracer = {"__name__": "torchsurgeon.tracing.recorder", "called": nn.Module.__call__}
    following = types.FunctionType((lambda *args: called(*args)).__code__, of_tracer)  # type: ignore[name-defined]  # noqa: F821
    monkeypatch.setattr(nn.Module, "__call__", following)
    assert premises.hold()


def test_a_model_that_is_exported_in_another_thread_breaks_no_premise() -> None:
    linear = nn.Linear(8, 8).eval()
    premises = Premises(linear)
    found: list[tuple[bool, str | None]] = []

    def look(x: Tensor) -> Tensor:
        found.append((premises.hold(), Premises(linear).broken()))
        return x * 2

    before = nn.Module.__getattr__
    make_fx(look)(torch.rand(2))
    assert found == [(True, None)]
    assert nn.Module.__getattr__ is before
    assert premises.hold()


class WithArrays(nn.Linear):
    """Reads numbers from arrays, whose contents may change in place."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.mean, self.table, self.calls = np.ones(8, np.float32), bytearray(b"ab"), np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return super().forward(x - torch.from_numpy(self.mean)) * self.table[0]


def test_arrays_that_are_written_to_in_place_are_found() -> None:
    model = WithArrays().eval()
    premises = Premises(model)
    model(torch.rand(1, 8))
    assert premises.hold()
    model.mean[3] = 2
    assert "what 'mean' of the model holds has changed" in str(premises.broken())
    model.mean[3] = 1
    model.table.extend(b"c")
    assert "what 'table' of the model holds has changed" in str(premises.broken())
    del model.table[2:]
    assert premises.broken() is None
    assert premises.hold()


def test_the_default_dtype_is_a_premise_where_the_code_asks_for_it() -> None:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(torch.get_default_dtype())

    asks, does_not = Premises(Cast(8, 8).eval()), Premises(nn.Linear(8, 8).eval())
    torch.set_default_dtype(torch.float64)
    try:
        assert "'torch.get_default_dtype()' of 'its surroundings' was torch.float32" in str(asks.broken())
        assert does_not.broken() is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert asks.hold()


def test_objects_that_raise_anything_for_an_attribute_are_not_asked_for_any() -> None:
    class Options:
        def __init__(self) -> None:
            self.__dict__["table"] = {"scale": 2.0}

        def __getattr__(self, name: str) -> Any:
            return self.table[name]  # a KeyError, not an AttributeError

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.options = Options()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.options.scale

    model = Scaled().eval()
    premises = Premises(model)
    assert premises.hold()
    model.options.table["scale"] = 3.0
    assert "'options.table' of the model holds has changed" in str(premises.broken())
