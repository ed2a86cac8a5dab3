"""A trace is compared with the model: mismatches, made here on purpose, are found, named, and lead to the next way."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import model
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.errors import TraceError
from torchsurgeon.serve import ModelRegistry
from torchsurgeon.tracing import capture, verify
from torchsurgeon.tracing.call import Call
from torchsurgeon.tracing.step import Ref, Step
from torchsurgeon.tracing.verify import EXAMPLE, ONE_MORE_SAMPLE, OTHER_VALUES, Mismatch, Unrepeatable, same_answer

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
ALL = (EXAMPLE, OTHER_VALUES, ONE_MORE_SAMPLE)

Spoil = Callable[[list[Step]], None]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(linear(), nn.ReLU(), nn.Sequential(linear(), nn.Tanh()), linear()).eval()


def ending(self: Any, x: Tensor) -> Tensor:
    return self.body(x) * 2 + 1  # type: ignore[no-any-return]


# --- what goes wrong on purpose ---


def constant(steps: list[Step]) -> None:
    """Keep what a step gave for the example."""
    step = _of(steps, "1")
    step.target, step.args = _keeping(step.target), step.args


def _keeping(target: Any) -> Any:
    def kept(value: Tensor) -> Tensor:
        return kept.__dict__.setdefault("first", target(value))  # type: ignore[no-any-return]

    return kept


def wrong(steps: list[Step]) -> None:
    step = _of(steps, "1")
    step.target = lambda value: value * 1.0001


def wrong_for_three(steps: list[Step]) -> None:
    step = _of(steps, "1")
    step.target = lambda value: value.relu() if value.shape[0] == 2 else value


def wrong_where_other(steps: list[Step]) -> None:
    step = _of(steps, "1")
    step.target = lambda value: value.relu() if torch.equal(value, first) else value
    with torch.no_grad():
        first = step_of_example[0](X)


step_of_example: list[Any] = []


def failing(steps: list[Step]) -> None:
    def fail(value: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    _of(steps, "1").target = fail


def other_dtype(steps: list[Step]) -> None:
    _of(steps, "1").target = lambda value: value.relu().double().float().bfloat16().float()


def _of(steps: list[Step], name: str) -> Step:
    return next(step for step in steps if step.name == name)


SPOILT: dict[Spoil, str] = {
    wrong: EXAMPLE,
    failing: EXAMPLE,
    other_dtype: EXAMPLE,
    constant: OTHER_VALUES,
    wrong_where_other: OTHER_VALUES,
    wrong_for_three: ONE_MORE_SAMPLE,
}


def verified(made: nn.Module, steps: list[Step], *args: Any) -> tuple[str, ...]:
    call = Call(made, args, {})
    return verify.verify(made, call, steps, call.tensors(args, {}), batch_free=True)


def steps_of(made: nn.Module, *args: Any) -> list[Step]:
    return list(ts.trace(made, *args, verify=False).steps)


@pytest.mark.parametrize(("spoil", "sample"), SPOILT.items(), ids=[spoil.__name__ for spoil in SPOILT])
def test_a_step_that_is_wrong_is_found_on_the_first_input_that_shows_it_and_named(spoil: Spoil, sample: str) -> None:
    made = net()
    step_of_example[:] = [made[0]]
    steps = steps_of(made, X)
    assert verified(made, steps, X) == ALL
    spoil(steps)
    with pytest.raises(Mismatch, match=f"on {sample} the traced steps give another answer.*is '1'") as caught:
        verified(made, steps, X)
    assert (caught.value.sample, caught.value.layer, caught.value.module_path) == (sample, "1", "1")


@pytest.mark.parametrize("name", ["0", "1", "2.0", "2.1", "3"])
def test_the_first_layer_that_differs_is_named_wherever_it_is(name: str) -> None:
    made = net()
    steps = steps_of(made, X)
    step = _of(steps, name)
    right = step.target
    step.target = lambda value: right(value) + 1
    # The step is no longer one of a module, so this is found by what its module gives.
    with pytest.raises(Mismatch) as caught:
        verified(made, steps, X)
    assert (caught.value.layer, caught.value.module_path) == (name, name)


@pytest.mark.parametrize("name", ["mul", "add"])
def test_functions_between_layers_are_named(name: str) -> None:
    made = model(ending, body=net())
    steps = steps_of(made, X)
    step = _of(steps, name)
    step.args = (step.args[0], 3)
    with pytest.raises(Mismatch) as caught:
        verified(made, steps, X)
    # Without a module after it to compare, the function after the last right layer is named.
    assert caught.value.layer == "mul"


def test_a_layer_with_the_input_of_another_is_found() -> None:
    made = net()
    steps = steps_of(made, X)
    _of(steps, "3").args = (Ref(_of(steps, "2.0").index),)
    with pytest.raises(Mismatch) as caught:
        verified(made, steps, X)
    assert caught.value.layer == "3"


def test_a_wrong_structure_of_the_result_is_found() -> None:
    made = model(lambda self, x: {"a": self.l(x), "b": (x, 1)}, l=linear())
    steps = steps_of(made, X)
    assert verified(made, steps, X) == ALL
    steps[-1].args = steps[-1].args[::-1]
    with pytest.raises(Mismatch):
        verified(made, steps, X)


# --- what trace does about it ---


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Spoil what each way of tracing gives, in their order; the list that it returns gets what was tried."""

    def begin(*spoils: Callable[[list[Step]], None] | None) -> list[str]:
        tried: list[str] = []
        todo, ways = iter(spoils), capture.Ways.__iter__

        def iterate(self: capture.Ways) -> Iterator[capture.Captured]:
            for captured in ways(self):
                tried.append(captured.traced_by)
                spoil = next(todo, None)
                if spoil is not None:
                    spoil(captured.steps)
                yield captured

        monkeypatch.setattr(capture.Ways, "__iter__", iterate)
        return tried

    return begin


def every_product(steps: Sequence[Step]) -> None:
    """Change the first layer, whichever way it was traced."""
    step = next(step for step in steps if step.kind == "call" and step.name == "0")
    right = step.target
    step.target = lambda *args, **kwargs: right(*args, **kwargs) + 1


def test_the_next_way_is_tried_until_one_is_right(spoilt: Callable[..., list[str]]) -> None:
    tried = spoilt(every_product)
    graph = ts.trace(net(), X)
    assert tried == ["recorded", "export"]
    assert (graph.traced_by, graph.verified) == ("export", ALL)


def test_after_export_the_layer_that_was_wrong_stays_whole(spoilt: Callable[..., list[str]]) -> None:
    tried = spoilt(every_product, every_product)
    graph = ts.trace(net(), X)
    assert tried == ["recorded", "export", "hierarchical"]
    assert (graph.traced_by, list(graph.opaque)) == ("hierarchical", ["0"])
    assert "on the example the traced steps give another answer than the model" in graph.opaque["0"]


def test_a_model_that_no_way_is_right_for_is_refused_with_the_first_layer_that_differs(
    spoilt: Callable[..., list[str]],
) -> None:
    tried = spoilt(*[every_product] * 60)
    with pytest.raises(TraceError) as caught:
        ts.trace(net(), X)
    assert tried[:3] == ["recorded", "export", "hierarchical"]
    assert "recorded: on the example the traced steps give another answer than the model" in str(caught.value)
    assert "the first layer that differs is '0'" in str(caught.value)


def test_without_verification_nothing_runs_and_nothing_is_said_to_be_compared(
    spoilt: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.device] = []
    made = net()
    made[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].device))
    tried = spoilt(wrong)
    graph = ts.trace(made, X, verify=False)
    assert tried == ["recorded"]
    assert graph.verified == ()
    assert {device.type for device in calls} <= {"meta", "cpu"}

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("compared")

    monkeypatch.setattr("torchsurgeon.tracing.tracer.verify_steps", never)
    ts.trace(made, X, verify=False)


def test_a_model_that_cannot_run_here_is_traced_without_verification() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = linear()

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.torchsurgeon_test.only_meta(self.l(x)).relu()  # type: ignore[no-any-return]

    library = torch.library.Library("torchsurgeon_test", "FRAGMENT")
    library.define("only_meta(Tensor x) -> Tensor")
    library.impl("only_meta", lambda x: torch.empty_like(x), "Meta")
    try:
        graph = ts.trace(Fails().eval(), X, verify=False)
        assert [layer.name for layer in graph.layers] == ["l", "only_meta", "relu"]
        with pytest.raises(TraceError, match=r"(?s)Fails itself fails on the example.*verify=False"):
            ts.trace(Fails().eval(), X)
    finally:
        library._destroy()


# --- the samples ---


def test_what_was_compared_is_said() -> None:
    assert ts.trace(net(), X).verified == ALL
    fixed = ts.trace(model(lambda self, x: self.l(x).view(2, 4, 2), l=linear()), X)
    assert not fixed.batch_free
    assert fixed.verified == (EXAMPLE, OTHER_VALUES)


def test_inputs_that_the_model_itself_does_not_take_are_left_out() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.checked(self.l(x))  # type: ignore[no-any-return]

    class Checked(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            if y.shape[0] == 3:
                raise ValueError("three")
            return y * 2

    graph = ts.trace(model(forward, l=linear(), checked=Checked()), X, leaf_modules=["checked"])
    assert graph.verified == (EXAMPLE, OTHER_VALUES)


def test_an_example_that_the_model_does_not_take_is_said_to_be_wrong() -> None:
    def forward(self: Any, t: Tensor) -> Tensor:
        return self.l(self.table[t])  # type: ignore[no-any-return]

    made = model(forward, l=linear(), table=torch.randn(4, 8))
    assert ts.trace(made, torch.tensor([1, 3])).verified == ALL
    with pytest.raises(TraceError, match=r"itself fails on the example.*index.*give an example that the model takes"):
        ts.trace(made, torch.tensor([1, 7]))
    assert ts.trace(made, torch.tensor([1, 7]), verify=False).layers


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_other_values_are_of_the_same_kind_and_range(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    tensor = (torch.randn(shape) * 10).abs().to(dtype)
    before, other = tensor.clone(), verify._other_values(tensor)
    assert torch.equal(tensor, before)
    assert (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
    if not dtype.is_floating_point:
        # Indices that the model takes, in another order.
        assert torch.equal(other.flatten().sort().values, tensor.flatten().sort().values)
    elif tensor.numel() > 1:
        assert not torch.equal(other, tensor)
        beyond = 0.125 * (float(tensor.max() - tensor.min()) or 1.0) + 0.01 * float(tensor.max())
        assert float(tensor.min()) - beyond <= float(other.min())
        assert float(other.max()) <= float(tensor.max()) + beyond
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        assert torch.equal(verify._other_values(tensor), other), "the samples are the same in every trace"


def test_the_callers_random_numbers_and_inputs_stay_as_they_are() -> None:
    x = X.clone()
    made = model(lambda self, x: self.l(x.add_(1)) + torch.rand(8), l=linear())
    before = torch.random.get_rng_state()
    with pytest.warns(ts.UnrepeatableWarning):
        assert ts.trace(made, x).verified == ALL
    assert torch.equal(x, X)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- answers that cannot be compared ---


def test_a_model_that_draws_numbers_warns_once_and_is_traced() -> None:
    made = model(lambda self, x: self.l(x) + torch.rand_like(x), l=linear())
    with pytest.warns(ts.UnrepeatableWarning) as caught:
        graph = ts.trace(made, X)
    assert len(caught) == 1
    assert "'rand_like' draws random numbers" in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.warns(ts.UnrepeatableWarning) as caught:
        ts.SplitModule(made, X, partition="device")
    assert caught[0].filename == __file__
    assert [layer.name for layer in graph.layers] == ["l", "rand_like", "add"]


def test_a_model_whose_answers_differ_otherwise_is_refused() -> None:
    import itertools

    clock = itertools.count()

    class Timed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + next(clock)

    made = nn.Sequential(linear(), Timed(), linear()).eval()
    with pytest.raises(ts.TraceError, match="Sequential answers differently from run to run, although no layer draws"):
        ts.trace(made, X, leaf_modules=["1"])
    graph = ts.trace(made, X, leaf_modules=["1"], verify=False)
    assert graph.verified == ()
    with pytest.raises(Unrepeatable):
        verified(made, list(graph.steps), X)


def test_steps_that_draw_numbers_are_compared_from_one_seed() -> None:
    made = model(lambda self, x: self.l(x) + torch.rand_like(x), l=linear())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = steps_of(made, X)
    _of(steps, "add").target = operator.sub
    with pytest.raises(Mismatch):
        verified(made, steps, X)


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.filterwarnings("ignore::torchsurgeon.UnrepeatableWarning")
def test_a_model_that_seeds_the_generator_itself_is_not_answered_with_other_numbers(seed: int) -> None:
    """Such a model draws the same numbers in every call, which steps without the seed do not."""

    class Seeded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(seed)
            return x + torch.randn(8)

    with pytest.raises(TraceError, match="the traced steps give another answer than the model"):
        ts.trace(Seeded().eval(), X)
    graph = ts.trace(nn.Sequential(linear(), Seeded(), linear()).eval(), X)
    assert list(graph.opaque) == ["1"]
    part = ts.cut(graph, 1)
    with torch.no_grad():
        assert torch.equal(part.tail(*part.head(X)), graph.model(X))


# --- equality ---

NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0]), True),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), False),
        (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]), True),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.ones(2, 1), torch.ones(1, 2), False),
        (torch.ones(2, 3).mT, torch.ones(3, 2), True),
        (torch.ones(2, dtype=torch.float8_e4m3fn), torch.ones(2, dtype=torch.float8_e4m3fn), True),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), torch.ones(2, dtype=torch.float8_e4m3fn), False),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]), False),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), True),
        (torch.eye(2).to_sparse(), torch.eye(2), False),
        (torch.empty(0), torch.empty(0), True),
        (torch.ones(2), 1.0, False),
        ((torch.ones(2), 1), (torch.ones(2), 1), True),
        ((torch.ones(2), 1), (torch.ones(2), 2), False),
        ((torch.ones(2), 1), (torch.ones(2), 1.0), False),
        ((torch.ones(2), 1), [torch.ones(2), 1], False),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, False),
        ({"a": torch.ones(2), "b": None}, {"a": torch.ones(2), "b": None}, True),
        ({"a": "x"}, {"a": "y"}, False),
        (NAN, NAN, True),
        (NAN, 1.0, False),
        (None, 1.0, False),
    ],
)
def test_answers_are_the_same_bit_for_bit(one: Any, other: Any, equal: bool) -> None:
    assert same_answer(one, other) is equal
    assert same_answer(other, one) is equal


def test_a_split_and_a_registry_may_leave_out_the_comparison() -> None:
    made = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    registry = ModelRegistry()
    for verifies in (True, False):
        with ts.SplitModule(made, torch.rand(2, 4), partition="device", verify=verifies) as split:
            assert bool(split.graph.verified) is verifies
        assert bool(registry.add(f"net{verifies}", made, torch.rand(2, 4), verify=verifies).graph.verified) is verifies
    registry.close()
