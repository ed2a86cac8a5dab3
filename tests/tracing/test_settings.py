"""Settings that a model changes inside its forward are in force around the same steps, on whichever side these run."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partitions import assert_same, check
from serving import check_split, split
from small_models import model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchsurgeon as ts
from torchsurgeon.errors import TraceError
from torchsurgeon.tracing.ambient import Ambient, settings
from torchsurgeon.tracing.recorder import Recorder

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _left_as_they_were() -> Iterator[None]:
    """Whatever is traced and cut, the caller's own settings stay."""
    torch.manual_seed(0)
    before = settings()
    yield
    assert settings() == before


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def autocast(**options: Any) -> Any:
    return torch.autocast("cpu", **{"dtype": torch.bfloat16, **options})


# --- autocast ---


def block(self: Any, x: Tensor) -> Tensor:
    with autocast():
        y = self.first(x)
    return self.last(y.float())


@autocast()
def decorator(self: Any, x: Tensor) -> Tensor:
    return self.last(self.first(x)).float()


def nested(self: Any, x: Tensor) -> Tensor:
    with autocast():
        y = self.first(x)
        # In a block, PyTorch remembers weights as they were cast first, so each dtype has a layer of its own.
        with autocast(dtype=torch.float16):
            z = self.last(y)
        return self.first(self.first(z) + y).float()


def off_inside(self: Any, x: Tensor) -> Tensor:
    with autocast():
        y = self.first(x)
        with autocast(enabled=False):
            y = self.last(y.float())
        return self.first(y)


def branching_on_it(self: Any, x: Tensor) -> Tensor:
    with autocast():
        y = self.first(x)
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is y.dtype:
            y = y * 2
    return self.last(y.float())


def product_inside(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    with autocast():
        z = y @ y.mT + torch.einsum("ac,bc->ab", y, y)
        return (z.softmax(-1) @ y).float() + self.last(y)


def without_cache(self: Any, x: Tensor) -> Tensor:
    with autocast(cache_enabled=False):
        return self.last(self.first(self.first(x)))


def entered_by_hand(self: Any, x: Tensor) -> Tensor:
    context = autocast()
    context.__enter__()
    try:
        y = self.first(x)
    finally:
        context.__exit__(None, None, None)
    return self.last(y.float())


CASTING = [block, decorator, nested, off_inside, branching_on_it, product_inside, without_cache, entered_by_hand]


@pytest.mark.parametrize("forward", CASTING, ids=lambda f: f.__name__)
def test_autocast_acts_on_the_steps_inside_and_the_dtypes_said_are_those_that_cross(forward: Any) -> None:
    graph = check(model(forward, first=linear(), last=linear()), X, batches=[(MORE,)])
    assert (graph.traced_by, dict(graph.opaque)) == ("recorded", {})
    assert torch.bfloat16 in {spec.dtype for spec in graph.values.values()}
    assert graph.batch_free
    assert not graph.value_dependent


def test_a_part_of_ones_own_under_autocast_crosses_in_half_the_bytes() -> None:
    class Half(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with autocast():
                y = self.inner(x)
            return y.float()

    made = nn.Sequential(linear(), Half(nn.Sequential(linear(), nn.ReLU())), linear())
    graph = check(made, X, batches=[(MORE,)])
    inside = graph.point("1.inner.0").tensors
    assert [(spec.dtype, spec.size_bytes) for spec in inside] == [(torch.bfloat16, 2 * 8 * 2)]
    with split(made, X) as module:
        check_split(module, module.graph.points, ((X,), {}), ((MORE,), {}))
        module.partition = graph.point("1.inner.0").index
        with torch.no_grad():
            assert torch.equal(module(MORE), made(MORE))
        assert module.last.degraded is None
        assert module.last.sent_bytes < 5 * 8 * 4 + 400


def test_autocast_in_a_hook_of_ones_own_acts_as_far_as_it_is_on() -> None:
    class Around:
        def before(self, module: nn.Module, args: Any) -> None:
            self.context = autocast()
            self.context.__enter__()

        def after(self, module: nn.Module, args: Any, result: Tensor) -> Tensor:
            self.context.__exit__(None, None, None)
            return result.float()

    made, around = nn.Sequential(linear(), linear(), linear()), Around()
    made[1].register_forward_pre_hook(around.before)
    made[1].register_forward_hook(around.after)
    graph = check(made, X, batches=[(MORE,)])
    assert graph.values["1"].dtype is torch.bfloat16


def test_autocast_around_the_caller_is_the_callers() -> None:
    """Settings of the caller are no part of the model: a model traced under none runs under those of each call."""
    made = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
    part = ts.cut(ts.trace(made, X), 2)
    with torch.no_grad(), autocast():
        assert torch.equal(part.tail(*part.head(MORE)), made(MORE))


# --- attention kernels ---

BACKENDS: dict[str, Callable[[Any, Tensor], Tensor]] = {}


def backend(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    BACKENDS[function.__name__] = function
    return function


@backend
def math_alone(self: Any, y: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(y, y, y)


@backend
def flash_alone(self: Any, y: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return F.scaled_dot_product_attention(y, y, y)


@backend
def in_an_order(self: Any, y: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(y, y, y)


@backend
@sdpa_kernel(SDPBackend.MATH)
def decorated(self: Any, y: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(y, y, y)


@backend
def switched_by_hand(self: Any, y: Tensor) -> Tensor:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        return F.scaled_dot_product_attention(y, y, y)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.parametrize("attend", BACKENDS.values(), ids=list(BACKENDS))
def test_the_kernel_of_attention_that_the_model_chose_is_used(attend: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(attend(self, y) + F.scaled_dot_product_attention(y, y, y))

    x = torch.randn(2, 3, 33, 8)
    graph = check(model(forward, first=linear(), last=linear()), x, batches=[(torch.randn(4, 3, 33, 8),)])
    assert graph.traced_by == "recorded"
    # The two kernels differ in the last bits for this example, so this test can fail.
    with torch.no_grad():
        y = graph.model.first(x)
        chosen, default = math_alone(None, y), F.scaled_dot_product_attention(y, y, y)
    assert not torch.equal(chosen, default)


# --- everything else ---


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("make", [lambda: torch.ones(8), lambda: torch.arange(8) / 3, lambda: torch.tensor([0.1] * 8)])
def test_the_default_dtype_is_that_of_the_step(make: Callable[[], Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with double_by_default():
            scale = make() * x.shape[0]
        return self.first(x) * scale + torch.ones(8)

    graph = check(model(forward, first=linear()), X, batches=[(MORE,)])
    assert graph.outputs[0].dtype is torch.float64


FLAGS: dict[str, Any] = {
    "oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "cuDNN": lambda: torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=True),
    "deterministic": lambda: _switched(torch.use_deterministic_algorithms, True, False),
    "precision": lambda: _switched(torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()),
}


@contextlib.contextmanager
def _switched(switch: Callable[[Any], None], to: Any, back: Any) -> Iterator[None]:
    switch(to)
    try:
        yield
    finally:
        switch(back)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))
def test_flags_are_in_force_around_each_step_and_around_no_other(flags: Any) -> None:
    seen: list[bool] = []

    class Seeing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(settings() != outside)
            return x * 2

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.before(x)
        with flags():
            y = self.inside(self.first(y))
        return self.after(self.last(y))

    with torch.no_grad():
        outside = settings()
    made = model(forward, first=linear(), last=linear(), before=Seeing(), inside=Seeing(), after=Seeing())
    graph = check(made, X, leaf_modules=[Seeing])
    part = ts.cut(graph, "inside")
    seen.clear()
    with torch.no_grad():
        sent = part.head(X)
        assert seen == [False, True]
        assert settings() == outside
        part.tail(*sent)
    assert seen == [False, True, False]


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_settings_are_put_back_where_a_step_fails() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 5:
                raise RuntimeError("five")
            return x * 2

    def forward(self: Any, x: Tensor) -> Tensor:
        with autocast(), torch.backends.mkldnn.flags(enabled=False):
            return self.failing(self.first(x)).float()

    part = ts.cut(ts.trace(model(forward, first=linear(), failing=Failing()), X, leaf_modules=["failing"]), 1)
    before = settings()
    with torch.no_grad(), pytest.raises(RuntimeError, match="five"):
        part.tail(*part.head(MORE))
    assert settings() == before


@pytest.mark.parametrize("way", ["block", "decorator", "loop"])
def test_gradient_modes_around_what_needs_no_gradient_change_nothing(way: str) -> None:
    mode = {
        "block": torch.no_grad,
        "decorator": torch.enable_grad,
        "loop": functools.partial(torch.set_grad_enabled, True),
    }

    def forward(self: Any, x: Tensor) -> Tensor:
        with mode[way]():
            y = self.first(x)
        return self.last(y.detach())

    graph = check(model(forward, first=linear(), last=linear()), X, batches=[(MORE,)])
    assert graph.traced_by == "recorded"


def test_inference_mode_inside_is_followed() -> None:
    @torch.inference_mode()
    def inner(self: Any, x: Tensor) -> Tensor:
        return self.first(x).relu()

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.first(x)
        return self.last(inner(self, y) + y)

    graph = check(model(forward, first=linear(), last=linear()), X, batches=[(MORE,)])
    assert not graph.opaque


def test_models_are_traced_and_run_in_inference_mode() -> None:
    with torch.inference_mode():
        made = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
        x = torch.randn(2, 8)
        part = ts.cut(ts.trace(made, x), 2)
        assert torch.equal(part.tail(*part.head(x + 1)), made(x + 1))


class Force(nn.Module):
    """Computes a gradient inside, as models of forces between atoms do."""

    def __init__(self) -> None:
        super().__init__()
        self.l = linear()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.l(x).pow(3).sum()
            return torch.autograd.grad(energy, x)[0]


def test_gradients_asked_for_inside_are_refused_and_right_as_a_part() -> None:
    with pytest.raises(TraceError, match="cannot be followed: gradients are asked for"):
        ts.trace(Force().eval(), X)
    graph = check(nn.Sequential(linear(), Force(), linear()), X, batches=[(MORE,)])
    assert (graph.traced_by, list(graph.opaque)) == ("hierarchical", ["1"])


def test_settings_that_a_model_leaves_changed_act_on_what_follows() -> None:
    """Such a model changes its caller's settings; a step still runs under those that were in force for it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        before = torch.get_autocast_dtype("cpu")
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.bfloat16)
        z = self.last(y)
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", before)
        return z

    graph = check(model(forward, first=linear(), last=linear()), X)
    assert graph.outputs[0].dtype is torch.bfloat16


@pytest.mark.parametrize("forward", [block, nested, off_inside], ids=lambda f: f.__name__)
def test_copies_of_heads_and_tails_keep_the_settings(forward: Any) -> None:
    made = model(forward, first=linear(), last=linear())
    graph = ts.trace(made, X)
    with torch.no_grad():
        expected = made(MORE)
        for point in graph.points:
            part = ts.cut(graph, point)
            head, tail = copy.deepcopy(part.head), copy.deepcopy(part.tail)
            assert_same(tail(*head(MORE)), expected, f"point {point}")


def test_what_a_step_needs_is_said_by_name() -> None:
    outside = settings()
    with autocast():
        inside = settings()
    ambient = Ambient(outside, inside)
    assert ambient.autocasts
    assert "autocast on cpu" in str(ambient)
    with ambient.restored():
        assert settings() == inside
    assert settings() == outside


def test_ctrl_c_just_as_a_mode_is_to_be_ended_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def struck(*_: Any) -> None:
        raise KeyboardInterrupt

    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.rand(1, 4)
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "__exit__", struck)
        with pytest.raises(KeyboardInterrupt):
            ts.trace(model, x)
    assert not torch._C._len_torch_function_stack()
    assert not torch._C._len_torch_dispatch_stack()
    with torch.no_grad():
        assert torch.equal(ts.trace(model, x).model(x), model(x))
